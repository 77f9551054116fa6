"""Combined attention: tanh of scores times a gate by distance, so that tokens may be subtracted.

Weights lie between -1 and 1 and sum to nothing in particular: outputs grow with the number of keys.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse
from regard.scores._pairs import in_pieces
from regard.stages import Mix, Normalizer, Rows, Stage

CARD = Card(
    "comateformer",
    equation="""E_ts = alpha q_t . k_s / sqrt(D),   N_ts = -beta sum_d |q_td - k_sd| / sqrt(D)
A_ts = tanh(E_ts) g(N_ts) for allowed s, else 0
g(N) = sigmoid(N) ("plain"), 2 sigmoid(N) ("double"), sigmoid(N - mean(N)) ("centered")""",
    papers=(
        Paper(
            "Comateformer: Combined Attention Transformer for Semantic Sentence Matching",
            "Li, Liang, Zhang",
            2024,
            "2412.07220",
            "abstract; a long article about it, whose formulas are pictures; no code of the authors was found",
        ),
        Paper(
            "Compositional De-Attention Networks",
            "Tay, Luu, Zhang, Wang, Hui",
            2019,
            "NeurIPS 2019",
            "abstract and introduction; its formulas are recalled",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant", "head_independent"},
    cost=Cost("2*B*H*T*S*D + 2*B*H*T*S", "2*S*G*D"),
    claim="A head adds one token and subtracts another, the second only in part, and so learns a signed sum: "
    "tests/normalizers/test_comateformer.py::test_adding_is_easy_and_subtracting_bounded, "
    "tests/normalizers/test_comateformer.py::test_learns_a_signed_sum.",
    differs=(
        'The mean of "centered" is of each row over the keys that it may see, so that no query learns of later ones; '
        "the text centres the whole matrix, which `combined_weights` and `compositional_pair` do.",
        "Reconstructed: that distances are divided by sqrt(D) as scores are, and are not where two sequences are "
        "combined.",
        "Biases of positions are added to E, before tanh; rotations move what distances are taken of, too.",
        "Which heads and layers of a model have it is the model's choice.",
    ),
    verified="reconstructed",
    defaults={
        "gate": "paper, as told by others",
        "alpha": "paper, as told by others",
        "beta": "paper, as told by others",
    },
)

GateForm = Literal["double", "plain", "centered"]


def negative_distances(
    q: Float[Tensor, "B H t D"], k: Float[Tensor, "B G s D"], factor: float, *, rows: int | None = None
) -> Float[Tensor, "B H t s"]:
    """-factor |q - k|_1, on some `rows` queries at a time: differences of all pairs would be D times their number."""
    (B, H, _, D), s = q.shape, k.shape[2]
    k = k.repeat_interleave(H // k.shape[1], 1)

    def run(some: Tensor) -> Tensor:
        return (some[..., :, None, :] - k[..., None, :, :]).abs().sum(-1) * -factor

    return in_pieces(run, q, B * H * s * D, rows=rows)


def distance_gate(
    n: Float[Tensor, "B H t s"],
    gate: GateForm = "double",
    allowed: Bool[Tensor, "#B #H t s"] | None = None,
    *,
    mean_over: Literal["row", "matrix"] = "row",
) -> Float[Tensor, "B H t s"]:
    """g(N). Means are over the allowed pairs of a row, or of a head's whole matrix."""
    if gate != "centered":
        return n.sigmoid() * (2 if gate == "double" else 1)
    axes = (-1,) if mean_over == "row" else (-2, -1)
    if allowed is None:
        return (n - n.mean(axes, keepdim=True)).sigmoid()
    allowed = allowed.expand(n.shape)
    total = n.masked_fill(~allowed, 0.0).sum(axes, keepdim=True)
    return (n - total / allowed.sum(axes, keepdim=True).clamp(min=1)).sigmoid()


def tanh_weights(
    scores: Float[Tensor, "B H t s"], allowed: Bool[Tensor, "#B #H t s"] | None = None
) -> Float[Tensor, "B H t s"]:
    """tanh(E), 0 where not allowed. (A score of -inf would give -1, not nothing.)"""
    return (scores if allowed is None else scores.masked_fill(~allowed, 0.0)).tanh()


@checked()
def combined_weights(
    e: Float[Tensor, "B H t s"],
    n: Float[Tensor, "B H t s"],
    *,
    gate: GateForm = "double",
    allowed: Bool[Tensor, "#B #H t s"] | None = None,
    mean_over: Literal["row", "matrix"] = "matrix",
) -> Float[Tensor, "B H t s"]:
    """tanh(E) g(N), 0 where not allowed.

    Args:
        mean_over: what "centered" takes its mean over. Over the "matrix" a causal mask hides nothing from it.
    """
    choice("combined_weights", get_args(GateForm), gate=gate)
    choice("combined_weights", ("row", "matrix"), mean_over=mean_over)
    return tanh_weights(e, allowed) * distance_gate(n, gate, allowed, mean_over=mean_over)


@checked()
def compositional_pair(
    a: Float[Tensor, "B T M"],
    b: Float[Tensor, "B S M"],
    *,
    similar: Callable[[Tensor], Tensor] | None = None,
    apart: Callable[[Tensor], Tensor] | None = None,
    gate: GateForm = "double",
    alpha: float = 1.0,
    beta: float = 1.0,
    keep_a: Bool[Tensor, "B T"] | None = None,
    keep_b: Bool[Tensor, "B S"] | None = None,
) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B S M"]]:
    """Two sequences, each composed of the other by one matrix: W b and W^T a. Nothing is divided by a width here.

    Args:
        similar, apart: F_E and F_N, what similarity and distance are taken of, one of each for both sequences; by
            default the tokens themselves.
        keep_a, keep_b: True = a real token.
    """
    if a.shape[2] == 0:
        refuse("compositional_pair", "a", "has no features", tuple(a.shape), "(B, T, M) with M >= 1")
    e, n = ([z if f is None else f(z) for z in (a, b)] for f in (similar, apart))
    allowed = None
    for keep, axis in ((keep_a, 3), (keep_b, 2)):
        if keep is not None:
            one = keep[:, None].unsqueeze(axis)
            allowed = one if allowed is None else allowed & one
    if allowed is not None:
        allowed = allowed.expand(-1, -1, a.shape[1], b.shape[1])
    scores = alpha * (e[0] @ e[1].mT)[:, None]
    distances = negative_distances(n[0][:, None], n[1][:, None], beta)
    weights = combined_weights(scores, distances, gate=gate, allowed=allowed)[:, 0]
    return weights @ b, weights.mT @ a


class Tanh(Normalizer):
    """tanh(alpha score), 0 for what is hidden."""

    sees = "tile"

    def __init__(self, *, alpha: float = 1.0) -> None:
        super().__init__()
        number(self, above=0, alpha=alpha)
        self.alpha = float(alpha)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        z = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return tanh_weights(self.alpha * z, allowed).to(scores.dtype)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class DistanceGate(Mix):
    """Weights times g of the L1 distance of query and key, over sqrt(D)."""

    def __init__(self, *, gate: GateForm = "double", beta: float = 1.0) -> None:
        super().__init__()
        choice(self, get_args(GateForm), gate=gate)
        number(self, least=0, beta=beta)
        self.gate: GateForm = gate
        self.beta = float(beta)
        self.sees = "rows" if gate == "centered" else "tile"

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (rows.q, rows.k))
        n = negative_distances(q, k, self.beta * int(q.shape[-1]) ** -0.5)
        return z * distance_gate(n, self.gate, rows.allowed).to(z.dtype)

    def extra_repr(self) -> str:
        return f"gate={self.gate!r}, beta={self.beta}"


@CARD.fills()
def combined_parts(*, gate: GateForm = "double", alpha: float = 1.0, beta: float = 1.0) -> dict[str, Stage]:
    """The normaliser, and the gate on its weights.

    Args:
        gate: how distances are turned into factors: from 0 to 1 ("double" and "centered") or to 1/2 ("plain").
        alpha: > 0, a factor of scores.
        beta: >= 0, a factor of distances.
    """
    return {"normalizer": Tanh(alpha=alpha), "weight_mix": DistanceGate(gate=gate, beta=beta)}

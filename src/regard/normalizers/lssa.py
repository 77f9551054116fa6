"""Softplus attention: softplus of cosines, scaled by the logarithms of width and length, over its sum.

Re-weighted, what is above a row's average is raised to a power, and the rest goes.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, number, whole
from regard.kernels.problem import dots
from regard.stages import Normalizer, Rows, Score, Stage

CARD = Card(
    "lssar",
    gist="Softplus attention re-weighted: what is above a row's mean is raised to a power; the rest goes.",
    equation="""c[t,s] = q_t . k_s / (|q_t| |k_s|),   n_t = how many keys t may attend to
a[t,s] = softplus(ln D ln n_t c[t,s]),      A = a / (sum_s a + eps)              (LSSA)
r[t,s] = max(n_t A[t,s] - o_t, 0)^p,        A' = r / (sum_s r + eps)             (LSSAR)
o_t = 1, but 0 where n_t <= 3""",
    papers=(
        Paper(
            "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
            "Gao, Spratling, Gionfrida",
            2025,
            "2501.13428",
            "abstract; introduction; a note with the formulas; code of others",
        ),
    ),
    traits=PLAIN - {"normalised"} | {"sparse"},
    claim="Length of queries is nothing to it, and exactly the weights above a row's average remain: "
    "tests/normalizers/test_lssa.py::test_length_of_queries_is_nothing_to_it_and_weights_below_average_go.",
    differs=(
        "Inferred: where not all earlier keys may be seen, n counts those that may, and o is 0 by that count.",
        "Powers are taken of shares of the row's greatest, so that they can't overflow; eps keeps its meaning.",
        "The rotary positions of the authors' models are not here: `lssar+rotary`.",
    ),
    verified="third-party",
    example={"power": 3},
    defaults={"power": "code, On-Point-RND, the paper's for long sequences", "eps": "code, On-Point-RND"},
)
CARD.variant(
    "lssa",
    "Softplus attention: softplus of cosines, scaled by the logarithms of width and length, over its sum.",
    preset={"power": None},
    traits=PLAIN - {"normalised"},
    example={},
)


class UnitScore(Score):
    """Cosines of queries and keys; times `scale` sqrt(D), which is 1 where nobody changed it. No parameters."""

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        q, k = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1) for z in (rows.q, rows.k))
        return dots(q, k) * (scale * int(q.shape[-1]) ** 0.5)  # while torch.jit traces, sizes are tensors


def lssa(
    cosines: Float[Tensor, "*b S"], width: int, allowed: Bool[Tensor, "*b S"] | None = None, eps: float = 1e-8
) -> tuple[Float[Tensor, "*b S"], Float[Tensor, "*b 1"]]:
    """Weights and how many keys each row may see, in at least fp32. Without any, its weights are 0."""
    z = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
    if allowed is None:
        n = torch.ones_like(z).sum(-1, keepdim=True)
    else:
        n, z = allowed.sum(-1, keepdim=True).to(z.dtype), z.masked_fill(~allowed, 0)
    a = -F.logsigmoid(-math.log(width) * n.clamp(min=1).log() * z)  # softplus, for any z
    if allowed is not None:
        a = a.masked_fill(~allowed, 0)
    return a / (a.sum(-1, keepdim=True) + eps), n


def reweighted(
    weights: Float[Tensor, "*b S"], n: Float[Tensor, "*b 1"], power: int, eps: float = 1e-8
) -> Float[Tensor, "*b S"]:
    """What is above the average 1 / n, to a power, over its sum. With at most three keys all of them."""
    above = (n * weights - (n > 3).to(n.dtype)).relu()
    top = above.detach().amax(-1, keepdim=True)  # drops out, but for rounding
    r = (above / torch.where(top == 0, 1, top)) ** power
    return r / (r.sum(-1, keepdim=True) + eps * torch.where(top == 0, 1, top) ** -power)


class LengthScaledSoftplus(Normalizer):
    """Softplus over its sum, of cosines; re-weighted where there is a power.

    Args:
        head_dim: D.
        power: p, a whole number; None = not re-weighted.
        eps: beside the sums.
    """

    def __init__(self, head_dim: int, *, power: int | None = None, eps: float = 1e-8) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        if power is not None:
            whole(self, power=power)
        number(self, above=0, eps=eps)
        self.head_dim, self.power, self.eps = head_dim, power, eps

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        if scores.shape[-1] == 0:
            return scores
        weights, n = lssa(scores, self.head_dim, allowed, self.eps)
        weights = weights if self.power is None else reweighted(weights, n, self.power, self.eps)
        return weights.to(scores.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, power={self.power}"


@CARD.fills()
def lssar(head_dim: int, *, power: int | None = 15, eps: float = 1e-8) -> dict[str, Stage]:
    """Cosines and the normaliser.

    Args:
        head_dim: of the layer.
        power: p; the paper's best are 3 at the length trained at, and 15 beyond. None = not re-weighted.
        eps: beside the sums.
    """
    return {"score": UnitScore(), "normalizer": LengthScaledSoftplus(head_dim, power=power, eps=eps)}

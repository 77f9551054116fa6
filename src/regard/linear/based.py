"""Based: exp(q . k / sqrt(D)) as its Taylor polynomial of second order, on narrow queries and keys."""

import math
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import flag, number, whole
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan
from regard.linear._shared import RecurrentMixer, widened
from regard.linear.fast import fast_attention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "based",
    equation="""out_i = sum_j w_ij v_j / (sum_j w_ij + eps),   w_ij = 1 + s + s^2 / 2,   s = q_i . k_j / sqrt(F)
w_ij = phi(q_i / sqrt(F)) . phi(k_j),   phi(x) = (1, x, x_a x_b / sqrt(2)),   F = 16;   j <= i when causal
a model has layers of this and of a small exact window in turn: `regard.models.window_and_based`""",
    papers=(
        Paper(
            "Simple linear attention language models balance the recall-throughput tradeoff",
            "Arora et al.",
            2024,
            "2402.18668",
            "the authors' code (layers and configurations)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN - {"normalised"},
    cost=Cost(
        "B*H*(T + S)*(1 + feature_dim + feature_dim*(feature_dim + 1)/2)*(D + 1)",
        "H*(1 + feature_dim + feature_dim*(feature_dim + 1)/2)*(D + 1)",
    ),
    claim="What a state of one size recalls grows with the features of its keys: "
    "tests/linear/test_based.py::test_more_features_recall_more, "
    "tests/linear/test_based.py::test_it_is_softmax_where_scores_are_small.",
    differs=(
        "Of x_a x_b and x_b x_a one is kept, with both their weights: the state has 1 + F + F (F + 1) / 2 rows, where "
        "the authors' has 1 + F + F^2.",
        "eps is that of flash-linear-attention; the authors' layer has 1e-12.",
        "The short convolutions that the authors' models have besides are not there.",
    ),
    verified="third-party",
    example={"feature_dim": 3},
    tries={"feature_dim": 5, "eps": 0.5},
    defaults={
        "feature_dim": "code",
        "normalise": "code",
        "eps": "code, flash-linear-attention",
        "bias": "code",
        "context_dim": "ours, as wide as dim",
    },
)


def taylor_attention(
    q: Float[Tensor, "B H T F"],
    k: Float[Tensor, "B G S F"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    normalise: bool = True,
    eps: float = 1e-6,
    state: Float[Tensor, "B H K V1"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """Outputs, and the sums over keys phi(k)^T [v, 1]. Hand them back in as `state` to go on causally.

    Args:
        keep: True at real keys.
        normalise: whether sums are divided by the sum of weights and `eps`.
        starts: those of `linear_scan`, where causal.

    Raises:
        ValueError: shapes that don't fit together.
    """
    check_inputs(q, k, v)
    q, k, v = widened(q, k, v)
    q = q / math.sqrt(q.shape[3])
    return fast_attention(q, k, v, causal=causal, keep=keep, divide=normalise, eps=eps, state=state, starts=starts)


class BasedState(NamedTuple):
    """All the past leaves behind. Its size does not grow."""

    sums: Float[Tensor, "B H K V1"]
    """sum_j phi(k_j)^T [v_j, 1]."""


@CARD.module
class Based(RecurrentMixer):
    """The linear attention of Based.

    Args:
        dim, num_heads, rest: as of `HeadMixer`; head_dim is the width of a head's values.
        feature_dim: F, the width of a head's queries and keys.
        normalise: whether sums are divided by the sum of weights and `eps`.
        eps: added to the denominator.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    resets = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_dim: int = 16,
        normalise: bool = True,
        eps: float = 1e-6,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        whole(self, feature_dim=feature_dim)
        flag(self, normalise=normalise)
        number(self, least=0, eps=eps)
        self.feature_dim, self.normalise, self.eps = feature_dim, normalise, eps
        bias = self.q_proj.bias is not None
        self.q_proj = nn.Linear(dim, num_heads * feature_dim, bias=bias)
        self.k_proj = nn.Linear(self.k_proj.in_features, self.num_kv_heads * feature_dim, bias=bias)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        widths = (self.feature_dim, self.feature_dim, self.head_dim)
        q, k, v = (z.unflatten(-1, (-1, width)).transpose(1, 2) for z, width in zip(projected, widths, strict=True))
        return q, k, v

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: BasedState | None,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, BasedState]:
        past = None if state is None else state.sums
        out, sums = taylor_attention(
            q,
            k,
            v,
            causal=self.causal,
            keep=keep,
            normalise=self.normalise,
            eps=self.eps,
            state=past,
            starts=starts,
        )
        return out, BasedState(sums)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> BasedState:
        F = self.feature_dim
        rows = 1 + F + F * (F + 1) // 2
        return BasedState(torch.zeros(batch_size, self.num_heads, rows, self.head_dim + 1, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, feature_dim={self.feature_dim}, normalise={self.normalise}"

"""Linear attention: phi(q) . phi(k) in place of exp(q . k), so one sum over keys serves all queries."""

from typing import Literal, NamedTuple, Unpack, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan
from regard.linear._shared import RecurrentMixer, feature_attention, hide, repeat_heads, widened
from regard.linear.based import taylor_attention
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "linear",
    equation="""out_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)),   phi(x) = elu(x) + 1
j <= i when causal
streaming:  S <- S + phi(k)^T v,   z <- z + phi(k),   out = phi(q) S / (phi(q) . z)
feature="taylor2":  phi(x) = (1, x, x_a x_b / sqrt(2)) of x = q / sqrt(D) and k, as in `based`""",
    papers=(
        Paper(
            "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
            "Katharopoulos et al.",
            2020,
            "2006.16236",
            "abstract; equations as quoted by others",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN,
    cost=Cost("B*H*(T + S)*D*(D + 1)", "H*D*(D + 1)"),
    claim="A recurrence with a constant state; `python -m benchmarks.linear` measures the time: "
    "tests/linear/test_linear.py::test_it_is_the_recurrence_of_the_paper, "
    "tests/linear/test_linear.py::test_the_state_does_not_grow.",
    differs=("No constant is added to the denominator: it is a sum of positive terms.",),
    verified="reconstructed",
    tasks=("profile",),
    exceptions={"L25": "below -87 exp(k) leaves float32, so gradients through a sum of nothing else are not finite"},
    defaults={"feature": "paper", "bias": "ours", "context_dim": "ours, as wide as dim"},
)

Feature = Literal["elu", "taylor2"]


def linear_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    state: Float[Tensor, "B H D V1"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """Outputs, and the sums over keys: phi(k)^T [v, 1]. Hand them back in as `state` to go on causally.

    `starts` are those of `linear_scan`, where causal.
    """
    check_inputs(q, k, v)
    q, k, v = widened(q, k, v)
    phi_k = repeat_heads(hide(elu_plus_one(k), keep), q.shape[1])
    return feature_attention(
        elu_plus_one(q), phi_k, repeat_heads(v, q.shape[1]), causal=causal, state=state, starts=starts
    )


def elu_plus_one(x: Tensor) -> Tensor:
    """phi: x + 1 above 0, exp(x) below. (The strides of torch's elu differ between compiled and eager code.)"""
    return x.relu() + x.clamp(max=0).exp()


class LinearState(NamedTuple):
    """All the past leaves behind. Its size does not grow."""

    sums: Float[Tensor, "B H D V1"]
    """sum_j phi(k_j)^T [v_j, 1]."""


@CARD.module
class LinearAttention(RecurrentMixer):
    """Multi-head linear attention.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        feature: phi, "elu" for elu + 1, or "taylor2", whose weights are exp's Taylor polynomial of second order; its
            state has 1 + D + D (D + 1) / 2 rows.
    """

    resets = True

    def __init__(self, dim: int, num_heads: int, *, feature: Feature = "elu", **rest: Unpack[Projections]) -> None:
        super().__init__(dim, num_heads, **rest)
        choice(self, get_args(Feature), feature=feature)
        self.feature: Feature = feature

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: LinearState | None,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, LinearState]:
        past = None if state is None else state.sums
        if self.feature == "elu":
            out, sums = linear_attention(q, k, v, causal=self.causal, keep=keep, state=past, starts=starts)
        else:
            out, sums = taylor_attention(q, k, v, causal=self.causal, keep=keep, eps=0.0, state=past, starts=starts)
        return out, LinearState(sums)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LinearState:
        D = self.head_dim
        rows = D if self.feature == "elu" else 1 + D + D * (D + 1) // 2
        return LinearState(torch.zeros(batch_size, self.num_heads, rows, D + 1, device=device, dtype=dtype))

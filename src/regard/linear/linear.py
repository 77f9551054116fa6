"""Linear attention: phi(q) . phi(k) in place of exp(q . k), so one sum over keys serves all queries."""

from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import flag, refuse
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan
from regard.linear._shared import RecurrentMixer, feature_attention, hide, repeat_heads, widened
from regard.linear.features import Feature, FeatureMap, elu_plus_one, feature_map
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "linear",
    equation="""out_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j)),   phi(x) = elu(x) + 1
j <= i when causal
streaming:  S <- S + phi(k)^T v,   z <- z + phi(k),   out = phi(q) S / (phi(q) . z)
other phi: hedgehog, t2r, dpfp, taylor, rebased, hadamard (see regard.linear.features)""",
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
    differs=(
        "No constant is added to the denominator: it is a sum of positive terms.",
        "Other feature maps than elu + 1 are of other papers. Queries and keys have one each, for all heads.",
    ),
    verified="reconstructed",
    tasks=("profile",),
    exceptions={"L25": "below -87 exp(k) leaves float32, so gradients through a sum of nothing else are not finite"},
    tries={"normalise": False},
    defaults={
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
        "feature": "paper",
        "normalise": "paper",
    },
)


def linear_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    state: Float[Tensor, "B H D V1"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    phi_q: Callable[[Tensor], Tensor] = elu_plus_one,
    phi_k: Callable[[Tensor], Tensor] = elu_plus_one,
    normalise: bool = True,
) -> Scan:
    """Outputs, and the sums over keys: phi(k)^T [v, 1]. Hand them back in as `state` to go on causally.

    Args:
        starts: those of `linear_scan`, where causal.
        phi_q, phi_k: the feature maps of queries and keys, D to F numbers.
        normalise: whether weights are divided by their sum; without, the state has no column of ones.
    """
    check_inputs(q, k, v)
    q, k, v = widened(q, k, v)
    keys, values = repeat_heads(hide(phi_k(k), keep), q.shape[1]), repeat_heads(v, q.shape[1])
    more: dict[str, Any] = {"state": state, "starts": starts, "normalise": normalise}
    return feature_attention(phi_q(q), keys, values, causal=causal, **more)


class LinearState(NamedTuple):
    """All the past leaves behind. Its size does not grow."""

    sums: Float[Tensor, "B H F V1"]
    """sum_j phi(k_j)^T [v_j, 1], of F features; without the 1 where nothing is normalised."""


@CARD.module
class LinearAttention(RecurrentMixer):
    """Multi-head linear attention.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        feature: phi, by its name, or a function of D that makes a `FeatureMap`, called for queries and for keys.
        normalise: whether weights are divided by their sum; by default where phi allows, that is, not with "hadamard".
    """

    resets = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature: Feature | Callable[[int], FeatureMap] = "elu",
        normalise: bool | None = None,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        self.q_map, self.k_map = (feature_map(self, feature, self.head_dim) for _ in "qk")
        flag(self, normalise=True if normalise is None else normalise)
        positive = self.q_map.positive and self.k_map.positive
        if normalise and not positive:
            refuse(self, "normalise", "divides by sums that may be 0", True, "False or None with such a feature map")
        self.normalise = positive if normalise is None else normalise

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
        maps: dict[str, Any] = {"phi_q": self.q_map, "phi_k": self.k_map, "normalise": self.normalise}
        out, sums = linear_attention(q, k, v, causal=self.causal, keep=keep, state=past, starts=starts, **maps)
        return out, LinearState(sums)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> LinearState:
        shape = self.num_heads, self.k_map.features, self.head_dim + self.normalise
        return LinearState(torch.zeros(batch_size, *shape, device=device, dtype=dtype))

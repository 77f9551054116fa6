"""cosFormer: linear attention of rectified features that falls with the cosine of the distance."""

import math
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import number, refuse, whole
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan, linear_scan
from regard.kernels.sums import over_keys
from regard.linear._shared import RecurrentMixer, hide, repeat_heads, widened, with_ones
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "cosformer",
    equation="""w_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / N) = phi_i(q_i) . phi_j(k_j)
phi_i(x) = [relu(x) cos(pi i / 2N) ; relu(x) sin(pi i / 2N)]
out_i = sum_j w_ij v_j / max(sum_j w_ij, eps),   j <= i when causal""",
    papers=(
        Paper(
            "cosFormer: Rethinking Softmax in Attention",
            "Qin et al.",
            2022,
            "2202.08791",
            "abstract; reviews by others; the authors' code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits=PLAIN - {"normalised", "position_free"},
    cost=Cost("2*B*H*(T + S)*D*(D + 1)", "2*H*D*(D + 1)"),
    claim="Near keys count for more, by the cosine of their distance, at a cost linear in length: "
    "tests/linear/test_cosformer.py::test_weights_fall_with_the_cosine_of_the_distance.",
    differs=(
        "N is max_length, the most tokens there may be, so that no output depends on how many follow; the authors' "
        "code takes the longer of queries and keys.",
        "relu comes behind the heads are split, with the same result; its other activation, elu + 1, is left out.",
    ),
    verified="third-party",
    example={"max_length": 48},
    defaults={
        "bias": "ours, the authors' code has one",
        "context_dim": "ours, as wide as dim",
        "max_length": "ours",
        "eps": "code",
    },
)


class CosformerState(NamedTuple):
    """All the past leaves behind: sums, and how many tokens there were."""

    sums: Float[Tensor, "B H F V1"]
    """sum_j phi_j(k_j)^T [v_j, 1]."""
    length: int


def placed(x: Float[Tensor, "B H T D"], first: int, max_length: int) -> Float[Tensor, "B H T F"]:
    """phi of tokens that stand at `first` and after it."""
    at = torch.arange(first, first + x.shape[2], device=x.device, dtype=x.dtype)
    angle = (math.pi / 2 / max_length * at)[:, None]
    return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)


def cosformer_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    max_length: int,
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    eps: float = 1e-6,
    first: int = 0,
    state: Float[Tensor, "B H F V1"] | None = None,
) -> Scan:
    """Outputs, and the sums over keys. Hand them back in as `state`, with the place of `first`, to go on causally.

    Args:
        max_length: N; places are below it.
        keep: True at real keys.
        eps: what sums of weights are at least.

    Raises:
        ValueError: shapes that don't fit together, more than N tokens.
    """
    check_inputs(q, k, v)
    who, H = "cosformer_attention", q.shape[1]
    whole(who, max_length=max_length)
    for name, z in (("q", q), ("k", k)):
        if first + z.shape[2] > max_length:
            refuse(who, name, "is too long", f"{first + z.shape[2]} tokens", f"at most max_length = {max_length}")
    q, k, v = widened(q, k, v)
    phi_q, phi_k = placed(q, first, max_length), repeat_heads(hide(placed(k, first, max_length), keep), H)
    v = with_ones(repeat_heads(v, H))
    if causal:
        out, state = linear_scan(phi_q, phi_k, v, state=state)
    else:
        state = over_keys(phi_k.mT, v)
        out = phi_q @ state
    return Scan(out[..., :-1] / out[..., -1:].clamp(min=eps), state)


@CARD.module
class Cosformer(RecurrentMixer):
    """Multi-head linear attention, re-weighted by distance.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        max_length: N, the most tokens that there may be.
        eps: what sums of weights are at least.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int = 2048,
        eps: float = 1e-6,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        whole(self, max_length=max_length)
        number(self, above=0, eps=eps)
        self.max_length, self.eps = max_length, eps

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: CosformerState | None
    ) -> tuple[Tensor, CosformerState]:
        first, past = 0 if state is None else state.length, None if state is None else state.sums
        out, sums = cosformer_attention(
            q, k, v, self.max_length, causal=self.causal, keep=keep, eps=self.eps, first=first, state=past
        )
        return out, CosformerState(sums, first + k.shape[2])

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> CosformerState:
        shape = batch_size, self.num_heads, 2 * self.head_dim, self.head_dim + 1
        return CosformerState(torch.zeros(shape, device=device, dtype=dtype), 0)

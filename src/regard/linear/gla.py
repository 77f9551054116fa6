"""Gated linear attention: what each feature of the keys has gathered fades as every token says."""

import math
from collections.abc import Callable
from typing import Literal, Unpack

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, whole
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import Scan, linear_scan
from regard.linear._scanned import Past, ScannedMixer, widths
from regard.linear._shared import hide, repeat_heads, widened
from regard.shapes import head_shape

CARD = Card(
    "gla",
    equation="""q, k, v = x W_q, x W_k, x W_v;   g_t = log(sigmoid(x_t W_a W_b + b)) / 16, one a key head and feature
S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(D)
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps) * silu(x_t W_g)), each head by itself""",
    papers=(
        Paper(
            "Gated Linear Attention Transformers with Hardware-Efficient Training",
            "Yang, Wang, Shen, Panda, Kim",
            2023,
            "2312.06635",
            "official code (flash-linear-attention)",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*(M*(M + gate_rank + 32*key_expand + 64 + 2.3*D*key_expand) + gate_rank*M*key_expand)", "H*D*D/2"),
    claim="Each token says what is forgotten, so that noise after it fades nothing, where decays that are the same for "
    "all tokens must: tests/linear/test_gla.py::test_a_token_may_empty_the_memory, "
    "tests/linear/test_gla.py::test_it_drops_noise_and_keeps_what_it_was_told_to.",
    differs=("Hidden tokens pass the state on; the authors' code takes padding out of the sequence.",),
    verified="third-party",
    example={"key_expand": 1.0},
    tries={"feature_map": "relu", "min_log_decay": -0.01},
    defaults={
        "key_expand": "code",
        "value_expand": "code",
        "gate_rank": "code",
        "gate_temperature": "code",
        "feature_map": "code",
        "conv_size": "code",
        "gate": "code",
        "min_log_decay": "code",
        "eps": "code",
    },
)

MAPS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda z: z, "relu": F.relu, "silu": F.silu}


@checked()
def gated_linear_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    decay: Float[Tensor, "B G T D"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H D V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """o_t = q_t S_t / sqrt(D), S_t = diag(exp(decay_t)) S_{t-1} + k_t^T v_t, and the last S.

    Each key head, with its decays, serves H / G query heads that follow one another. Hidden tokens pass the state on as
    it is. Sums are in float32 at least.

    Args:
        decay: logarithms, <= 0; -inf forgets all of a feature.
        state: S before the first token; zero by default.
        starts: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    check_inputs(q, k, v)
    H, scale = q.shape[1], 1 / math.sqrt(q.shape[3])
    q, k, v, decay = widened(q, k, v, decay)
    k, v, decay = (repeat_heads(hide(z, keep), H) for z in (k, v, decay))
    return linear_scan(scale * q, k, v, decay, state=state, starts=starts)


@CARD.module
class GatedLinearAttention(ScannedMixer):
    """The token mixer of GLA.

    Args:
        dim, num_heads, num_kv_heads: M, H, and G heads of keys, values and decays.
        key_expand, value_expand: width of all queries, and of all outputs, in terms of M.
        gate_rank: width between the two matrices of the decays.
        gate_temperature: their logarithms are divided by it, so that a new layer forgets little.
        feature_map: what queries and keys go through.
        conv_size: taps of a convolution with silu on queries, keys and values; 0: neither.
        gate: whether silu(x W_g) multiplies what the norm gives.
        min_log_decay: no logarithm is below.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        key_expand: float = 0.5,
        value_expand: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        feature_map: Literal["relu", "silu"] | None = None,
        conv_size: int = 0,
        gate: bool = True,
        min_log_decay: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        who, H = type(self).__name__, num_heads
        D, V = widths(who, dim, H, key_expand=key_expand, value_expand=value_expand)
        G = head_shape(dim, H, num_kv_heads, D, who=who).num_kv_heads
        whole(who, gate_rank=gate_rank)
        number(who, above=0, gate_temperature=gate_temperature)
        choice(who, MAPS, feature_map=feature_map)
        if min_log_decay is not None:
            number(who, most=0, min_log_decay=min_log_decay)
        shape = {"query_heads": H, "key_heads": G, "value_heads": G, "key_dim": D, "value_dim": V}
        super().__init__(dim, H, **shape, conv_size=conv_size, gate=gate, eps=eps)
        self.gate_temperature, self.feature_map, self.min_log_decay = gate_temperature, feature_map, min_log_decay
        self.decay_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, G * D))
        self.reset_parameters()

    def told(self, x: Tensor) -> Tensor:
        return self.decay_proj(x)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        decay = F.logsigmoid(told).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) / self.gate_temperature
        if self.min_log_decay is not None:
            decay = decay.clamp(min=self.min_log_decay)
        features = MAPS[self.feature_map]
        return gated_linear_attention(features(q), features(k), v, decay, **past)

"""Gated DeltaNet: the delta rule on a memory that forgets, by as much as each token says."""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import divides, flag, whole
from regard.kernels.linear_scan import Scan
from regard.linear._recurrence import step_sizes
from regard.linear._scanned import Past, ScannedMixer
from regard.linear.deltanet import delta_rule, unit
from regard.shapes import head_shape
from regard.weights import Loaded, Move, only, same, stacked, woven

CARD = Card(
    "gated_deltanet",
    equation="""q, k, v = silu(conv([x W_q, x W_k, x W_v])),   4 taps;   q, k <- q / |q|, k / |k|
S' = exp(g_t) S_{t-1},   S_t = S' + b_t k_t^T (v_t - k_t S'),   o_t = q_t S_t / sqrt(D)
g_t = -A softplus(x_t w_a + d),   b_t = sigmoid(x_t w_b),   one of each a value head
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps) * silu(x_t W_z)), each head by itself""",
    papers=(
        Paper(
            "Gated Delta Networks: Improving Mamba2 with Delta Rule",
            "Yang, Kautz, Hatamizadeh",
            2024,
            "2412.06464",
            "abstract; official code (flash-linear-attention); transformers' Qwen3-Next layer, whose form it has",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*H*(2*M + M*D + 192*D + 3*D*D)", "H*D*D + 9*M"),
    claim="One token may empty the memory, after which nothing before it is read, and what is written again is "
    "replaced: tests/linear/test_gated_deltanet.py::test_forgetting_comes_before_the_error.",
    differs=("It starts as the authors' code does. transformers' layer has d = 1: most heads forget at once.",),
    verified="third-party",
    tries={"num_key_heads": 3},
    defaults={
        "num_key_heads": "code",
        "value_head_dim": "ours, as wide as keys",
        "conv_size": "code",
        "gate": "code",
        "negative_eigenvalues": "code",
        "eps": "code, transformers",
    },
)


@CARD.module
class GatedDeltaNet(ScannedMixer):
    """The token mixer of Gated DeltaNet, in the form of Qwen3-Next.

    Args:
        dim, num_heads, head_dim: M, H heads of values, and D of queries and keys.
        num_key_heads: heads of queries and of keys; each serves as many value heads that follow one another.
        value_head_dim: V; default D.
        conv_size: taps of the convolution on queries, keys and values; 0: none.
        gate: whether silu(x W_z) multiplies what the norm gives.
        negative_eigenvalues: b is in (0, 2): what stands under a key can change its sign.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    silent = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_key_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        gate: bool = True,
        negative_eigenvalues: bool = False,
        eps: float = 1e-6,
    ) -> None:
        who = type(self).__name__
        D = head_shape(dim, num_heads, None, head_dim, who=who).head_dim
        V = D if value_head_dim is None else value_head_dim
        G = num_heads if num_key_heads is None else num_key_heads
        whole(who, value_head_dim=V, num_key_heads=G)
        divides(who, num_key_heads=G, num_heads=num_heads)
        shape = {"query_heads": G, "key_heads": G, "value_heads": num_heads, "key_dim": D, "value_dim": V}
        super().__init__(dim, num_heads, **shape, conv_size=conv_size, gate=gate, eps=eps)
        flag(self, negative_eigenvalues=negative_eigenvalues)
        self.num_key_heads, self.most = G, 2.0 if negative_eigenvalues else 1.0
        self.rate_proj = nn.Linear(dim, num_heads, bias=False)
        self.decay_proj = nn.Linear(dim, num_heads, bias=False)
        self.log_decay_scale = nn.Parameter(torch.empty(num_heads))
        self.decay_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A between 0.01 and 16, softplus(d) between 0.001 and 0.1; the rest as of every such layer."""
        super().reset_parameters()
        self.log_decay_scale.uniform_(0.01, 16).log_()
        step_sizes(self.decay_bias)

    def told(self, x: Tensor) -> Tensor:
        return torch.cat([self.rate_proj(x), self.decay_proj(x)], -1)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        rate, decay = told.transpose(1, 2).chunk(2, 1)
        g = -self.log_decay_scale.to(decay.dtype).exp()[:, None] * F.softplus(decay + self.decay_bias[:, None])
        return delta_rule(unit(q), unit(k), v, self.most * rate.sigmoid(), g, **past)


OWN = {"norm_weight": "norm.weight", "decay_bias": "dt_bias", "log_decay_scale": "A_log"}


def convolved(widths: tuple[int, int, int]) -> Move:
    """Taps of queries, keys and values that are one convolution of theirs."""

    def load(t: Tensor) -> tuple[Tensor, ...]:
        return t.squeeze(1).split(list(widths))

    taps = ("q_taps", "k_taps", "v_taps")
    return Move(taps, ("conv1d.weight",), load, lambda *parts: [torch.cat(parts).unsqueeze(1)])


def _sizes(theirs: Any) -> tuple[int, int, int, int]:
    return theirs.num_k_heads, theirs.num_v_heads, theirs.head_k_dim, theirs.head_v_dim


def _built(theirs: Any, **options: Any) -> GatedDeltaNet:
    G, H, D, V = _sizes(theirs)
    sizes = {"head_dim": D, "num_key_heads": G, "value_head_dim": V, "conv_size": theirs.conv_kernel_size}
    return GatedDeltaNet(theirs.hidden_size, H, **sizes, **options)


@CARD.loads("transformers", "Qwen3NextGatedDeltaNet")
def _woven(theirs: Any) -> Loaded:
    """Queries, keys, values and gates of each key head follow one another in one projection, rates and decays too."""
    only(theirs, {"activation": "silu"})
    G, H, D, V = _sizes(theirs)
    R = H // G
    moves = [
        *woven(theirs, ("q_proj", "k_proj", "v_proj", "gate_proj"), "in_proj_qkvz", G, (D, D, R * V, R * V)),
        *woven(theirs, ("rate_proj", "decay_proj"), "in_proj_ba", G, (R, R)),
        *same(theirs, {**OWN, "o_proj": "out_proj"}),
        convolved((G * D, G * D, H * V)),
    ]
    return Loaded(lambda: _built(theirs, eps=theirs.layer_norm_epsilon), moves)


@CARD.loads("transformers", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
def _side_by_side(theirs: Any) -> Loaded:
    only(theirs, {"activation": "silu"})
    G, H, D, V = _sizes(theirs)
    names = {"gate_proj": "in_proj_z", "rate_proj": "in_proj_b", "decay_proj": "in_proj_a", "o_proj": "out_proj"}
    widths = (G * D, G * D, H * V)
    moves = [
        *stacked(theirs, ("q_proj", "k_proj", "v_proj"), "in_proj_qkv", widths),
        *same(theirs, {**OWN, **names}),
        convolved(widths),
    ]
    return Loaded(lambda: _built(theirs, eps=theirs.layer_norm_epsilon), moves)

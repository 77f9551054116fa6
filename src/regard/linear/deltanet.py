"""DeltaNet: what is written under a key replaces what stood there, by the delta rule."""

import math
from typing import Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import fits, flag, refuse
from regard.kernels.check import check_inputs
from regard.kernels.delta_scan import delta_scan
from regard.kernels.linear_scan import Scan
from regard.linear._scanned import Past, ScannedMixer, widths
from regard.linear._shared import hide, repeat_heads, widened

CARD = Card(
    "deltanet",
    equation="""q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v)),   4 taps;   q, k <- q / |q|, k / |k|
S_t = S_{t-1} + b_t k_t^T (v_t - k_t S_{t-1}),   o_t = q_t S_t / sqrt(D),   b_t = sigmoid(x_t w_b)
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps)), each head by itself""",
    papers=(
        Paper(
            "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
            "Yang, Wang, Zhang, Shen, Kim",
            2024,
            "2406.06484",
            "official code (layer and naive functions of flash-linear-attention)",
        ),
        Paper(
            "Linear Transformers Are Secretly Fast Weight Programmers",
            "Schlag, Irie, Schmidhuber",
            2021,
            "2102.11174",
            "its rule, in that code",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*H*(M + 192*D + 3*D*D)", "H*D*D + 9*M"),
    claim="A pair that is written again under the same key replaces the first, where linear attention adds them and "
    "softmax takes their mean: tests/linear/test_deltanet.py::test_what_is_written_last_is_read.",
    differs=(
        "Features of Schlag et al. (DPFP), and sums in place of lengths, are left out: silu and unit length are what "
        "the later paper's code has by default.",
    ),
    verified="third-party",
    defaults={
        "key_expand": "code",
        "value_expand": "code",
        "conv_size": "code",
        "gate": "code",
        "negative_eigenvalues": "code",
        "eps": "code",
    },
)


def unit(x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """x / |x|, and 0 for 0."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(
    q: Float[Tensor, "B G T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    decay: Float[Tensor, "B H T"] | Float[Tensor, "B H T D"] | None = None,
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H D V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """o_t = q_t S_t / sqrt(D), S_t = S' + beta_t k_t^T (v_t - k_t S'), S' = exp(decay_t) S_{t-1}, and the last S.

    Each key head serves H / G value heads that follow one another. Hidden tokens pass the state on as it is. Queries
    and keys are taken as they come; sums are in float32 at least.

    Args:
        decay: logarithms, <= 0; None: nothing is forgotten.
        state: S before the first token; zero by default.
        starts: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    H, G = v.shape[1] if v.dim() == 4 else 0, q.shape[1] if q.dim() == 4 else 0
    if G and H and H % G == 0 and k.shape == q.shape:
        k, q = repeat_heads(k, H), repeat_heads(q, H)
    check_inputs(q, k, v)
    B, T = q.shape[0], q.shape[2]
    fits("delta_rule", "B H T", {"B": B, "H": H, "T": T}, beta=beta)
    if decay is not None and decay.shape not in ((B, H, T), k.shape):
        refuse("delta_rule", "decay", "has the wrong shape", tuple(decay.shape), f"{(B, H, T)} or {tuple(k.shape)}")
    q, k, v, beta = widened(q, k, v, beta)
    if keep is not None:
        k, v, beta = hide(k, keep), hide(v, keep), beta.masked_fill(~keep[:, None], 0)
        if decay is not None:
            decay = hide(decay, keep) if decay.dim() == 4 else decay.masked_fill(~keep[:, None], 0)
    return delta_scan(q / math.sqrt(q.shape[3]), k, v, beta, decay, state=state, starts=starts)


@CARD.module
class DeltaNet(ScannedMixer):
    """The token mixer of DeltaNet.

    Args:
        dim, num_heads: M and H.
        key_expand, value_expand: width of all keys, and of all values, in terms of M.
        conv_size: taps of the convolution on queries, keys and values; 0: none.
        gate: whether silu(x W_g) multiplies what the norm gives.
        negative_eigenvalues: b is in (0, 2): what stands under a key can change its sign, which parity needs.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    silent = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_expand: float = 1.0,
        value_expand: float = 1.0,
        conv_size: int = 4,
        gate: bool = False,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ) -> None:
        D, V = widths(type(self).__name__, dim, num_heads, key_expand=key_expand, value_expand=value_expand)
        H = num_heads
        shape = {"query_heads": H, "key_heads": H, "value_heads": H, "key_dim": D, "value_dim": V}
        super().__init__(dim, H, **shape, conv_size=conv_size, gate=gate, eps=eps)
        flag(self, negative_eigenvalues=negative_eigenvalues)
        self.most = 2.0 if negative_eigenvalues else 1.0
        self.rate_proj = nn.Linear(dim, H, bias=False)
        self.reset_parameters()

    def told(self, x: Tensor) -> Tensor:
        return self.rate_proj(x)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        beta = self.most * told.sigmoid().transpose(1, 2)
        return delta_rule(unit(q), unit(k), v, beta, **past)

"""Kimi delta attention: the delta rule on a memory whose features forget each at a rate of its own."""

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
from regard.linear.gated_deltanet import convolved
from regard.shapes import head_shape
from regard.weights import Loaded, only, reshaped, same

CARD = Card(
    "kda",
    equation="""q, k, v = silu(conv([x W_q, x W_k, x W_v])),   4 taps;   q, k <- q / |q|, k / |k|
S' = diag(exp(g_t)) S_{t-1},   S_t = S' + b_t k_t^T (v_t - k_t S'),   o_t = q_t S_t / sqrt(D)
g_t = -A softplus(x_t F_1 F_2 + d), one number a head and key feature;   b_t = sigmoid(x_t w_b), one a head
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps) * sigmoid(x_t G_1 G_2)), each head by itself""",
    papers=(
        Paper(
            "Kimi Linear: An Expressive, Efficient Attention Architecture",
            "Kimi Team",
            2025,
            "2510.26692",
            "abstract; official code (flash-linear-attention), and the layer of transformers' Kimi Linear",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*(H*(M + 2*D*D + 128*D + 3*D*D) + 2*M*D)", "H*D*D + 9*M"),
    claim="Each feature of the keys forgets by itself; with one rate for all of them it is the gated delta rule, and "
    "without errors gated linear attention: tests/linear/test_kda.py::test_each_feature_forgets_by_itself.",
    differs=(
        "The authors' layer has a bias in the second matrix of the gate; the released model, as transformers loads it, "
        "has none, and here there is none.",
        "Where key heads are shared, rates and decays are those of value heads, as in the authors' functions.",
    ),
    verified="third-party",
    tries={"num_key_heads": 3},
    defaults={
        "num_key_heads": "code",
        "value_head_dim": "code",
        "rank": "code",
        "conv_size": "code",
        "negative_eigenvalues": "code",
        "eps": "code",
    },
)


@CARD.module
class KimiDeltaAttention(ScannedMixer):
    """The linear token mixer of Kimi Linear, which has three such layers to one of full attention.

    Args:
        dim, num_heads, head_dim: M, H heads of values, and D of queries and keys.
        num_key_heads: heads of queries and of keys; each serves as many value heads that follow one another.
        value_head_dim: V; default D.
        rank: width between the two matrices of decays, and of the gate; default V.
        conv_size: taps of the convolution on queries, keys and values; 0: none.
        negative_eigenvalues: b is in (0, 2): what stands under a key can change its sign.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    silent = True
    gates = staticmethod(torch.sigmoid)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_key_heads: int | None = None,
        value_head_dim: int | None = None,
        rank: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ) -> None:
        who, H = type(self).__name__, num_heads
        D = head_shape(dim, num_heads, None, head_dim, who=who).head_dim
        V = D if value_head_dim is None else value_head_dim
        G, R = H if num_key_heads is None else num_key_heads, V if rank is None else rank
        whole(who, value_head_dim=V, num_key_heads=G, rank=R)
        divides(who, num_key_heads=G, num_heads=H)
        shape = {"query_heads": G, "key_heads": G, "value_heads": H, "key_dim": D, "value_dim": V}
        super().__init__(dim, H, **shape, conv_size=conv_size, gate=False, eps=eps)
        flag(self, negative_eigenvalues=negative_eigenvalues)
        self.num_key_heads, self.most = G, 2.0 if negative_eigenvalues else 1.0
        self.gate_proj = nn.Sequential(nn.Linear(dim, R, bias=False), nn.Linear(R, H * V, bias=False))
        self.rate_proj = nn.Linear(dim, H, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(dim, R, bias=False), nn.Linear(R, H * D, bias=False))
        self.log_decay_scale = nn.Parameter(torch.empty(H))
        self.decay_bias = nn.Parameter(torch.empty(H * D))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A between 1 and 16, and d so that softplus(d) is between 0.001 and 0.1, even in its logarithm."""
        super().reset_parameters()
        self.log_decay_scale.uniform_(1, 16).log_()
        step_sizes(self.decay_bias)

    def told(self, x: Tensor) -> Tensor:
        return torch.cat([self.rate_proj(x), self.decay_proj(x)], -1)

    def scan(self, q: Tensor, k: Tensor, v: Tensor, told: Tensor, **past: Unpack[Past]) -> Scan:
        H = self.num_heads
        rate, decay = told.split([H, told.shape[-1] - H], -1)
        decay = F.softplus(decay + self.decay_bias).unflatten(-1, (H, -1)).transpose(1, 2)
        g = -self.log_decay_scale.to(decay.dtype).exp()[:, None, None] * decay
        return delta_rule(unit(q), unit(k), v, self.most * rate.sigmoid().transpose(1, 2), g, **past)


@CARD.loads("transformers", "KimiLinearDeltaAttention")
def _kimi(theirs: Any) -> Loaded:
    only(theirs, {"activation": "silu"})
    H, D = theirs.num_heads, theirs.head_dim
    names = {"decay_proj.0": "forget_gate.f_a_proj", "decay_proj.1": "forget_gate.f_b_proj"}
    names |= {"decay_bias": "forget_gate.dt_bias", "gate_proj.0": "g_a_proj", "gate_proj.1": "g_b_proj"}
    names |= {"rate_proj": "b_proj", "norm_weight": "o_norm.weight"} | {f"{n}_proj": f"{n}_proj" for n in "qkvo"}
    scale = reshaped("log_decay_scale", "forget_gate.A_log", lambda t: t.flatten(), lambda t: t.view(1, 1, -1, 1))
    options = {"head_dim": D, "conv_size": theirs.conv_kernel_size, "eps": theirs.layer_norm_epsilon}
    moves = [*same(theirs, names), scale, convolved((H * D, H * D, H * D))]
    return Loaded(lambda: KimiDeltaAttention(theirs.hidden_size, H, **options), moves)

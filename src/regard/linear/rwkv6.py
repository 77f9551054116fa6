"""RWKV-6: a memory of a matrix a head, whose features fade, and inputs mix, as tokens say."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number, whole
from regard.kernels.linear_scan import Scan, linear_scan
from regard.linear._recurrence import token_before
from regard.linear._rwkv import TimeMixer, ramp, standard, zigzag
from regard.linear._shared import hide, widened
from regard.shapes import head_shape
from regard.tracing import as_it_is

CARD = Card(
    "rwkv6",
    equation="""d = x_{t-1} - x_t,   x^z = x_t + d * (m_z + tanh((x_t + d * m_x) A_z) B_z)   for z = w, k, v, r, g
k, v, r, g = x^k W_k, x^v W_v, x^r W_r, x^g W_g;   w_t = exp(w_0 + tanh(x^w A) B) > 0
o_t = r_t (S_{t-1} + diag(u) k_t^T v_t),   S_t = diag(exp(-w_t)) S_{t-1} + k_t^T v_t           (each head)
y_t = W_o (group_norm(o_t) * silu(g_t)), each head by itself""",
    papers=(
        Paper(
            "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
            "Peng et al.",
            2024,
            "2404.05892",
            "abstract; official code (RWKV-v5/src/model.py, x060); plain loop of flash-linear-attention",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*(M*(10*mix_rank + decay_rank + min(1, channel_mix)*M + 2*channel_mix)"
        " + H*D*(2*M + decay_rank + 98 + 2.4*D))",
        "H*D*D + M*(1 + min(1, channel_mix))",
    ),
    claim="Each token says what is forgotten: one that opens all decays makes what follows independent of what came "
    "before: tests/linear/test_rwkv6.py::test_a_token_may_empty_the_memory.",
    differs=(
        "Matrices start as torch's do, where the released code starts those of receptance and output at 0.",
        "Heads are given by their number; those of the released models are 64 wide.",
        "Keys and values are of one width, as in the official code; `wkv6` takes any.",
    ),
    verified="third-party",
    example={"layers": 4, "layer": 2, "mix_rank": 3, "decay_rank": 4, "channel_mix": 40},
    tries={"layers": {"layers": 5, "layer": 2}, "layer": {"layers": 4, "layer": 3}},
    defaults={
        "layers": "ours, one",
        "layer": "ours, the first",
        "mix_rank": "code",
        "decay_rank": "code",
        "channel_mix": "ours, none; the released models' is 3.5 M",
        "eps": "code",
    },
)


@checked()
def wkv6(
    r: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    decay: Float[Tensor, "B H T D"],
    bonus: Float[Tensor, "H D"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: Float[Tensor, "B H D V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Scan:
    """o_t = r_t (S_{t-1} + diag(bonus) k_t^T v_t), S_t = diag(exp(decay_t)) S_{t-1} + k_t^T v_t, and the last S.

    Hidden tokens pass the state on as it is. In at least float32.

    Args:
        decay: logarithms, <= 0; -inf forgets all of a feature.
        state: S before the first token; zero by default.
        starts: those of `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    r, k, v, decay, bonus = widened(r, k, v, decay, bonus)
    k, v, decay = (hide(z, keep) for z in (k, v, decay))
    own = (r * bonus[:, None] * k).sum(-1, keepdim=True) * v
    # What a token reads is the state before it: that of keys, values and decays one place later.
    before = [F.pad(z, (0, 0, 1, 0))[:, :, :-1] for z in (k, v, decay)]
    if starts is not None:
        before[0] = before[0].masked_fill(starts[:, None, :, None], 0)
    out, state = linear_scan(r, *before, state=state, starts=starts)
    if r.shape[2]:
        state = decay[:, :, -1, :, None].exp() * state + k[:, :, -1, :, None] * v[:, :, -1, None]
    return Scan(out + own, state)


def _linear(x: Float[Tensor, "*n I"], layer: nn.Linear) -> Float[Tensor, "*n O"]:
    """In x's dtype: what decides on decays is not rounded to half precision."""
    return F.linear(x, layer.weight.to(x.dtype))


class RWKV6State(NamedTuple):
    """All the past leaves behind, whatever its length."""

    s: Float[Tensor, "B H D V"]
    last: Float[Tensor, "B one M"]
    """The last token, for the time mix."""
    channel: Float[Tensor, "B any M"]
    """The same for the channel mix; none without one."""


@CARD.module
class RWKV6(TimeMixer):
    """The time mix of RWKV-6, or a whole block.

    Args:
        dim, num_heads, head_dim: M, H, and D, the width of a head's keys and values; default M / H.
        layers, layer: L, and which of them this is, from 0; starting values depend on both.
        mix_rank, decay_rank: widths between the two matrices of each share, and of the decays.
        channel_mix: width of the channel mix of a whole block, x <- x + time_mix(LN(x)), x <- x + channel_mix(LN(x)).
            0: the time mix alone, with neither norm nor residual.
        eps: of the group norm.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        layers: int = 1,
        layer: int = 0,
        mix_rank: int = 32,
        decay_rank: int = 64,
        channel_mix: int = 0,
        eps: float = 64e-5,
    ) -> None:
        super().__init__(dim, layers=layers, layer=layer, channel_mix=channel_mix)
        whole(self, mix_rank=mix_rank, decay_rank=decay_rank)
        number(self, least=0, eps=eps)
        self.num_heads, self.head_dim = num_heads, head_shape(dim, num_heads, None, head_dim, who="RWKV6").head_dim
        self.eps, width = eps, num_heads * self.head_dim
        self.mix_x = nn.Parameter(torch.empty(dim))
        self.mix = nn.Parameter(torch.empty(5, dim))
        self.mix_down = nn.Linear(dim, 5 * mix_rank, bias=False)
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim))
        self.log_rate = nn.Parameter(torch.empty(width))
        self.decay_down = nn.Linear(dim, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, width, bias=False)
        self.bonus = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, width, bias=False)
        self.r_proj = nn.Linear(dim, width, bias=False)
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.o_proj = nn.Linear(width, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Nothing depends on the token yet; later channels forget faster and look less at the token before."""
        (deep, rest), c = self.depth, ramp(self.mix_x)
        same, half = c.pow(rest), c.pow(rest / 2)
        self.mix_x.copy_(1 - same)
        self.mix.copy_(1 - torch.stack([same, same, same + 0.3 * deep, half, half]))
        at = ramp(self.log_rate, 1)
        self.log_rate.copy_(-6 + 5 * at.pow(0.7 + 1.3 * deep))
        self.bonus.copy_((deep * (1 - at) + 0.1 * zigzag(at)).view_as(self.bonus))
        for down, up in ((self.mix_down, self.mix_up), (self.decay_down, self.decay_up.weight)):
            nn.init.zeros_(down.weight)
            nn.init.uniform_(up, -0.01, 0.01)
        nn.init.constant_(self.norm_weight, ((1 + self.layer) / self.layers) ** 0.7)
        nn.init.zeros_(self.norm_bias)
        if self.ffn is not None:
            self.ffn.start(rest**3)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, head_dim={self.head_dim}, layer {self.layer} of {self.layers}"

    def time_mix(
        self, x: Tensor, state: RWKV6State | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, RWKV6State]:
        s, past = (None, None) if state is None else state[:2]
        with as_it_is(x.device):
            (wide,) = widened(x)
            before, last = token_before(wide, state=past, keep=keep, starts=starts)
            probe = torch.lerp(wide, before, self.mix_x.to(wide.dtype))
            low = torch.tanh(_linear(probe, self.mix_down)).unflatten(-1, (5, -1)).permute(2, 0, 1, 3)
            shares = self.mix[:, None, None] + low @ self.mix_up[:, None].to(low.dtype)
            mixed = torch.lerp(wide, before, shares.to(wide.dtype))
            faded = _linear(torch.tanh(_linear(mixed[0], self.decay_down)), self.decay_up)
            for_k, for_v, for_r, for_g = mixed[1:].to(self.mix.dtype)
        k, v, r, g = self.k_proj(for_k), self.v_proj(for_v), self.r_proj(for_r), self.gate_proj(for_g)
        with as_it_is(x.device):
            decay = -(faded + self.log_rate).exp()
            heads = [z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (r, k, v, decay)]
            out, s = wkv6(heads[0], heads[1], heads[2], heads[3], self.bonus, keep=keep, state=s, starts=starts)
            out = self.normed(out) * F.silu(g)
        return self.o_proj(out.to(g.dtype)), RWKV6State(s, last, last[:, :0])

    def normed(self, out: Float[Tensor, "B H T V"]) -> Float[Tensor, "B T A"]:
        """Each head less its mean, over its deviation."""
        return standard(out, self.eps).transpose(1, 2).flatten(2) * self.norm_weight + self.norm_bias

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> RWKV6State:
        s = torch.zeros(batch_size, self.num_heads, self.head_dim, self.head_dim, device=device, dtype=dtype)
        last = torch.zeros(batch_size, 1, self.dim, device=device, dtype=dtype)
        return RWKV6State(s, last, last[:, : min(1, self.channel_mix)].clone())

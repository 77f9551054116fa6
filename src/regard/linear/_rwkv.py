"""What RWKV layers share: inputs mixed with those of the token before, and the channel mix behind the time mix."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import whole
from regard.linear._recurrence import Recurrence, token_before
from regard.linear._shared import widened
from regard.tracing import as_it_is


def mixed(
    x: Float[Tensor, "B T M"],
    shares: tuple[Float[Tensor, " M"], ...],
    *,
    state: Float[Tensor, "B one M"] | None,
    keep: Bool[Tensor, "B T"] | None,
    starts: Bool[Tensor, "#B T"] | None,
) -> tuple[list[Float[Tensor, "B T M"]], Float[Tensor, "B one M"]]:
    """m x_t + (1 - m) x_{t-1} for each share m, in the shares' dtype, and the last token."""
    with as_it_is(x.device):
        (wide,) = widened(x)
        before, last = token_before(wide, state=state, keep=keep, starts=starts)
        return [torch.lerp(before, wide, m.to(wide.dtype)).to(m.dtype) for m in shares], last


class ChannelMix(nn.Module):
    """W_v relu(W_k (x mixed by m_k))^2, times sigmoid(W_r (x mixed by m_r)).

    Args:
        dim, width: M, and the width in between.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        whole("ChannelMix", dim=dim, width=width)
        self.mix_k = nn.Parameter(torch.empty(dim))
        self.mix_r = nn.Parameter(torch.empty(dim))
        self.in_proj = nn.Linear(dim, width, bias=False)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.start(1.0)

    @torch.no_grad()
    def start(self, power: float) -> None:
        """Shares (c / M)^power: higher channels look less at the token before."""
        for p in (self.mix_k, self.mix_r):
            p.copy_(ramp(p).pow(power))

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        state: Float[Tensor, "B one M"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
        starts: Bool[Tensor, "#B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B one M"]]:
        """The output, and the last token."""
        (k, r), last = mixed(x, (self.mix_k, self.mix_r), state=state, keep=keep, starts=starts)
        return torch.sigmoid(self.gate_proj(r)) * self.out_proj(F.relu(self.in_proj(k)).square()), last


class TimeMixer(Recurrence):
    """A time mix, alone or as the first half of a block. Subclasses give `time_mix` and the starting values.

    Args:
        dim: M.
        layers, layer: L, and which of them this is, from 0; starting values depend on both.
        channel_mix: width of the channel mix of a whole block, x <- x + time_mix(LN(x)), x <- x + channel_mix(LN(x)).
            0: the time mix alone, with neither norm nor residual.
    """

    def __init__(self, dim: int, *, layers: int, layer: int, channel_mix: int) -> None:
        super().__init__()
        whole(self, dim=dim, layers=layers)
        whole(self, 0, most=layers - 1, layer=layer)
        whole(self, 0, channel_mix=channel_mix)
        self.dim, self.layers, self.layer = dim, layers, layer
        self.channel_mix = channel_mix
        self.ffn = ChannelMix(dim, channel_mix) if channel_mix else None
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)) if channel_mix else None

    @property
    def depth(self) -> tuple[float, float]:
        """How deep the layer stands, 0 to 1, and what is above it, 1 to nearly 0."""
        return self.layer / max(1, self.layers - 1), 1 - self.layer / self.layers

    def time_mix(self, x: Tensor, state: Any, keep: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Any]:
        """As `run`; the state's entry `channel`, of no token, is not its own."""
        raise NotImplementedError

    def run(self, x: Tensor, state: Any, keep: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Any]:
        if self.ffn is None or self.norms is None:
            return self.time_mix(x, state, keep, starts)
        first, second = (cast(nn.LayerNorm, norm) for norm in self.norms)
        out, after = self.time_mix(_normed(first, x), state, keep, starts)
        x = x + out
        out, last = self.ffn(_normed(second, x), None if state is None else state.channel, keep, starts)
        return (x + out).to(out.dtype), after._replace(channel=last)


def standard(z: Float[Tensor, "*n V"], eps: float) -> Float[Tensor, "*n V"]:
    """z less its mean, over its deviation. The mean goes first: torch's takes it off last, from what was multiplied."""
    z = z - z.mean(-1, keepdim=True)
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def _normed(norm: nn.LayerNorm, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
    """In at least float32: rounded once only, when it is mixed with the token before."""
    with as_it_is(x.device):
        wide, weight, bias = widened(x, norm.weight, norm.bias)
        return standard(wide, norm.eps) * weight + bias


def ramp(like: Float[Tensor, " n"], last: int = 0) -> Float[Tensor, " n"]:
    """c / n for c = 0 .. n - 1, or c / (n - last)."""
    n = len(like)
    return torch.arange(n, device=like.device, dtype=torch.float32) / max(1, n - last)


def zigzag(like: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """0, 1, -1 over and over."""
    return (torch.arange(len(like), device=like.device, dtype=torch.float32) + 1) % 3 - 1

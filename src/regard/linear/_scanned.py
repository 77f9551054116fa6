"""What layers around a scan share: a short convolution before it, and behind it a norm for each head and a gate."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import flag, number, refuse, whole
from regard.kernels.linear_scan import Scan
from regard.linear._recurrence import conv_of_real
from regard.linear._shared import RecurrentMixer, widened


class ScanState(NamedTuple):
    """All that the past leaves behind. Its size does not grow."""

    kv: Float[Tensor, "B H K V"]
    inputs: Float[Tensor, "B past C"]
    """The last inputs of the convolution, queries', keys' and values' side by side; none without one."""


class Past(TypedDict):
    """What a scan is told beside its tokens: which are real, what came before, and where documents start."""

    keep: Bool[Tensor, "B T"] | None
    state: Float[Tensor, "B H K V"] | None
    starts: Bool[Tensor, "#B T"] | None


class ScannedMixer(RecurrentMixer):
    """Projections, a short convolution with silu, a scan, RMS norm per head, gate, projection.

    Subclasses give `scan`. `split` hands on what gates, what else the scan reads, and all that is convolved,
    as if of one head.

    Args:
        dim, num_heads: M, and H heads that are read.
        query_heads, key_heads, value_heads: how many of each are projected; they divide H.
        key_dim, value_dim: D and V, of each head.
        conv_size: taps of the convolution; 0: none.
        gate: whether a projection of the token, `gate_proj`, gates what is read.
        eps: of the root mean square.
    """

    resets = True
    gates: Callable[[Tensor], Tensor] = staticmethod(F.silu)
    """What the gate goes through."""
    silent = False
    """Whether silu is there without a convolution, too."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        query_heads: int,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv_size: int,
        gate: bool,
        eps: float,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=key_heads, head_dim=key_dim, causal=True)
        whole(self, 0, conv_size=conv_size)
        number(self, least=0, eps=eps)
        flag(self, gate=gate)
        H = num_heads
        self.value_dim, self.conv_size, self.eps = value_dim, conv_size, eps
        self.widths = (query_heads * key_dim, key_heads * key_dim, value_heads * value_dim)
        if query_heads != H:
            self.q_proj = nn.Linear(dim, self.widths[0], bias=False)
        if (value_heads, value_dim) != (key_heads, key_dim):
            self.v_proj = nn.Linear(dim, self.widths[2], bias=False)
        if value_dim != key_dim:
            self.o_proj = nn.Linear(H * value_dim, dim, bias=False)
        for name, width in zip("qkv", self.widths):
            taps = nn.Parameter(torch.empty(width, conv_size)) if conv_size else None
            self.register_parameter(f"{name}_taps", taps)
        self.norm_weight = nn.Parameter(torch.empty(value_dim))
        self.gate_proj: nn.Module | None = nn.Linear(dim, H * value_dim, bias=False) if gate else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Taps as torch starts a convolution of each channel by itself, norms at 1; projections reset themselves."""
        for name in "qkv":
            taps = getattr(self, f"{name}_taps")
            if taps is not None:
                nn.init.uniform_(taps, -1 / math.sqrt(self.conv_size), 1 / math.sqrt(self.conv_size))
        nn.init.ones_(self.norm_weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, value_dim={self.value_dim}, conv_size={self.conv_size}"

    def gated(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T HV"]:
        """Logits of the gate; of no width without one."""
        return x[..., :0] if self.gate_proj is None else self.gate_proj(x)

    def told(self, x: Float[Tensor, "B T M"]) -> Tensor:
        """What else the scan reads of each token: logits of decays, of rates. Of no width: nothing."""
        return x[..., :0]

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        return self.gated(x)[:, None], self.told(x)[:, None], mixed[:, None]

    def scan(
        self,
        q: Float[Tensor, "B Hq T D"],
        k: Float[Tensor, "B Hk T D"],
        v: Float[Tensor, "B Hv T V"],
        told: Float[Tensor, "B T any"],
        **past: Unpack[Past],
    ) -> Scan:
        """What is read from the state, and the state after these tokens."""
        raise NotImplementedError

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor | None,
        state: Any,
        *,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        gate, told, mixed = (z[:, 0] for z in widened(q, k, v))
        inputs = mixed[:, :0]
        if self.conv_size:
            taps = torch.cat([getattr(self, f"{name}_taps") for name in "qkv"]).to(mixed.dtype)
            past = None if state is None else state.inputs
            mixed, inputs = conv_of_real(mixed, taps, state=past, keep=keep, starts=starts)
        if self.conv_size or self.silent:
            mixed = F.silu(mixed)
        if keep is not None:
            mixed = mixed.masked_fill(~keep[..., None], 0)
        parts = zip(mixed.split(self.widths, -1), (self.head_dim, self.head_dim, self.value_dim))
        heads = [z.unflatten(-1, (-1, width)).transpose(1, 2) for z, width in parts]
        kept = None if state is None else state.kv
        out, kv = self.scan(heads[0], heads[1], heads[2], told, keep=keep, state=kept, starts=starts)
        return self.normed(out, gate), ScanState(kv, inputs)

    def normed(self, out: Float[Tensor, "B H T V"], gate: Float[Tensor, "B T any"]) -> Float[Tensor, "B H T V"]:
        """Each head over its own root mean square, times its weight and its gate."""
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + self.eps) * self.norm_weight.to(out.dtype)
        if self.gate_proj is None:
            return out
        return out * type(self).gates(gate.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        kv = torch.zeros(batch_size, self.num_heads, self.head_dim, self.value_dim, device=device, dtype=dtype)
        past = max(0, self.conv_size - 1)
        return ScanState(kv, torch.zeros(batch_size, past, sum(self.widths), device=device, dtype=dtype))


def widths(who: object, dim: int, num_heads: int, **expand: float) -> list[int]:
    """Widths of a head, for each such times M over all heads; refused where that is no whole number."""
    whole(who, dim=dim, num_heads=num_heads)
    found = []
    for name, times in expand.items():
        number(who, above=0, **{name: times})
        width = round(dim * times)
        if width % num_heads or width == 0 or not math.isclose(width, dim * times):
            refuse(who, name, f"gives {num_heads} heads no whole width", times, f"{dim} * {name} a multiple of it")
        found.append(width // num_heads)
    return found

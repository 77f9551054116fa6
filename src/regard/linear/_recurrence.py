"""Causal layers that are one recurrence and have no queries, keys and values of their own: what all of them do."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import tokens
from regard.kernels.short_conv import Convolved, short_conv
from regard.linear._shared import first_state, next_tokens
from regard.masks import Mask, causal, padding
from regard.pipeline.tokens import key_mask, quarantine, spoil


class Recurrence(nn.Module):
    """A causal TokenMixer with a state of constant size. Subclasses give `run` and `empty_state`.

    Hidden tokens leave nothing behind, wherever they stand: not in sums, and not in convolutions, which read the last
    real tokens.
    """

    dim: int
    causal = True

    def run(
        self,
        x: Float[Tensor, "B T M"],
        state: Any,
        keep: Bool[Tensor, "B T"] | None,
        starts: Bool[Tensor, "#B T"] | None,
    ) -> tuple[Float[Tensor, "B T M"], Any]:
        """The mechanism, from `state` (None = nothing seen) to the state after these tokens.

        `keep` is True at real tokens, `starts` at the first one of each packed document. x is finite.
        """
        raise NotImplementedError

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """What `run` has seen before any token; a named tuple, its first entry with the batch first."""
        raise NotImplementedError

    def receptive_field(self) -> Mask:
        """Every earlier token."""
        return causal()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens from all states: `regard.masks.padding`, or True = a real token."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        starts, allowed = None, causal()
        if packed is not None:
            B, T = x.shape[:2]
            starts, keep, allowed = packed.places(T) == 0, packed.real(B, T, keep), allowed & packed
        x, bad = quarantine(x, always=packed is not None)
        out = self.run(x, None, keep, starts)[0]
        return spoil(out, bad, bad, allowed if keep is None else allowed & padding(keep))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before any token. Its size is the same for every `capacity`; sums are kept in float32 at least."""
        return first_state(self, batch_size, capacity, device, dtype)

    def step(
        self, x: Float[Tensor, "B t M"], state: Any, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], Any]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t. Hidden ones leave nothing behind.
        """
        return self.run(next_tokens(self, x, state, mask), state, mask, None)


def conv_of_real(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C K"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    state: Float[Tensor, "B past C"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Convolved:
    """`short_conv` along the real tokens alone, as if no hidden one stood between them; 0 at hidden ones.

    The state then holds real inputs behind padding on the right, too, and decoding goes on from there.
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if keep is None:
        return short_conv(x, weight, bias, state=state, starts=starts)
    T, past = x.shape[1], weight.shape[1] - 1
    order = torch.where(keep, 0, 1).argsort(dim=1, stable=True)  # real ones first, as they come
    if starts is not None:
        document = starts.long().cumsum(1).expand(len(x), -1).gather(1, order)
        starts = F.pad(document.diff(dim=1) != 0, (1, 0), value=True)[:, :T]
    out, _ = short_conv(_taken(x, order), weight, bias, state=state, starts=starts)
    before = x.new_zeros(len(x), past, x.shape[2]) if state is None else state.to(x.dtype)
    seen = torch.cat([before, _taken(x.masked_fill(~keep[..., None], 0), order)], 1)
    last = _taken(seen, keep.sum(1, keepdim=True) + torch.arange(past, device=x.device))
    return Convolved(_taken(out, order.argsort(dim=1)).masked_fill(~keep[..., None], 0), last)


def token_before(
    x: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B one C"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Convolved:
    """The real token before each one, 0 before the first of a document; and the last, which the next ones need."""
    taps = x.new_tensor([1.0, 0.0]).expand(x.shape[2], 2)
    return conv_of_real(x, taps, state=state, keep=keep, starts=starts)


def _taken(x: Float[Tensor, "B T C"], at: Tensor) -> Float[Tensor, "B n C"]:
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def torch_taps(weight: Tensor, bias: Tensor | None = None) -> None:
    """As torch starts a convolution of each channel by itself."""
    for p in (weight, bias):
        if p is not None:
            nn.init.uniform_(p, -1 / math.sqrt(weight.shape[-1]), 1 / math.sqrt(weight.shape[-1]))


def step_sizes(bias: Tensor, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> None:
    """Biases of which the softplus is log-uniform in [low, high]: how long a step each channel takes at the start."""
    with torch.no_grad():
        dt = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))

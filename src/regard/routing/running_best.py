"""The w keys of largest score so far, the same for all queries of a head: who is in, and attention to them."""

import heapq
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.check import check_inputs
from regard.kernels.native import build
from regard.kernels.native import listed as native
from regard.masks import Mask, causal, padding
from regard.masks.lists import Lasting
from regard.pipeline.function import attention
from regard.tracing import exporting, readable, transformed

CHUNK = 512
"""Queries worked on together once keys must go, where nobody may look at the scores."""
FEW = 64
"""Queries up to which a mask of all pairs is as quick as finding out how long each key is seen."""


class DynamicMaskState(NamedTuple):
    """The keys that later queries may see, in order."""

    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n V"]
    delta: Float[Tensor, "B G n"]
    held: Bool[Tensor, "B G n"]
    """False for hidden tokens."""
    length: int
    """Tokens so far."""


def standing(
    delta: Float[Tensor, "B G m"], real: Bool[Tensor, "B G m"], new: int, window: int
) -> tuple[Bool[Tensor, "B G C m"], Bool[Tensor, "B G m"]]:
    """Of m keys in order, the last C = `new` of which come one by one with their queries: which each query sees, and
    which are among the best `window` of all."""
    m, at = delta.shape[-1], torch.arange(delta.shape[-1], device=delta.device)
    delta = delta.masked_fill(~real, -torch.inf)
    order = (m - 1) - delta.flip(-1).argsort(dim=-1, descending=True, stable=True)  # of equals, the latest first
    place = order.argsort(dim=-1)
    mine, theirs = delta[..., m - new :, None], delta[..., None, :]
    beats = (mine > theirs) | ((mine == theirs) & (at[m - new :, None] > at))
    beaten = beats.to(torch.int32).cumsum(-2)  # by how many of those that have come
    ahead = place.unsqueeze(-2) - beaten[..., -1:, :] + beaten
    seen = (ahead < window) & (at <= at[m - new :, None]) & real.unsqueeze(-2)
    return seen, place < window


def lasting(delta: Float[Tensor, "B G m"], real: Bool[Tensor, "B G m"], window: int) -> Int[Tensor, "B G m"]:
    """Of m keys that come one by one, the place of the one with which each goes; m if it stays, 0 if it is hidden.

    A key that has gone does not come back, so one heap of the best is all that is needed.
    """
    if not build.why_not():
        return native.lasting(delta, real, window)
    m, rows = delta.shape[-1], []
    for values, there in zip(delta.flatten(0, 1).tolist(), real.flatten(0, 1).tolist(), strict=True):
        until, heap = [m if is_real else 0 for is_real in there], list[tuple[float, int]]()
        for s in filter(there.__getitem__, range(m)):
            heapq.heappush(heap, (math.inf if math.isnan(values[s]) else values[s], s))
            if len(heap) > window:
                until[heapq.heappop(heap)[1]] = s
        rows.append(until)
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(delta.shape)


def dynamic_mask_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    delta: Float[Tensor, "B G T"],
    keep: Bool[Tensor, "B T"] | None = None,
    *,
    window: int,
    dropout: float = 0.0,
    state: DynamicMaskState | None = None,
) -> tuple[Float[Tensor, "B H T V"], DynamicMaskState]:
    """Causal attention to the `window` keys of largest delta so far, delta added to scores; and the state after it.

    Args:
        keep: True = a real token.
    """
    check_inputs(q, k, v)
    (B, H, T, _), G = q.shape, k.shape[1]
    real = q.new_ones(B, G, T, dtype=torch.bool) if keep is None else keep[:, None].expand(-1, G, -1)
    delta = delta.masked_fill(~real, -1.0)  # no 0 beside the ones of exp(0): terms of 0 and 1 are taken for a mask
    fresh = DynamicMaskState(k[:, :, :0], v[:, :, :0], delta[..., :0], real[..., :0], 0)
    past = fresh if state is None else state._replace(k=state.k.to(k.dtype), v=state.v.to(v.dtype))

    def attend(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, mask: Mask | Tensor) -> Tensor:
        most = torch.finfo(q.dtype).max / 4
        bias = delta.clamp(-most, most).to(q.dtype).repeat_interleave(H // G, 1).unsqueeze(-2)
        return attention(q, k, v, mask=mask, bias=bias, dropout=dropout)

    if readable(q, k, v, delta) and delta.is_cpu and T > FEW and past.k.shape[2] + T > window:
        k_, v_ = (torch.cat([old, z], 2) for old, z in ((past.k, k), (past.v, v)))
        delta_, real_ = torch.cat([past.delta, delta], -1), torch.cat([past.held, real], -1)
        until = lasting(delta_.detach(), real_, window)
        out = attend(q, k_, v_, delta_, causal() & Lasting(until.repeat_interleave(H // G, 1)))
        last = until == until.shape[-1]
        return out, left(DynamicMaskState(k_, v_, delta_, real_ & last, past.length + T), last, window)

    outs: list[Tensor] = []
    done = 0
    while done < T or (T == 0 and not outs):
        room = window - past.k.shape[2]
        size = T - done if exporting() else min(T - done, room if room > 0 else CHUNK)
        at = slice(done, done + size)
        k_, v_ = (torch.cat([old, z[:, :, at]], 2) for old, z in ((past.k, k), (past.v, v)))
        delta_, real_ = torch.cat([past.delta, delta[..., at]], -1), torch.cat([past.held, real[..., at]], -1)
        n = past.k.shape[2]
        mask: Mask | Tensor
        stays: Tensor | None = None
        if not exporting() and size <= room and n == 0:
            mask = causal() if keep is None else causal() & padding(keep[:, at])
        else:
            seen, stays = standing(delta_.detach(), real_, size, window)
            mask = seen.repeat_interleave(H // G, 1)
        again = torch.is_grad_enabled() and size < T and not transformed(q, k, v, delta)
        given = (q[:, :, at], k_, v_, delta_, mask)
        if again:  # keys gathered for each chunk are many times the inputs
            outs.append(checkpoint(attend, *given, use_reentrant=False, preserve_rng_state=dropout > 0))
        else:
            outs.append(attend(*given))
        past, done = DynamicMaskState(k_, v_, delta_, real_, past.length + size), done + size
        if stays is not None and not exporting() and k_.shape[2] > window:
            past = left(past, stays, window)
    return torch.cat(outs, 2), past


def left(state: DynamicMaskState, stays: Bool[Tensor, "B G m"], window: int) -> DynamicMaskState:
    """The state with `window` keys, those that stay among them."""
    best = (~stays).to(torch.int8).argsort(dim=-1, stable=True)[..., :window].sort(-1).values
    k, v = (z.gather(2, best[..., None].expand(-1, -1, -1, z.shape[3])) for z in (state.k, state.v))
    return state._replace(k=k, v=v, delta=state.delta.gather(2, best), held=state.held.gather(2, best))

"""What Infini-attention does with segments: all of them at once, or a few tokens more."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.delta_scan import all_states
from regard.linear._shared import hide, repeat_heads
from regard.linear.linear import elu_plus_one
from regard.masks import causal
from regard.pipeline.function import attention
from regard.positions._shared import angles
from regard.positions.rotary import rotate
from regard.tracing import exporting

LEAST = 1e-10
"""No denominator of the memory is below."""


class InfiniState(NamedTuple):
    """The memory, and the segment that is not full yet."""

    sums: Float[Tensor, "B G D V1"]
    """M and z side by side: what segments that are over have left."""
    pending: Float[Tensor, "B G D V1"]
    """What the open segment will add."""
    k: Float[Tensor, "B G n D"]
    """Keys of the open segment, rotated; n grows up to a segment's length."""
    v: Float[Tensor, "B G n V"]
    filled: Int[Tensor, " B"]
    """Tokens in the open segment."""
    past: Bool[Tensor, " B"]
    """Whether any segment is over."""

    def closed(self) -> "InfiniState":
        """The state in which the open segment, however short, is over: the next token begins another."""
        sums, none = self.sums + self.pending, torch.zeros_like(self.pending)
        return self._replace(sums=sums, pending=none, filled=0 * self.filled, past=self.past | (self.filled > 0))


def read(phi: Float[Tensor, "*b n D"], sums: Float[Tensor, "*b D V1"]) -> Float[Tensor, "*b n V"]:
    """phi M / (phi z): a mean of the values that the memory holds; 0 where it is empty."""
    out = phi @ sums
    return out[..., :-1] / out[..., -1:].clamp(min=LEAST)


def added(
    phi: Float[Tensor, "*b n D"], v: Float[Tensor, "*b n V"], sums: Float[Tensor, "*b D V1"], *, delta: bool
) -> Float[Tensor, "*b D V1"]:
    """What these keys and values add to the memory; with `delta`, what they say that is not in it yet."""
    return phi.mT @ torch.cat([v - read(phi, sums) if delta else v, torch.ones_like(v[..., :1])], -1)


def all_segments(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, w: Tensor | None, keep: Tensor | None, segment: int, delta: bool
) -> Float[Tensor, "B H T V"]:
    """All segments at once; hidden tokens go behind the real ones."""
    T, H, order = q.shape[2], q.shape[1], None
    count: Tensor | int = T
    if keep is not None:
        order = (~keep).long().argsort(dim=1, stable=True)
        q, k, v = (_taken(z, order) for z in (q, hide(k, keep), hide(v, keep)))
        count = keep.sum(1)[:, None]
    one = not exporting() and segment >= T
    C = max(1, T) if one else segment
    qs, ks, vs = (in_blocks(z, C, 2) for z in (q, k, v))
    at = torch.arange(C, device=q.device)
    rotated = (z.transpose(1, 2).flatten(0, 1) for z in (_turned(qs, at, w), _turned(ks, at, w), vs))
    out = attention(*rotated, mask=causal()).unflatten(0, (len(q), qs.shape[2])).transpose(1, 2)
    if not one:
        places = torch.arange(qs.shape[2] * C, device=q.device).expand(len(q), -1)
        real = (places < count).unflatten(1, (-1, C))[:, None, :, :, None]
        before = _memories(elu_plus_one(ks).masked_fill(~real, 0), vs, delta)
        memory = read(elu_plus_one(qs), repeat_heads(before, H))
        later = torch.arange(qs.shape[2], device=q.device)[:, None, None] > 0
        gate = gate[:, None]
        out = torch.where(later, gate * out + (1 - gate) * memory, out)
    out = from_blocks(out, T, 2)
    return out if order is None else _taken(out, order.argsort(dim=1))


def _memories(phi: Float[Tensor, "B G N C D"], v: Float[Tensor, "B G N C V"], delta: bool) -> Tensor:
    """(B, G, N, D, V1): the memory before each segment."""
    new = phi.mT @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if exporting():  # a slice would tie the graph to a length; here a later token can change the last digit
        before = new.cumsum(2) - new
    else:
        before = torch.cat([torch.zeros_like(new[:, :, :1]), new[:, :, :-1].cumsum(2)], 2)
    if not delta:
        return before
    weights = phi / (phi @ before[..., -1:]).clamp(min=LEAST)
    if exporting():
        M, _ = all_states(v, weights, phi, None, torch.zeros_like(before[:, :, 0, :, :-1]))
        return torch.cat([M, before[..., -1:]], -1)
    M, found = torch.zeros_like(new[:, :, 0, :, :-1]), []
    for n in range(v.shape[2]):
        found.append(M)
        M = M + phi[:, :, n].mT @ (v[:, :, n] - weights[:, :, n] @ M)
    return torch.cat([torch.stack(found, 2), before[..., -1:]], -1)


def onwards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    w: Tensor | None,
    keep: Tensor | None,
    C: int,
    delta: bool,
    state: InfiniState,
) -> tuple[Float[Tensor, "B H t V"], InfiniState]:
    """At most a segment of tokens: some complete the open one, others may begin the next."""
    (B, H, t), n = q.shape[:3], state.k.shape[2]
    keep = q.new_ones(B, t, dtype=torch.bool) if keep is None else keep
    sums, pending, buffers = state.sums.to(q.dtype), state.pending.to(q.dtype), (state.k, state.v)
    place = (state.filled[:, None] + keep.cumsum(1) - 1).clamp(min=0)
    next_, place = place >= C, place % C  # whether of the next segment, and where in its own
    turned = _turned(k, place, w)
    held = torch.arange(n, device=q.device).expand(B, -1)
    keys, values = (torch.cat([a.to(q.dtype), b], 2) for a, b in zip(buffers, (turned, v), strict=True))
    places, nexts = torch.cat([held, place], 1), torch.cat([torch.zeros_like(held).bool(), next_], 1)
    real = torch.cat([held < state.filled[:, None], keep], 1)
    seen = real[:, None] & (nexts[:, None] == next_[..., None]) & (places[:, None] <= place[..., None])
    local = attention(_turned(q, place, w), keys, values, mask=seen[:, None])

    phi, here = elu_plus_one(k), keep & ~next_
    pending = pending + added(hide(phi, here), v, sums, delta=delta)
    over = sums + pending  # the memory once this segment is over
    later = added(hide(phi, keep & next_), v, over, delta=delta)
    asking, mine = elu_plus_one(q), next_[:, None, :, None]
    memory = torch.where(mine, read(asking, repeat_heads(over, H)), read(asking, repeat_heads(sums, H)))
    out = torch.where(mine | state.past[:, None, None, None], gate * local + (1 - gate) * memory, local)

    count = state.filled + keep.sum(1)
    ended = count >= C
    end = ended[:, None, None, None]
    grown = min(C, n + t)
    to = torch.where(keep & (next_ == ended[:, None]), place, grown)[:, None, :, None]
    k, v = (
        F.pad(a.to(q.dtype), (0, 0, 0, grown + 1 - n)).scatter(2, to.expand_as(b), b)[:, :, :grown]
        for a, b in zip(buffers, (turned, v), strict=True)
    )
    sums, pending = torch.where(end, over, sums), torch.where(end, later, pending)
    return out, InfiniState(sums, pending, k, v, count % C, state.past | ended)


def _turned(z: Tensor, places: Int[Tensor, "*b n"], w: Tensor | None) -> Tensor:
    if w is None:
        return z
    if z.dim() == 5:
        return rotate(z.flatten(1, 2), angles(places, w), interleaved=True).unflatten(1, z.shape[1:3])
    return rotate(z, angles(places, w), interleaved=True)


def _taken(z: Float[Tensor, "B H T D"], order: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
    return z.gather(2, order[:, None, :, None].expand_as(z))

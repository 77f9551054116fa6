"""SeqBoat's attention: active tokens packed together, a window among them, and back to where they stood."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.checks import checked, choice, fits, number, refuse, whole
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.problem import softmax
from regard.mixers.exponential import work_dtype
from regard.mixers.mega_attention import SquaredRelu
from regard.positions._shared import angles, frequencies
from regard.positions.rotary import rotate
from regard.tracing import exporting, readable

Weighting = Literal["relu2", "softmax"]
Places = Literal["relative", "rotary"]


@checked()
def compress(
    x: Float[Tensor, "B T C"], active: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B A C"], Int[Tensor, "B A"]]:
    """The active tokens of each sequence in order, and where they stood.

    A is the largest number of active tokens, at least 1; behind the last one of a sequence stand zeros and -1. Where
    nobody may look at `active`, A is T. Shapes that don't fit together raise ValueError.
    """
    B, T = active.shape
    A = max(1, int(active.sum(1).max()) if readable(active) and active.numel() else T)
    slot = torch.where(active, active.cumsum(1) - 1, A)
    order = torch.arange(T, device=x.device).expand(B, -1)
    index = order.new_full((B, A + 1), -1).scatter(1, slot, order)[:, :A]
    at = torch.where(index < 0, T, index)[..., None].expand(-1, -1, x.shape[2])
    return F.pad(x, (0, 0, 0, 1)).gather(1, at), index


def extract(packed: Float[Tensor, "B A C"], index: Int[Tensor, "B A"], length: int) -> Float[Tensor, "B T C"]:
    """Packed tokens back where they stood among `length` = T, and 0 elsewhere.

    Shapes that don't fit together raise ValueError.
    """
    sizes = fits("extract", "B A C", packed=packed)
    fits("extract", "B A", {letter: sizes[letter] for letter in "BA"}, index=index)
    at = torch.where(index < 0, length, index)[..., None].expand_as(packed)
    return packed.new_zeros(packed.shape[0], length + 1, packed.shape[2]).scatter(1, at, packed)[:, :length]


class Held(NamedTuple):
    """The last active tokens, at most W, the latest one last."""

    k: Float[Tensor, "B s Z"]
    v: Float[Tensor, "B s E"]
    places: Int[Tensor, "B s"]
    """Where they stood; -1 = none."""
    seen: int
    """Tokens so far, active or not."""


class PackedAttention(nn.Module):
    """Gated attention of one head among active tokens; see `SeqBoat` for the options.

    Shapes: m (B, T, M), active (B, T) -> (B, T, M), which is 0 where a token is not active, and what is held after it.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        value_dim: int,
        *,
        window: int,
        causal: bool,
        weighting: Weighting,
        position: Places,
        max_positions: int,
        dropout: float,
    ) -> None:
        super().__init__()
        whole("SeqBoat", qk_dim=qk_dim, value_dim=value_dim, window=window, max_positions=max_positions)
        choice("SeqBoat", get_args(Weighting), weighting=weighting)
        choice("SeqBoat", get_args(Places), position=position)
        number("SeqBoat", least=0, most=1, dropout=dropout)
        if position == "rotary" and qk_dim % 2:
            refuse("SeqBoat", "qk_dim", "is odd", qk_dim, "an even int, as rotary turns channels in pairs")
        self.qk_dim, self.value_dim, self.window, self.causal = qk_dim, value_dim, window, causal
        self.weighting, self.dropout = weighting, dropout
        self.normalizer: Callable[..., Tensor] = softmax if weighting == "softmax" else SquaredRelu()
        self.mx_proj = nn.Linear(dim, qk_dim + 2 * value_dim)  # z, r, v
        self.gamma = nn.Parameter(torch.empty(2, qk_dim))
        self.beta = nn.Parameter(torch.empty(2, qk_dim))
        self.h_proj = nn.Linear(value_dim, dim)
        self.table = nn.Parameter(torch.empty(2 * max_positions - 1)) if position == "relative" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of 0.02 cut at two deviations, and no bias."""
        tables = [] if self.table is None else [self.table]
        for p in (self.mx_proj.weight, self.h_proj.weight, self.gamma, *tables):
            nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)
        for p in (self.mx_proj.bias, self.h_proj.bias, self.beta):
            nn.init.zeros_(p)

    def forward(
        self, m: Float[Tensor, "B T M"], active: Bool[Tensor, "B T"], held: Held | None = None
    ) -> tuple[Float[Tensor, "B T M"], Held | None]:
        c, index = compress(m, active)
        A, seen = index.shape[1], 0 if held is None else held.seen
        places = torch.where(index < 0, -1, index + seen)
        z, r, v = F.silu(self.mx_proj(c)).split([self.qk_dim, self.value_dim, self.value_dim], -1)
        q, k = (z[:, None] * self.gamma[:, None] + self.beta[:, None]).to(v.dtype).unbind(1)
        if self.table is None:
            angle = angles(places, frequencies(self.qk_dim, 10000.0, q.device))
            q, k = (rotate(side[:, None], angle)[:, 0] for side in (q, k))
        if held is not None:
            k, v = (torch.cat([old, new.to(old.dtype)], 1) for old, new in ((held.k, k), (held.v, v)))
            places = torch.cat([held.places, places], 1)
        out = self.h_proj(self.near(q, k.to(q.dtype), v.to(q.dtype), places) * r)
        o = extract(out, index, m.shape[1])
        if held is None:
            return o, None
        stays = min(self.window, k.shape[1])
        last = k.shape[1] - A + (index >= 0).sum(1, keepdim=True) - stays + torch.arange(stays, device=m.device)
        none, last = last < 0, last.clamp(min=0)
        k, v = (side.gather(1, last[..., None].expand(-1, -1, side.shape[2])) for side in (k, v))
        return o, Held(k, v, places.gather(1, last).masked_fill(none, -1), seen + m.shape[1])

    def near(
        self,
        q: Float[Tensor, "B A Z"],
        k: Float[Tensor, "B S Z"],
        v: Float[Tensor, "B S E"],
        places: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B A E"]:
        """The window among packed tokens, in blocks of queries: memory is linear in A. The last A keys are of these."""
        A, size, back = q.shape[1], self.window, self.window
        if not exporting():  # as far as there is something to see
            size, back = min(size, A), min(back, k.shape[1])
        ahead = 0 if self.causal else size
        lead, reach = back - (k.shape[1] - A), back + size + ahead
        q = in_blocks(q, size, 1)
        count = q.shape[1]
        extra = count * size - A + ahead
        near = torch.arange(count, device=q.device)[:, None] * size + torch.arange(reach, device=q.device)
        k, v = (F.pad(side, (0, 0, lead, extra))[:, near] for side in (k, v))
        at = F.pad(places, (lead, extra), value=-1)[:, near]
        distance = torch.arange(reach, device=q.device) - back - torch.arange(size, device=q.device)[:, None]
        sees = (distance >= -self.window) & (distance <= (0 if self.causal else self.window))
        work = work_dtype(q)
        scale = self.qk_dim**-0.5 if self.weighting == "softmax" else 1 / (self.window * (1 if self.causal else 2))
        scores = q.to(work) @ k.to(work).mT * scale
        if self.table is not None:
            most = len(self.table) // 2
            between = (at[:, :, None] - at[:, :, back : back + size, None]).clamp(-most, most)
            scores = scores + self.table[between + most]
        weights = self.normalizer(scores, sees & (at >= 0)[:, :, None])
        if self.dropout and self.training:
            weights = F.dropout(weights, self.dropout)
        return from_blocks(weights @ v.to(work), A, 1).to(v.dtype)

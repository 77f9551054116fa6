"""Causal attention to tokens, and in some rows to what they have chosen of others that stand besides."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import fits, number, refuse
from regard.masks import causal, padding
from regard.mixers.detail_selection import grid_of, resize_table
from regard.pipeline.function import attention
from regard.pipeline.tokens import quarantine
from regard.positions._shared import angles, frequencies, work_dtype
from regard.tracing import readable


def turns(start: int, stop: int, width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, width / 2) cosines and sines of rotary places."""
    at = torch.arange(start, stop, device=device)
    angle = angles(at, frequencies(width, base, device))
    return angle.cos(), angle.sin()


def turned(z: Float[Tensor, "B H n D"], cos: Float[Tensor, "n h"], sin: Float[Tensor, "n h"]) -> Tensor:
    """Channels (a, a + D/2) of z by tables of one entry for both, as of `regard.positions.Rotary`."""
    first, second = z.to(work_dtype(z)).chunk(2, -1)
    cos, sin = cos.to(first.dtype), sin.to(first.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(z.dtype)


def high_res_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    detail_k: Float[Tensor, "B G N D"],
    detail_v: Float[Tensor, "B G N V"],
    chosen: Bool[Tensor, "B T N"],
    *,
    keep: Bool[Tensor, "B S"] | None = None,
    alpha: float = 1.0,
) -> Float[Tensor, "B H T V"]:
    """Causal attention, and `alpha` of that to chosen detail besides, in rows that have chosen any.

    Args:
        q, k, detail_k: turned already. The last T of S tokens ask.
        keep: True = a real token.
    """
    own = attention(q, k, v, mask=causal() if keep is None else causal() & padding(keep))
    (B, H, T, _), S = q.shape, k.shape[2]
    sized = {"B": B, "G": k.shape[1], "D": k.shape[3], "V": v.shape[3], "T": T}
    sized |= fits(high_res_attention.__name__, "B G N D", sized, detail_k=detail_k)
    fits(high_res_attention.__name__, "B G N V", sized, detail_v=detail_v)
    fits(high_res_attention.__name__, "B T N", sized, chosen=chosen)
    looks = chosen.any(2)
    at = looking(looks)
    if at.shape[1] == 0 or own.numel() == 0:
        return own

    def rows(z: Tensor) -> Tensor:
        return z.gather(2, at[:, None, :, None].expand(-1, H, -1, z.shape[3]))

    far = chosen.gather(1, at[..., None].expand(-1, -1, chosen.shape[2]))
    seen = torch.cat([seen_by(at + S - T, S, keep), far], 2)[:, None]
    both = attention(rows(q), torch.cat([k, detail_k], 2), torch.cat([v, detail_v], 2), mask=seen)
    old = rows(own)
    both = torch.where(looks.gather(1, at)[:, None, :, None], old.lerp(both, alpha), old)
    return own.scatter(2, at[:, None, :, None].expand_as(both), both)


def looking(rows: Bool[Tensor, "B T"]) -> Int[Tensor, "B L"]:
    """The rows that are True, and others behind them where a sequence has fewer; all while compiling."""
    some = int(rows.sum(1).amax()) if readable(rows) and rows.numel() else rows.shape[1]
    return rows.long().argsort(stable=True, dim=1, descending=True)[:, :some]


def seen_by(at: Int[Tensor, "B L"], S: int, keep: Bool[Tensor, "B S"] | None) -> Bool[Tensor, "B L S"]:
    """What rows (B, L) see of S tokens."""
    seen = torch.arange(S, device=at.device) <= at[..., None]
    return seen if keep is None else seen & keep[:, None]


class DetailKeys(nn.Module):
    """Keys and values of an image in detail, turned by the places of its small copy.

    Args:
        dim, num_kv_heads, head_dim: M, G and D.
        image: the places of the small copy, from the first to behind the last.
        base: of the rotary frequencies.

    Shapes: context (B, N, M), chosen (B, T, N) -> keys and values (B, G, n, D) of the n that any row has chosen, what
    each row has chosen of them (B, T, n), and (B, T) which rows read NaN (None: none).
    """

    def __init__(
        self,
        dim: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        image: tuple[int, int],
        base: float = 10000.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        number(self, above=0, base=base)
        if head_dim % 2:
            refuse(self, "head_dim", "is odd", head_dim, "an even one, whose channels turn in pairs")
        if image[0] < 0:
            refuse(self, "image", "begins before the row", image, "places from 0 on")
        grid_of(self, "image", image[1] - image[0])
        self.head_dim, self.image, self.base = head_dim, image, base
        self.k_proj, self.v_proj = (nn.Linear(dim, num_kv_heads * head_dim, bias=bias) for _ in range(2))

    def forward(
        self, context: Float[Tensor, "B N M"], chosen: Bool[Tensor, "B T N"]
    ) -> tuple[Tensor, Tensor, Bool[Tensor, "B T n"], Bool[Tensor, "B T"] | None]:
        g = grid_of(self, "context", context.shape[1])
        context, bad = quarantine(context)
        lost = None if bad is None else (chosen & bad[:, None]).any(2)
        cos, sin = (resize_table(z, g) for z in turns(*self.image, self.head_dim, self.base, context.device))
        if readable(context, chosen):  # what nobody reads is not projected
            used = chosen.any(1).any(0).nonzero()[:, 0]
            context, chosen, cos, sin = context[:, used], chosen[..., used], cos[used], sin[used]
        k, v = (p(context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        return turned(k, cos, sin), v, chosen, lost

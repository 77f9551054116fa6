"""Means of all the past, by weights that are exponentials, as moving averages."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.channel_scan import channel_scan
from regard.kernels.max_scan import EMPTY, max_scan
from regard.linear._shared import widened


def means(
    logits: Float[Tensor, "B G T m"],
    total: Float[Tensor, "B G m"] | None = None,
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> tuple[Float[Tensor, "B G T m"], Float[Tensor, "B G T m"], Float[Tensor, "B G m"]]:
    """Shares and logarithms of decays with which a slot is the mean of all so far, by weights exp(logits).

    Args:
        total: logarithm of the sum of weights before these, EMPTY for none; the last entry is that after them.
    """
    (G, _, m), real = logits.shape[1:], keep
    (x,) = widened(logits.transpose(1, 2).flatten(2))
    if real is not None:
        x = x.masked_fill(~real[..., None], EMPTY)
    before = x.new_full((len(x), G * m), EMPTY) if total is None else total.flatten(1).to(x.dtype)
    tops, _ = max_scan(x.detach(), torch.zeros_like(x), state=before.detach(), starts=starts)
    earlier = torch.cat([before[:, None].detach(), tops], 1)[:, :-1]
    held = torch.where(before > EMPTY / 2, (before - before.detach()).exp(), 0.0)
    weight = (x - tops).exp() if real is None else (x - tops).exp().masked_fill(~real[..., None], 0)
    sums, _ = channel_scan(weight, earlier - tops, state=held, starts=starts)
    some = sums > 0
    share = weight / torch.where(some, sums, 1.0)
    totals = torch.where(some, tops + torch.where(some, sums, 1.0).log(), EMPTY)
    earlier = torch.cat([before[:, None], totals], 1)[:, :-1]
    if starts is not None:
        earlier = earlier.masked_fill(starts[..., None], EMPTY)
    # What is kept is 1 - share, told from the share where that is small, and else from the sums.
    near = torch.log1p(-share.clamp(max=0.5))
    decay = torch.where(share < 0.5, near, earlier - totals)
    after = totals[:, -1] if x.shape[1] else before
    share, decay = (z.unflatten(2, (G, m)).transpose(1, 2) for z in (share, decay))
    return share, decay, after.unflatten(1, (G, m))

"""A short causal convolution along tokens, each channel by itself, whole or token by token.

    y_t = bias + sum_{j < K} w_{K-1-j} x_{t-j},   zeros before the first token

The last tap is the token's own, as in torch's Conv1d and in the released short convolutions before linear attention
(Mamba, gated DeltaNet; K = 4) and after the heads' projections (Primer, https://arxiv.org/abs/2109.08668; K = 3).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import checked, refuse
from regard.tracing import exporting

WHO = "short convolution"


class Convolved(NamedTuple):
    out: Float[Tensor, "B *H T C"]
    state: Float[Tensor, "B *H past C"]
    """The last K - 1 inputs, zeros where there were none or of documents before: what the next tokens need of these."""


@checked()
def short_conv(
    x: Float[Tensor, "B *H T C"],
    weight: Float[Tensor, "*H C K"],
    bias: Float[Tensor, "*H C"] | None = None,
    *,
    state: Float[Tensor, "B *H past C"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    sees: Bool[Tensor, "#B T past"] | None = None,
) -> Convolved:
    """The convolution, and the state from which it goes on. An activation is the caller's.

    Args:
        x: (B, T, C), or (B, H, T, C) by heads; `weight` is then (H, C, K).
        state: what the call before gave; None = nothing came before.
        keep: True at real tokens. The others count as zeros for all that come after, whatever they hold.
        starts: True where a document starts, before which nothing is seen.
        sees: True at [..., j - 1] where the token reads the one j before it; another says nothing about the state.

    Raises:
        ValueError: shapes that don't fit together, or no tap at all.
    """
    (T, C), K = x.shape[-2:], weight.shape[-1]
    if K == 0:
        refuse(WHO, "weight", "has no taps", tuple(weight.shape), "at least one")
    if state is not None and state.shape[-2] != K - 1:
        refuse(WHO, "state", "holds another number of tokens", state.shape[-2], f"{K - 1}, one less than taps")
    if keep is not None:
        x = x.masked_fill(~_along(keep, x), 0)
    before = x.new_zeros(*x.shape[:-2], K - 1, C) if state is None else state.to(x.dtype)
    seen = torch.cat([before, x], -2)
    if sees is not None and sees.shape[-1] != K - 1:
        refuse(WHO, "sees", "is about another number of tokens", sees.shape[-1], f"{K - 1}, one less than taps")
    # What stands in the state belongs to the document that goes on, if any does.
    document = None if starts is None else F.pad(starts.long().cumsum(1), (K - 1, 0))
    out = seen.new_zeros(()) if bias is None else bias[..., None, :]
    for j in range(K):  # from the farthest token; K passes are cheaper than a K times larger copy
        part = seen.narrow(-2, j, T)
        if document is not None and j < K - 1:
            same = document.narrow(1, j, T) == document.narrow(1, K - 1, T)
            part = part.masked_fill(~_along(same, x), 0)
        if sees is not None and j < K - 1:
            part = part.masked_fill(~_along(sees[..., K - 2 - j], x), 0)
        out = torch.addcmul(out, part, weight[..., None, :, j])
    last = seen.narrow(-2, T, K - 1)
    if document is not None:
        last = last.masked_fill(~_along(document[:, T:] == document[:, -1:], x), 0)
    return Convolved(out, last)


def _along(told: Bool[Tensor, "#B T"], x: Tensor) -> Bool[Tensor, "#B *one T 1"]:
    """What is told of each token, beside all its heads and channels."""
    return told[..., None] if x.dim() == 3 else told[:, None, :, None]


BAND = 32
"""Tokens a product of matrices."""


def centred_conv(x: Float[Tensor, "B H T D"], weight: Float[Tensor, "H K"]) -> Float[Tensor, "B H T D"]:
    """Each head's own K taps, K odd, around every token, zeros beyond the ends; all of a head's features alike.

    Torch's grouped convolution goes through many taps several times more slowly than this: bands of tokens times a
    matrix that holds the taps on its diagonals.
    """
    T, K = x.shape[2], weight.shape[1]
    past, bands = K // 2, -(-T // BAND)
    if exporting():  # bands of a free length bind it
        return F.conv2d(x, weight[:, None, :, None], padding=(past, 0), groups=len(weight))
    if T == 0:
        return x
    windows = F.pad(x, (0, 0, past, past + bands * BAND - T)).unfold(2, BAND + K - 1, BAND)
    tap = torch.arange(BAND + K - 1, device=x.device) - torch.arange(BAND, device=x.device)[:, None]
    inside = (tap >= 0) & (tap < K)
    diagonals = weight[:, tap.clamp(0, K - 1)].masked_fill(~inside, 0)
    return (diagonals[:, None] @ windows.mT).flatten(2, 3)[:, :, :T]

"""How single keys are scored by small heads, and the best of them found."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.blocks import greatest
from regard.kernels.problem import dots

PAIRS = 2**20
"""Scores formed together, of all index heads: few enough to stay in the cache."""


def index_scores(
    q: Float[Tensor, "B h t D"], k: Float[Tensor, "B 1 S D"], w: Float[Tensor, "B t h"]
) -> Float[Tensor, "B t S"]:
    """I of these queries, in at least fp32."""
    scores = dots(q * q.shape[3] ** -0.5, k).relu()
    each = w.to(scores.dtype).unsqueeze(-1).unbind(2)
    total = each[0] * scores[:, 0]
    for h, weight in enumerate(each[1:], 1):
        total = torch.addcmul(total, weight, scores[:, h])
    return total


def best(scores: Float[Tensor, "*n S"], k: int) -> Bool[Tensor, "*n S"]:
    """The k largest of each row, of equals the last. NaN is taken, to stay seen."""
    least = greatest(scores, k).values[..., -1:]
    above, equal = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return above | scores.isnan() | (equal & (equal.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) <= room))


def places(
    I: Float[Tensor, "B t S"], top: Float[Tensor, "B t n"], at: Int[Tensor, "B t n"], k: int
) -> Int[Tensor, "B t n"]:
    """Where the k largest of each row stand, given the n = k + 1 largest in any order, or all; of equals the last, and
    -1 for -inf."""
    if top.shape[-1] > k:
        least, last = top.min(-1, keepdim=True)
        at = at.scatter(-1, last, -1)  # one too many
        tied = (top == least).sum(-1).gt(1) & least.squeeze(-1).ne(-math.inf)
        if bool(tied.any()):  # in these rows others may have to go
            rows = best(I[tied], k)
            at[tied] = F.pad(rows.nonzero()[:, 1].view(-1, k), (0, 1), value=-1)
    return torch.where(top == -math.inf, -1, at).int()

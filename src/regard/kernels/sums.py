"""Sums over very many keys in float32.

A processor's product of one row and a matrix may add up key after key, each time rounding to the same side: a hundred
thousand equal weights sum to 1 - 1e-3, a million to 1 - 9e-3. With sums of pieces, summed pairwise, 4e-6 is lost.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

PIECE = 512
"""Keys that are added up one after another."""
MANY = 64 * PIECE
"""Keys up to which the plain product loses less than 1e-5."""


def needed(weights: Float[Tensor, "*b S"]) -> bool:
    """Whether sums over these keys need care.

    Compiled, a number of pieces would tie the graph to one length; accelerators add up in pieces by themselves.
    """
    careful = weights.dtype == torch.float32 and weights.is_cpu and not torch.compiler.is_compiling()
    return careful and weights.shape[-1] > MANY


def over_keys(weights: Float[Tensor, "*b t S"], values: Float[Tensor, "*b S V"]) -> Float[Tensor, "*b t V"]:
    """weights @ values."""
    S = weights.shape[-1]
    if not needed(weights):
        return weights @ values
    whole = S // PIECE * PIECE
    parts = weights[..., :whole].unflatten(-1, (-1, PIECE)).movedim(-2, -3)
    out = (parts @ values[..., :whole, :].unflatten(-2, (-1, PIECE))).sum(-3)
    return out if whole == S else out + weights[..., whole:] @ values[..., whole:, :]


def summed_to_one(weights: Float[Tensor, "*b t S"]) -> Float[Tensor, "*b t S"]:
    """A softmax of torch's, which over a million keys sums to 1 within 1e-4 only, divided by its sum; 0 stays 0."""
    if not needed(weights):
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)


def loses(p: Any, most: int) -> list[str]:
    """Why a kernel that sums plainly in float32 on a CPU is no good for a problem whose queries see more keys than
    `most`. Compiled, all sum plainly."""
    if torch.compiler.is_compiling():
        return []
    back, ahead = (math.inf, math.inf) if p.mask is None else p.mask.span
    seen = min(p.k.shape[2], back + ahead + 1)
    exact = p.device_kind != "cpu" or p.q.dtype != torch.float32 or seen <= most
    return [] if exact else ["over so many keys its float32 sums lose more than 1e-5"]

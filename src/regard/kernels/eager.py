"""The reference: the whole score matrix at once, any stage, plain torch."""

from torch import Tensor

from regard.kernels.cost import Cost, checked, passed, products
from regard.kernels.problem import Problem, attend
from regard.kernels.size import sized

CACHE = 16 * 2**20
"""Bytes of scores beyond which every pass fetches them from memory."""


def why_not(p: Problem) -> list[str]:
    """Nothing is beyond it but memory, and that is for the caller to judge."""
    return []


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    return attend(p, slice(0, p.q.shape[2]), slice(0, p.k.shape[2]))


def cost(p: Problem) -> Cost:
    """All pairs, and several passes over their scores, which leave the cache on the way where they are many."""
    B, H, _, T, S = p.shape
    scores = 4 * B * H * T * S
    far = 2.0 if scores > CACHE else 1.0
    traffic = far * B * H * T * S * passed(p)
    words = f"scores formed all at once: {sized(scores)}"
    return Cost(products(p, T * S), traffic, 55, words, checked(p), "unfused")

"""How big things get: the few constants and counts that kernels are chosen by."""

import math

import torch

from regard.kernels.problem import Problem

MATERIALISE = 256 * 2**20
"""Bytes of scores or bias above which a kernel that forms them all at once is not chosen by itself."""


def score_bytes(p: Problem) -> int:
    """Bytes of one (H, T, S) array in the inputs' dtype."""
    _, H, _, T, S = p.shape
    return H * T * S * p.q.element_size()


def sized(n: float) -> str:
    """1536 -> '1.5 KB'."""
    if torch.compiler.is_compiling():
        return "many bytes"  # the number may be symbolic, which has no decimals
    unit = min(4, int(math.log(n, 1024))) if n >= 1 else 0
    return f"{n / 1024**unit:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def counted(n: float) -> str:
    """1.5e9 -> '1.5 GFLOP'."""
    unit = min(5, int(math.log10(n) / 3)) if n >= 1 else 0
    return f"{n / 1000**unit:.3g} {('', 'K', 'M', 'G', 'T', 'P')[unit]}FLOP"

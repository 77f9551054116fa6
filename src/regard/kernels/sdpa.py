"""torch's fused scaled_dot_product_attention, for everything that is softmax with at most additive terms.

Masks and biases that torch takes only as a tensor are formed for a chunk of queries at a time, against the keys that
these may reach.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard.kernels.cost import Cost, checked, formed, maps, products, reached
from regard.kernels.problem import (
    CAUSAL,
    Keys,
    Problem,
    beyond_softmax,
    by_rows,
    chunk_rows,
    key_range,
    nothing,
    position_bias,
    rectangle,
)
from regard.kernels.sums import MANY, loses

BIAS_BYTES = 8 * 2**20
"""Mask and bias formed at once stay within this."""


def why_not(p: Problem) -> list[str]:
    """What torch's kernel can't express."""
    reasons = beyond_softmax(p)
    if p.position_bias is not None and "scores" in p.position_bias.needs:
        reasons.append(f"position {type(p.position).__name__} reads the scores")
    # Values of another width than keys leave torch its plain products, which lose more.
    return reasons + loses(p, most_keys(p))


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    if p.q.numel() == 0 or p.k.numel() == 0:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    T, S = p.q.size(2), p.k.size(2)
    if not _biased(p):
        if p.mask is None or (T == 1 and p.mask == CAUSAL):
            return _torch(p, p.q, p.k, p.v)
        # torch aligns is_causal top-left, so it means the same only for a square.
        if T == S and p.first_key == 0 and p.mask == CAUSAL:
            return _torch(p, p.q, p.k, p.v, is_causal=True)
    if not p.readable:  # a loop would tie a graph to one length
        return fused(p, slice(0, T), slice(0, S))
    return by_rows(p, lambda rows: fused(p, rows, key_range(p, rows)), _rows(p))


def cost(p: Problem) -> Cost:
    """All pairs, half of them under a causal mask, or those that each chunk of queries may reach."""
    T, S = p.q.shape[2], p.k.shape[2]
    if not _biased(p) and (p.mask is None or p.mask == CAUSAL) and (p.mask is None or T in (1, S)):
        # Under a causal mask torch cuts queries into 256s and keys into 512s.
        pairs = T * S if p.mask is None else T * min(S, S - T + T / 2 + 384)
        return Cost(products(p, pairs), 0, 7, "torch's fused kernel", streamed=checked(p))
    rows = chunk_rows(T, _rows(p))
    pairs, chunks = reached(p, rows), -(-T // rows)
    what = "bias and mask" if _biased(p) else "the mask"
    traffic = p.q.shape[0] * p.q.shape[1] * pairs * formed(p)
    words = f"torch's fused kernel, {what} formed by chunks of queries"
    return Cost(products(p, pairs), traffic, 8 + (60 if _biased(p) else 30) * chunks, words, streamed=checked(p))


def fused(p: Problem, rows: slice, keys: Keys) -> Tensor:
    """Query rows `rows` against `keys`, with their part of mask and bias."""
    return _torch(p, p.q[:, :, rows], p.k[:, :, keys], p.v[:, :, keys], mask=_term(p, rows, keys))


def _term(p: Problem, rows: slice, keys: Keys) -> Tensor | None:
    """Mask and bias as the one tensor that torch takes: bool, or additive with -inf."""
    term: Tensor | None = None
    if p.position_bias is not None:
        term = position_bias(p, rectangle(p, rows, keys, scored=False), rows, keys)
    if p.bias is not None:
        bias = p.bias if p.bias.shape[2] == 1 else p.bias[:, :, rows]
        bias = bias if bias.shape[3] == 1 else bias[..., keys]
        term = bias if term is None else term + bias
    if p.mask is not None:
        allowed = p.mask.at(p.i[rows], p.j[keys])
        term = allowed if term is None else torch.where(allowed, term, -torch.inf)
    if term is None:
        return None
    term = term if term.dtype == torch.bool else term.to(p.q.dtype)
    return term.expand(-1, -1, p.i[rows].shape[0], p.j[keys].shape[0])


def most_keys(p: Problem) -> int:
    """Over how many torch's CPU kernels sum well: the fused one, which needs V = D, adds up in pieces."""
    return MANY if p.v.shape[3] != p.q.shape[3] else 16 * MANY


def torch_kernels(p: Problem) -> AbstractContextManager[Any]:
    """Those of torch's that can run this: the fused ones know neither forward mode nor vmap's rules."""
    return sdpa_kernel(SDPBackend.MATH) if p.transformed else nullcontext()


def _torch(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    grouped = bool(q.size(1) != k.size(1))  # a size is a tensor while torch.jit traces
    with torch_kernels(p):
        return F.scaled_dot_product_attention(q, k, v, mask, p.dropout, is_causal, scale=p.scale, enable_gqa=grouped)


def _biased(p: Problem) -> bool:
    return p.position_bias is not None or p.bias is not None


def _rows(p: Problem) -> int:
    """Query rows whose mask and bias may be formed at once."""
    return BIAS_BYTES // max(1, 4 * maps(p) * p.k.shape[2])

"""torch's fused scaled_dot_product_attention, for everything that is softmax with at most additive terms.

Masks and biases that torch takes only as a tensor are formed for a chunk of queries at a time, against the keys that
these may reach.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.problem import Keys, Problem, by_rows, key_range, rectangle
from regard.masks import causal

BIAS_BYTES = 8 * 2**20
"""Mask and bias formed at once stay within this."""


def why_not(p: Problem) -> list[str]:
    """What torch's kernel can't express."""
    reasons = []
    if p.normalizer is not None and not p.normalizer.is_softmax:
        reasons.append(f"normalizer {type(p.normalizer).__name__} is not softmax")
    for name in ("score_mix", "weight_mix"):
        if (stage := getattr(p, name)) is not None:
            reasons.append(f"{name} {type(stage).__name__} reads the score matrix")
    if p.position_values is not None:
        reasons.append(f"position {type(p.position).__name__} adds to the values")
    if p.position_bias is not None and "scores" in p.position_bias.needs:
        reasons.append(f"position {type(p.position).__name__} reads the scores")
    return reasons


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    B, H, _, T, S = p.shape
    if 0 in (B, T, S):
        # An empty product with a graph behind it: zeros, and zero gradients.
        return p.q.new_zeros(B, H, T, p.v.shape[3]) + 0 * (p.q.sum() + p.k.sum() + p.v.sum())
    if not _biased(p):
        if p.mask is None or (T == 1 and p.mask == causal()):
            return _torch(p, p.q, p.k, p.v)
        # torch aligns is_causal top-left, so it means the same only for a square.
        if T == S and p.first_key == 0 and p.mask == causal():
            return _torch(p, p.q, p.k, p.v, is_causal=True)
    if torch.compiler.is_compiling():  # a loop would tie the graph to one length
        return fused(p, slice(0, T), slice(0, S))
    return by_rows(p, lambda rows: fused(p, rows, key_range(p, rows)), BIAS_BYTES // (4 * _maps(p) * S))


def fused(p: Problem, rows: slice, keys: Keys) -> Tensor:
    """Query rows `rows` against `keys`, with their part of mask and bias."""
    return _torch(p, p.q[:, :, rows], p.k[:, :, keys], p.v[:, :, keys], mask=_term(p, rows, keys))


def _term(p: Problem, rows: slice, keys: Keys) -> Tensor | None:
    """Mask and bias as the one tensor that torch takes: bool, or additive with -inf."""
    term: Tensor | None = None
    if p.position_bias is not None:
        term = p.position_bias.bias(rectangle(p, rows, keys, scored=False))
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
    return term.expand(-1, -1, len(p.i[rows]), len(p.j[keys]))


def _torch(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, mask, p.dropout, is_causal, scale=p.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _biased(p: Problem) -> bool:
    return p.position_bias is not None or p.bias is not None


def _maps(p: Problem) -> int:
    """How many (T, S) maps mask and bias have between them, at most."""
    return p.q.shape[0] * p.q.shape[1] if _biased(p) else 1 if p.mask is None else p.mask.batch * p.mask.heads

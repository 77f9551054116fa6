"""torch's fused scaled_dot_product_attention, for everything that is softmax with at most an additive bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.problem import Problem, rectangle
from regard.kernels.size import MATERIALISE, score_bytes, sized
from regard.masks import causal


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
    if p.position_bias is not None:
        if "scores" in p.position_bias.needs:
            reasons.append(f"position {type(p.position).__name__} reads the scores")
        elif score_bytes(p) > MATERIALISE:
            reasons.append(f"the position bias would be materialised: {sized(score_bytes(p))}")
    return reasons


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    B, H, G, T, S = p.shape
    if 0 in (B, T, S):
        # An empty product with a graph behind it: zeros, and zero gradients.
        return p.q.new_zeros(B, H, T, p.v.shape[3]) + 0 * (p.q.sum() + p.k.sum() + p.v.sum())
    mask, is_causal = _mask(p)
    if _biased(p):
        mask = _additive(p, mask)
    return F.scaled_dot_product_attention(
        p.q,
        p.k,
        p.v,
        attn_mask=mask,
        dropout_p=p.dropout,
        is_causal=is_causal,
        scale=p.scale,
        enable_gqa=H != G,
    )


def _biased(p: Problem) -> bool:
    return p.position_bias is not None or p.bias is not None


def _mask(p: Problem) -> tuple[Tensor | None, bool]:
    """The mask as torch takes it: a tensor or None, and whether it is causal instead."""
    T, S = p.q.shape[2], p.k.shape[2]
    if p.mask is None or (T == 1 and p.mask == causal()):
        return None, False
    # torch aligns is_causal top-left, so it means the same only for a square.
    if T == S and p.first_key == 0 and p.mask == causal() and not _biased(p):
        return None, True
    return p.mask.at(p.i, p.j), False


def _additive(p: Problem, mask: Tensor | None) -> Tensor:
    """Bias and mask as the one float tensor that torch takes."""
    T, S = p.q.shape[2], p.k.shape[2]
    bias = p.q.new_zeros(1, 1, 1, 1)
    if p.position_bias is not None:
        bias = bias + p.position_bias.bias(rectangle(p, slice(0, T), slice(0, S), scored=False))
    if p.bias is not None:
        bias = bias + p.bias
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    return bias.to(p.q.dtype).expand(-1, -1, T, S)

"""Outputs of any sparse method, corrected by those of every so many queries that see all keys."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import choice, fits, refuse, whole
from regard.kernels.check import check_inputs
from regard.masks import Mask, causal
from regard.masks.rows import every_row, sees_any
from regard.pipeline.function import attention
from regard.stages import Selector

Mode = Literal["delta", "recompute", "sparse"]


def delta_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    sparse: Mask | Selector | Float[Tensor, "B H T V"],
    *,
    dense: Mask | None = None,
    stride: int = 64,
    tail: int = 128,
    mode: Mode = "delta",
    scale: float | None = None,
    kernel: str = "auto",
) -> Float[Tensor, "B H T V"]:
    """Sparse attention, corrected by that of every `stride`-th query over all keys.

    The difference is one of normalised outputs, so that what comes out may lie outside of the values' hull.

    Args:
        sparse: what the sparse queries see (a mask, e.g. `causal() & (window(2048) | prefix(1024))`, or a selector, of
            what `dense` allows), or their outputs, of any method.
        dense: what the others see. Default: `causal()`.
        stride: gamma; groups count from the first query.
        tail: if > 0, the last T mod stride + max(tail, stride) queries are dense, and nothing is added to them.
        mode: "delta"; "recompute" adds nothing to the queries between; "sparse" is the sparse method alone.
        scale, kernel: as in `regard.attention`.
    """
    who = "delta_attention"
    check_inputs(q, k, v)
    check_options(who, stride, tail, mode)
    dense = causal() if dense is None else dense
    (B, H, T, _), S, V = q.shape, k.shape[2], v.shape[3]
    options: dict[str, Any] = {"scale": scale, "kernel": kernel}
    cut = T % stride + max(tail, stride) if tail else 0
    body = T if mode == "sparse" else max(T - cut, 0)
    if isinstance(sparse, Tensor):
        fits(who, "B H T V", {"B": B, "H": H, "T": T, "V": V}, sparse=sparse)
        out = sparse
    elif isinstance(sparse, Selector):
        out = attention(q, k, v, mask=dense, selector=sparse, **options) if body else q.new_zeros(0)
    elif isinstance(sparse, Mask):
        out = attention(q, k, v, mask=sparse, **options) if body else q.new_zeros(0)
    else:
        wanted = "a Mask, a Selector or the outputs of a sparse method"
        refuse(who, "sparse", "has the wrong type", type(sparse).__name__, wanted, error=TypeError)
    if mode == "sparse":
        return out
    if not body:
        return attention(q, k, v, mask=dense, **options)
    asked = q[:, :, :body:stride]
    seen = every_row(dense, stride, T=T, S=S, count=asked.shape[2])
    missed = attention(asked, k, v, mask=seen, **options) - out[:, :, :body:stride]
    at = torch.arange(body, device=q.device)
    corrects = True if mode == "delta" else at % stride == 0
    if (sees := sees_any(dense, at + (S - T), S)) is not None:
        corrects = sees & corrects
    missed = missed.index_select(2, at // stride)
    if isinstance(corrects, Tensor):
        missed = missed.masked_fill(~corrects.unsqueeze(-1), 0)
    corrected = out[:, :, :body] + missed
    if body == T:
        return corrected
    return torch.cat([corrected, attention(q[:, :, body:], k, v, mask=dense, **options)], 2)


def check_options(who: object, stride: int, tail: int, mode: str) -> None:
    """Refuse options of `delta_attention`."""
    whole(who, stride=stride)
    whole(who, 0, tail=tail)
    choice(who, get_args(Mode), mode=mode)

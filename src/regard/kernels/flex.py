"""torch's FlexAttention, its blocks taken from our layouts, its `mask_mod` from the mask's own predicate.

A mix that looks at one pair at a time is its `score_mod`. Positions that add a function of distance are looked up in a
table with one entry a distance; a tensor bias is looked up in itself. On GPUs torch.compile makes one kernel for each
structure of mask and bias. On the CPU the formula is followed without compiling, which forms all scores: that is for
checking what is handed to torch, not for speed.

Dong, Feng, Guessous, Liang, He 2024, https://arxiv.org/abs/2412.05496 (not read: torch's own
documentation was followed). Never run on a GPU yet.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.kernels import block_sparse, online
from regard.kernels.cost import Cost, io, passed, products
from regard.kernels.problem import Problem, beyond_softmax, uncapped, without_pairs
from regard.kernels.sums import MANY, loses
from regard.masks import BlockLayout, Mask
from regard.masks.content import remembered
from regard.masks.torch_blocks import of_layout
from regard.stages import Rows

BLOCK = 128
"""Queries and keys a block, as FlexAttention has it by default; its kernels cut blocks further."""
BEHIND = 1.3
"""A pair is taken to cost so many times what it costs torch's flash kernel: an assumption, measured nowhere yet."""
ACCELERATORS = ("cuda", "xpu")


def why_not(p: Problem) -> list[str]:
    """It is softmax attention with masks, additive terms, caps and mixes of single pairs, and trains on accelerators
    only."""
    reasons = beyond_softmax(uncapped(without_pairs(p)))
    if p.position_bias is not None and not p.position_bias.by_distance:
        reasons.append(f"the bias of position {type(p.position).__name__} is no function of distance alone")
    if p.dropout:
        reasons.append("dropout")
    if p.first_key and p.mask is not None:
        reasons.append("the cache has dropped keys already; its mask has no block layout")
    if torch.compiler.is_compiling():
        reasons.append("it compiles a kernel of its own, so it can't be part of a torch.compile graph here")
    return reasons + _where(p)


def _where(p: Problem) -> list[str]:
    """What the device does not do."""
    if p.device_kind in ACCELERATORS:
        return [f"dtype {p.q.dtype}: its kernels sum in float32"] if p.q.dtype == torch.float64 else []
    if p.device_kind != "cpu":
        return [f"tensors are on {p.device_kind}: only CPUs and {', '.join(ACCELERATORS)}"]
    reasons = loses(p, MANY)
    trains = ["torch has no gradients for FlexAttention on CPUs; expected torch.no_grad()"] if _trains(p) else []
    return reasons + trains


def _trains(p: Problem) -> bool:
    given = [p.q, p.k, p.v, *([] if p.bias is None else [p.bias])]
    given += [] if p.position_bias is None else p.position_bias.parameters()
    if p.pair_mix is not None and torch.is_grad_enabled():
        read = online.reads(p)
        if read is None or read:
            return True
    return torch.is_grad_enabled() and any(z.requires_grad for z in given)


def cost(p: Problem) -> Cost:
    """The stored blocks on accelerators; all scores, passed over again and again, on CPUs."""
    B, H, _, T, S = p.shape
    if p.device_kind == "cpu":
        return Cost(products(p, T * S), 2 * B * H * T * S * passed(p), 200, "not compiled on CPUs", io(p), "unfused")
    density = block_sparse.facts(p, BLOCK, BLOCK).density
    words = f"compiled by torch; {density:.0%} of the blocks hold an allowed pair"
    return Cost(BEHIND * products(p, T * S * density), 0, 60, words, io(p))


def run(p: Problem) -> Float[Tensor, "B H T V"]:
    """What `attention` gives for this problem."""
    return attend(p, compiled=p.q.device.type in ACCELERATORS)


def attend(p: Problem, *, compiled: bool) -> Float[Tensor, "B H T V"]:
    """The same, with or without torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    # On CPUs torch refuses tensors that could want gradients, even where none are recorded.
    q, k, v = (z.detach() if z.is_cpu else z for z in (p.q, p.k, p.v))
    function: Any = _compiled() if compiled else flex_attention
    return function(
        q, k, v, score_mod=_score_mod(p), block_mask=_block_mask(p), scale=p.scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    """One function for all calls, so that torch finds the kernels that it has; new lengths make two more at most."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# --- masks --------------------------------------------------------------------------------------------------------


def _block_mask(p: Problem) -> Any:
    """torch's BlockMask of our layout."""
    if p.mask is None:
        return None
    return of_layout(_layout(p.mask, p.q.shape[2], p.k.shape[2]), _mask_mod(p), p.q.device)


def _mask_mod(p: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask's own predicate. As in `Mask.mask_mod`, but the offset is a tensor: no number ties it to one length."""
    assert p.mask is not None
    mask, shift = p.mask.to(p.q.device), _offset(p, p.k.shape[2] - p.q.shape[2])

    def mask_mod(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return mask(b, h, t + shift, j)

    return mask_mod


def _offset(p: Problem, n: int) -> Int[Tensor, ""]:
    return torch.tensor(n, device=p.q.device)


@remembered(32)
def _layout(mask: Mask, T: int, S: int) -> BlockLayout:
    return mask.layout(T, S, block=BLOCK)


# --- biases -------------------------------------------------------------------------------------------------------


def _score_mod(p: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Adds the position's bias and the tensor bias to a score, and caps it or asks the mix of pairs, which counts from
    the first key."""
    table, bias, cap, mix = None if p.position_bias is None else _table(p), p.bias, p.cap, p.pair_mix
    if table is None and bias is None and cap is None and mix is None:
        return None
    first = _offset(p, p.q.shape[2] - 1)
    key = _offset(p, p.first_key)
    query = _offset(p, p.first_key + p.k.shape[2] - p.q.shape[2])

    def score_mod(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        if table is not None:
            score = score + table[h if table.shape[0] > 1 else 0, j - t + first]
        if bias is not None:
            at = (n if size > 1 else 0 for n, size in zip((b, h, t, j), bias.shape, strict=True))
            score = score + bias[tuple(at)]
        if cap is not None:
            return cap * torch.tanh(score / cap)
        return score if mix is None else mix.pair(score, b, h, t + query, j + key)

    return score_mod


def _table(p: Problem) -> Float[Tensor, "#H n"]:
    """The bias at each distance: one query at S - 1 against keys 0 to S + T - 2 meets all that occur."""
    T, S, device = p.q.shape[2], p.k.shape[2], p.q.device
    i, j = torch.tensor([S - 1], device=device), torch.arange(S + T - 1, device=device)
    rows = Rows(q=p.q[:, :, :1], k=p.k[:, :, :1], scores=p.q.new_empty(0), i=i, j=j)
    assert p.position_bias is not None
    return p.position_bias.bias(rows)[0, :, 0].contiguous()

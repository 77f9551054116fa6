"""The C++ kernel as an operator that torch.compile and autograd know. Masks come as words, numbers and tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.kernels.finite import cleaned, finite
from regard.kernels.native.blocks import walk_of
from regard.kernels.problem import CAUSAL, Problem, scaled
from regard.masks import full
from regard.masks.flat import flatten, unflatten
from regard.tracing import traced_transform

FULL = full()


def run(p: Problem, table: Tensor | None) -> Tensor:
    """(B, H, T, V)."""
    flat = flatten(FULL if p.mask is None else p.mask)
    assert flat is not None
    return scaled(p, *forward(p.q, p.k, p.v, table, p.bias, *flat, p.scale, p.cap))


def why_not(p: Problem) -> list[str]:
    """What an operator can't be handed."""
    reasons = []
    if traced_transform():
        reasons.append("torch.func and forward-mode AD go through torch's own operations only")
    if p.mask is not None and flatten(p.mask) is None:
        reasons.append("torch.compile can't take a mask that is a rule in code into one of regard's operators")
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons


def worth(p: Problem) -> bool:
    """Whether torch's fused kernel would need a tensor of all pairs, look at all of them, or can't do it."""
    return (p.mask is not None and (p.mask != CAUSAL or p.q.size(2) != 1)) or bool(p.stages)


@torch.library.custom_op("regard::native_attention", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None,
    word: str, numbers: Sequence[int], held: Sequence[Tensor], scale: float, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs and log-sum-exp; NaN and inf reach the rows that see them, as everywhere."""
    from regard.kernels.native import outputs

    odd: list[bool] = []
    p = _problem(q, k, v, word, numbers, held, scale)
    walk = walk_of(p.mask, q.shape[2], k.shape[2])
    out, lse = outputs(scale, cap, walk, odd, table, bias, q, k, v)
    if odd[0]:
        clean, hit = cleaned(p)
        out, lse = outputs(scale, cap, walk, odd, table, bias, clean.q, clean.k, clean.v)
        out = out.masked_fill(hit[..., None], torch.nan)
    return out.contiguous(), lse


@forward.register_fake
def _forward_like(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None,
    word: str, numbers: Sequence[int], held: Sequence[Tensor], scale: float, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("regard::native_attention_backward", mutates_args=(), device_types="cpu")
def backward(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    dlse: Tensor | None, word: str, numbers: Sequence[int], held: Sequence[Tensor], scale: float, cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the table (empty where there is none)."""
    from regard.kernels.native import gradients

    p = _problem(q, k, v, word, numbers, held, scale)
    walk = walk_of(p.mask, q.shape[2], k.shape[2])
    given = (q, k, v)
    whole = finite(q, k, v)
    if not whole:  # rows that are NaN have no gradient, nor has what is not finite
        clean, hit = cleaned(p)
        given = (clean.q, clean.k, clean.v)
        out, grad = (x.masked_fill(hit[..., None], 0.0) for x in (out, grad))
        dlse = None if dlse is None else dlse.masked_fill(hit, 0.0)
    dtable, *found = gradients(scale, cap, walk, table, bias, *given, out, lse, grad, dlse, table is not None)
    if not whole:
        found = [g.masked_fill(~x.isfinite().all(-1, keepdim=True), 0.0) for g, x in zip(found, (q, k, v))]
    dq, dk, dv = (g.contiguous() for g in found)
    return dq, dk, dv, q.new_empty(0) if dtable is None else dtable


@backward.register_fake
def _backward_like(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    dlse: Tensor | None, word: str, numbers: Sequence[int], held: Sequence[Tensor], scale: float, cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if table is None else table.new_empty(table.shape)


def _problem(
    q: Tensor, k: Tensor, v: Tensor, word: str, numbers: Sequence[int], held: Sequence[Tensor], scale: float
) -> Problem:
    mask = unflatten(word, numbers, held)
    return Problem(q=q, k=k, v=v, scale=scale, mask=None if mask == FULL else mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, table, bias, ctx.word, ctx.numbers, held, ctx.scale, ctx.cap = inputs
    ctx.save_for_backward(q, k, v, table, bias, *output, *held)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, table, bias, out, lse, *held = ctx.saved_tensors
    mask = (ctx.word, ctx.numbers, held)
    dq, dk, dv, dtable = backward(q, k, v, table, bias, out, lse, dout, dlse, *mask, ctx.scale, ctx.cap)
    numbers: list[None] | None = None if ctx.numbers else []  # torch takes a list of nothing for one of tensors
    return dq, dk, dv, None if table is None else dtable, None, None, numbers, [None] * len(held), None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        'attention: kernel "native" has no second derivatives under torch.compile; expected kernel="eager" for them'
    )


forward.register_autograd(_differentiate, setup_context=_save)
backward.register_autograd(_refuse)

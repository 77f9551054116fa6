"""Softmax attention in C++ for CPUs: block layouts, biases by distance or by tensor, forward and backward.

fp32 on the vector units; bf16 by the CPU's own products of bf16 where it has them (tile registers of AMX, pairs of
AVX-512); else, as fp16 and every backward, computed in fp32 from numbers that are widened block by block. The block
layout is the mask's own; inside a block that is only partly allowed the mask is read from a small bool tile, and masks
that depend on i - j alone share a tile among all blocks on a diagonal. A position whose bias depends on i - j alone is
read from a table with one entry a distance, never from a T x S tensor.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regard.kernels.block_sparse import facts
from regard.kernels.cost import Cost, asked, io, products
from regard.kernels.finite import honest
from regard.kernels.native import build, operator
from regard.kernels.native.blocks import BLOCK, PANEL, Walk, block_of, made, walk, walk_of
from regard.kernels.native.struct import call
from regard.kernels.problem import Problem, attend, beyond_softmax, log_sums, nothing, scaled, softmaxed, uncapped
from regard.stages import Rows
from regard.tracing import exporting

__all__ = ["PANEL", "Walk", "cost", "run", "walk", "why_not", "with_lse"]


def why_not(p: Problem) -> list[str]:
    """Plain softmax on a CPU, in fp32 or below, with additive terms that need no q or k."""
    reasons = []
    if p.device_kind not in ("cpu", "meta"):
        reasons.append(f"tensors on {p.device_kind}, not on the CPU")
    compiling = torch.compiler.is_compiling()
    if not (p.q.is_meta or compiling or build.readable(p.q)):  # of what is on meta only the shape is asked
        reasons.append("it reads memory: no tensor subclasses, no torch.func")
    if exporting():
        reasons.append("torch.export: its programs run without regard")
    if compiling:
        reasons += operator.why_not(p)
    if p.q.dtype == torch.float64:
        reasons.append("float64: it computes in fp32")
    reasons += beyond_softmax(softmaxed(uncapped(p)))
    if p.position_bias is not None and not p.position_bias.by_distance:
        reasons.append(f"the bias of position {type(p.position).__name__} is no function of distance alone")
    if p.bias is not None and p.bias.requires_grad and torch.is_grad_enabled():
        reasons.append("the tensor bias wants a gradient")
    if p.dropout:
        reasons.append("dropout")
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons or build.why_not()


def cost(p: Problem) -> Cost:
    """The stored blocks of each head; of those that are partly masked, about half."""
    T, S = p.shape[3:]
    found = facts(p, BLOCK, BLOCK) if p.mask is None else facts(p, *block_of(p.mask))
    pairs = T * S * found.density * (1 - found.partly / 2)
    tiles, calls = 0.0, 25
    if p.mask is not None and not made.knows(p.mask, T, S):
        calls += 250
        tiles = p.mask.batch * p.mask.heads * asked(p.mask) * T * S * found.density * found.partly
    words = f"C++, {found.density:.0%} of the blocks" if found.density < 1 else "C++"
    return Cost(products(p, pairs), tiles, calls, words, io(p), "native")


def run(p: Problem) -> Tensor:
    """(B, H, T, V), honest about NaN by itself: it sees queries, keys and outputs pass by."""
    if p.q.is_meta:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    if torch.compiler.is_compiling():
        return operator.run(p, _table(p))
    odd: list[bool] = []
    out, lse = _attend(softmaxed(p), None, odd)
    if odd[0]:
        return honest(p, lambda clean: scaled(clean, *with_lse(softmaxed(clean))))
    return scaled(p, out, lse)


def with_lse(p: Problem, walk: Walk | None = None) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T"]]:
    """Outputs, and the log-sum-exp of each row's scores in fp32: -inf where a row sees nothing. Both can be
    differentiated. A walk over other blocks may stand in for the mask's; it can't be differentiated twice."""
    return _attend(p, walk, [])


def _attend(p: Problem, walk: Walk | None, odd: list[bool]) -> tuple[Tensor, Tensor]:
    """The same; `odd` is told whether a query, a key or an output was NaN or infinite."""
    out, lse = _Native.apply(p, walk, odd, _table(p), p.bias, p.q, p.k, p.v)
    return out, lse


def _table(p: Problem) -> Float[Tensor, "#H T+S-1"] | None:
    """The position's bias by distance: one query at S - 1 against keys 0 .. S + T - 2 meets every one that occurs."""
    if p.position_bias is None:
        return None
    T, S = p.shape[3:]
    i, j = torch.arange(S - 1, S, device="cpu"), torch.arange(S + T - 1, device="cpu")
    rows = Rows(q=p.q[:, :, :1], k=p.k[:, :, :1], scores=p.q.new_zeros(0), i=i, j=j)
    return p.position_bias.bias(rows).float()[0, :, 0].contiguous()


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        p: Problem,
        other: Walk | None,
        odd: list[bool],
        table: Tensor | None,
        bias: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        walk = other or walk_of(p.mask, q.shape[2], k.shape[2])
        out, lse = outputs(p.scale, p.cap, walk, odd, table, bias, q, k, v)
        ctx.problem, ctx.walk, ctx.by_mask = p, walk, other is None
        ctx.save_for_backward(table, bias, q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        table, bias, q, k, v, out, lse = ctx.saved_tensors
        given = (q, k, v)
        grad = torch.zeros_like(out) if grad is None else grad
        if torch.is_grad_enabled():
            return None, None, None, *_with_graph(ctx, grad, dlse, table, bias, *given)
        p, wants = ctx.problem, ctx.needs_input_grad[3]
        dtable, *found = gradients(p.scale, p.cap, ctx.walk, table, bias, *given, out, lse, grad, dlse, wants)
        return None, None, None, dtable, None, *found


def outputs(
    scale: float, cap: float | None, walk: Walk, odd: list[bool], table: Tensor | None, bias: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the C++ makes of these numbers, in q's dtype, and the log-sum-exp."""
    lib = build.library()
    has = lib.regard_bf16() if q.dtype == torch.bfloat16 else 0
    x, y, z = (_vectors(_known(t), 32 if has else lib.regard_lanes()) for t in (q, k, v))
    out = z.new_empty(*x.shape[:3], z.shape[3])
    lse = torch.empty(x.shape[:3], dtype=torch.float32, device="cpu")
    name = "regard_attention_bf16" if has else "regard_attention"
    flag = torch.zeros(1, dtype=torch.int32, device="cpu")
    bias = None if bias is None else bias.float()
    made: dict[str, Any] = {"out": out, "lse": lse, "odd": flag, "packed": bool(has), "amx": has == 2}
    call(name, scale, cap, walk, table, bias, q=x, k=y, v=z, **made)
    odd.append(bool(flag))
    return out[..., : v.shape[3]].to(q.dtype), lse


def gradients(
    scale: float, cap: float | None, walk: Walk, table: Tensor | None, bias: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, dlse: Tensor | None, wants_table: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of the table, where it wants one, and of q, k and v."""
    given = (q, k, v)
    lanes = build.library().regard_lanes()
    q, k, v, out, grad = (_vectors(_known(t), lanes) for t in (*given, out, grad.to(q.dtype)))
    tasks = q.shape[0] * k.shape[1]
    parts = max(1, min(-(-2 * torch.get_num_threads() // tasks), -(-k.shape[2] // walk.block[1])))
    dq = torch.zeros(parts, *q.shape, dtype=torch.float32, device="cpu")  # sums of several parts
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (k, v))
    dtable = None
    if table is not None and wants_table:
        dtable = dq.new_zeros(parts, q.shape[0], q.shape[1], q.shape[2] + k.shape[2] - 1)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    dlse = None if dlse is None else dlse.contiguous()
    made: dict[str, Any] = {"grad": grad, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv, "dtable": dtable, "parts": parts}
    bias = None if bias is None else bias.float()
    call("regard_attention_backward", scale, cap, walk, table, bias, **inputs, **made)
    if dtable is not None and table is not None:
        dtable = dtable.sum((0, 1)).sum_to_size(table.shape)
    dq, dk, dv = (
        x[..., : t.shape[3]].to(t.dtype)
        for x, t in zip((dq.sum(0) if parts > 1 else dq[0], dk, dv), given, strict=True)
    )
    return dtable, dq, dk, dv


def _with_graph(ctx: Any, grad: Tensor, dlse: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again: that takes the whole score matrix."""
    if not ctx.by_mask:
        raise RuntimeError("native kernel: no second derivative with blocks of one's own")
    table, bias, q, k, v = tensors
    p = replace(ctx.problem, q=q, k=k, v=v, bias=bias, position=None)
    T, S = p.shape[3:]
    if table is not None:
        by_pair = table[:, p.j - p.i[:, None] + S - 1][None]
        p = replace(p, bias=by_pair if bias is None else by_pair + bias)
    outs, grads = [attend(p, slice(0, T), slice(0, S))], [grad]
    if dlse is not None:
        outs, grads = [*outs, log_sums(p)], [*grads, dlse]
    needed = [x if need else None for x, need in zip(tensors, ctx.needs_input_grad[3:], strict=True)]
    wanted = [x for x in needed if x is not None]
    got = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [None if x is None else next(got) for x in needed]


def _known(x: Tensor) -> Tensor:
    """x in a dtype that the C++ reads: fp32, bf16, and on most processors fp16."""
    known = (torch.float32, torch.bfloat16, torch.float16)[: 3 if build.library().regard_fp16() else 2]
    return x if x.dtype in known else x.float()


def _vectors(x: Tensor, lanes: int) -> Tensor:
    """x with a width of whole vectors and a contiguous last axis."""
    x = F.pad(x, (0, -x.shape[3] % lanes)) if x.shape[3] % lanes else x
    return x if x.stride(3) == 1 else x.contiguous()

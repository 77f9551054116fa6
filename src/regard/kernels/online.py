"""Softmax attention tile by tile: a running softmax forward, tiles recomputed from the log-sum-exp backward.

    forward    m' = max(m, max_j s);  n <- e^(m-m') n + e^(s-m') v;  d <- e^(m-m') d + sum_j e^(s-m');  out = n / d
    backward   p = e^(s - lse),  dv += p^T do,  ds = p (do v^T - sum_v(do out)),  dq += ds k scale,  dk += ds^T q scale

Rabe, Staats 2021, https://arxiv.org/abs/2112.05682, section 3 (forward); the backward from the kept log-sum-exp is
Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.2. No tile outlives its turn in either direction.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels.problem import (
    Problem,
    attend,
    combine,
    dots,
    log_sums,
    position_bias,
    rectangle,
    scaled,
    softmaxed,
)
from regard.masks.verdict import Tiles
from regard.rules import Watch
from regard.stages import Mix, Position, Rows

QUERIES, KEYS = 256, 1024
"""Tile sizes: large enough for the matrix products to run at full speed, small enough to stay near the cache."""


def reads(p: Problem) -> list[Tensor] | None:
    """The tensors with gradients that the mix of pairs reads, its own and those it closes over. None where not all can
    be told, so that only autograd itself would find them."""
    if p.pair_mix is None or not torch.is_grad_enabled():
        return []
    rows = rectangle(replace(p, mask=None), slice(0, 2), slice(0, 2), scored=False)
    wide = torch.promote_types(p.q.dtype, torch.float32)
    return p.pair_mix.reads(p.q.new_zeros(*p.q.shape[:2], len(rows.i), len(rows.j), dtype=wide), rows)


def online(p: Problem, rows: int, keys: int, read: Sequence[Tensor] = ()) -> Float[Tensor, "B H T V"]:
    """Attention in tiles of `rows` x `keys`, with at most an additive bias, a soft cap or what is done to single pairs,
    and a softmax scaled by rows.

    Args:
        read: as `reads` tells.
    """
    bias = [] if p.bias is None else [p.bias]
    parameters = [] if p.position_bias is None else list(p.position_bias.parameters())
    rest = (len(bias), read)
    out, lse = _Online.apply(softmaxed(p), rows, keys, rest, p.q, p.k, p.v, *bias, *parameters, *read)
    return scaled(p, out, lse[..., 0])


class _Online(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Problem, rows: int, keys: int, rest: tuple[int, Sequence[Tensor]], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, _, v = tensors[:3]
        wide = torch.promote_types(q.dtype, torch.float32)
        out = v.new_empty(*q.shape[:3], v.shape[3], dtype=wide)
        lse = q.new_empty(*q.shape[:3], 1, dtype=wide)
        for at, tiles in tiling(p, rows, keys):
            shape = (*q.shape[:2], at.stop - at.start, 1)
            top, total = q.new_full(shape, -math.inf, dtype=wide), q.new_zeros(shape, dtype=wide)
            mixed = q.new_zeros(*shape[:3], v.shape[3], dtype=wide)
            for part, full in tiles:
                scores = _masked(p, _scores(p, at, part), at, part, full)
                new = torch.maximum(top, scores.amax(-1, keepdim=True))
                base = torch.where(new == -math.inf, 0.0, new)
                weights, keep = (scores - base).exp_(), (top - base).exp_()
                mixed = mixed.mul_(keep).add_(combine(weights, v[:, :, part]))
                total = total.mul_(keep).add_(weights.sum(-1, keepdim=True))
                top = new
            lse[:, :, at] = top + total.log()
            out[:, :, at] = torch.where(total > 0, mixed / total, 0.0)
        ctx.problem, ctx.sizes, (ctx.biases, ctx.read) = p, (rows, keys), rest
        # Kept unrounded: what backward takes from dp would not cancel against it otherwise.
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out.to(v.dtype), lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, *others = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        behind = len(others) - len(ctx.read)
        biases, parameters = others[: ctx.biases], others[ctx.biases : behind]
        p = replace(ctx.problem, q=q, k=k, v=v, bias=biases[0] if biases else None)
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[4:]
            return None, None, None, None, *_with_graph(p, grad, dlse, (q, k, v, *others), needed, ctx.read)
        mixed = None if p.pair_mix is None else _Mixed(p.pair_mix, ctx.read)
        wide = lse.dtype
        dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
        extra = [torch.zeros_like(t, dtype=wide) for t in others]
        for at, tiles in tiling(p, *ctx.sizes):
            do = grad[:, :, at].to(wide)
            delta = (do * out[:, :, at]).sum(-1, keepdim=True)
            if dlse is not None:
                delta -= dlse[:, :, at]
            # A row that saw nothing has lse -inf; any finite stand-in gives weights e^(-inf) = 0.
            norm = torch.where(lse[:, :, at] == -math.inf, 0.0, lse[:, :, at])
            for part, full in tiles:
                scores = _masked(p, _scores(p, at, part, mixed), at, part, full)
                # Masked ones are -inf, which 0 weight would make NaN.
                slope = None if p.cap is None else 1 - (scores / p.cap).clamp_(min=-1).square_()
                weights = (scores - norm).exp_()
                dv[:, :, part] += _per_key(weights, do, k.shape[1])
                ds = weights.mul_(dots(do, v[:, :, part]).sub_(delta))
                ds = ds if slope is None else ds.mul_(slope)
                if mixed is not None:
                    ds = mixed.backward(ds, extra[behind:])
                    if not full and p.mask is not None:  # where a function's slope may be NaN
                        ds.masked_fill_(~p.mask.at(p.i[at], p.j[part]), 0.0)
                if p.bias is not None and ctx.needs_input_grad[7]:
                    _add_bias_grad(extra[0], ds, at, part)
                if p.position_bias is not None:
                    own = extra[ctx.biases : behind]
                    _add_position_grads(p.position_bias, p, ds, at, part, dq, dk, own, parameters)
                ds = ds.mul_(p.scale)
                dq[:, :, at] += combine(ds, k[:, :, part])
                dk[:, :, part] += _per_key(ds, q[:, :, at], k.shape[1])
        grads = [g.to(t.dtype) for g, t in zip((dq, dk, dv, *extra), (q, k, v, *others), strict=True)]
        return None, None, None, None, *grads


def _with_graph(
    p: Problem,
    grad: Tensor,
    dlse: Tensor | None,
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    read: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again: that takes the whole score matrix."""
    own = [t.view_as(t) for t in read]  # stand-ins, as in `_Mixed`
    tensors = [*tensors[: len(tensors) - len(read)], *own]
    with Watch(swap={id(t): stand_in for t, stand_in in zip(read, own, strict=True)}) if read else nullcontext():
        outs, grads = [attend(p, slice(0, p.q.shape[2]), slice(0, p.k.shape[2]))], [grad]
        if dlse is not None:
            outs, grads = [*outs, log_sums(p)[..., None]], [*grads, dlse]
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    got = iter(torch.autograd.grad(outs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(got) if need else None for need in needed]


def tiling(p: Problem, rows: int, keys: int) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Query chunks, and for each the key chunks that may hold an allowed pair, with whether all of theirs are."""
    T, S = p.q.shape[2], p.k.shape[2]
    starts = torch.arange(0, S, keys, device="cpu")
    first_query = p.first_key + S - T
    for start in range(0, T, rows):
        at = slice(start, min(start + rows, T))
        parts = [slice(j, min(j + keys, S)) for j in starts.tolist()]
        if p.mask is None:
            yield at, [(part, True) for part in parts]
            continue
        i_lo, i_hi = (torch.tensor(first_query + n, device="cpu").view(1, 1, 1, 1) for n in (at.start, at.stop - 1))
        j_lo, j_hi = (n.view(1, 1, 1, -1) + p.first_key for n in (starts, (starts + keys).clamp(max=S) - 1))
        verdict = p.mask.to("cpu").judge(Tiles(i_lo, i_hi, j_lo, j_hi))
        # Masks that differ by batch row or head answer for each; a tile counts if any needs it.
        may = verdict.may.reshape(-1, verdict.may.shape[-1]).any(0).expand(len(parts))
        full = verdict.full.reshape(-1, verdict.full.shape[-1]).all(0).expand(len(parts))
        yield at, [(part, bool(f)) for part, m, f in zip(parts, may, full, strict=True) if m]


class _Mixed:
    """The mix of pairs in a backward pass: its graph over one tile, and what flows back through that.

    What it reads is put in by stand-ins, so that gradients stop there: of what was read, some may have been made of the
    rest.
    """

    def __init__(self, mix: Mix, read: Sequence[Tensor]) -> None:
        self.mix, self.read = mix, [t.detach().requires_grad_() for t in read]
        self.swap = {id(t): own for t, own in zip(read, self.read, strict=True)}

    def forward(self, scores: Tensor, rows: Rows) -> Tensor:
        with torch.enable_grad(), Watch(swap=self.swap):
            self.given = scores.detach().requires_grad_()
            self.made = self.mix(self.given, rows)
        return self.made.detach()

    def backward(self, ds: Tensor, totals: Sequence[Tensor]) -> Tensor:
        """The gradient of the scores before; those of what was read are added to `totals`."""
        if not self.made.requires_grad:
            return torch.zeros_like(ds)
        first, *rest = torch.autograd.grad(self.made, [self.given, *self.read], ds, allow_unused=True)
        for total, got in zip(totals, rest, strict=True):
            if got is not None:
                total += got
        return torch.zeros_like(ds) if first is None else first


def _scores(p: Problem, at: slice, part: slice, mixed: _Mixed | None = None) -> Float[Tensor, "B H t s"]:
    """Scaled scores with bias, cap and what is done to single pairs; `mixed` keeps the graph of that."""
    scores = dots(p.q[:, :, at], p.k[:, :, part]).mul_(p.scale)
    if p.position_bias is not None:
        scores += position_bias(p, rectangle(p, at, part, scored=False), at, part)
    if p.bias is not None:
        scores += _slice(p.bias, at, part)
    if p.cap is not None:
        scores = scores.div_(p.cap).tanh_().mul_(p.cap)
    if p.pair_mix is not None:
        rows = rectangle(replace(p, mask=None), at, part, scored=False)
        return p.pair_mix(scores, rows) if mixed is None else mixed.forward(scores, rows)
    return scores


def _masked(p: Problem, scores: Tensor, at: slice, part: slice, full: bool) -> Tensor:
    """-inf where masked."""
    if full or p.mask is None:
        return scores
    masked = ~p.mask.at(p.i[at], p.j[part])
    # What a function gave may be its own tensor, repeated.
    return scores.masked_fill_(masked, -math.inf) if p.pair_mix is None else scores.masked_fill(masked, -math.inf)


def _slice(bias: Tensor, at: slice, part: slice) -> Tensor:
    bias = bias if bias.shape[2] == 1 else bias[:, :, at]
    return bias if bias.shape[3] == 1 else bias[..., part]


def _per_key(weights: Float[Tensor, "B H t s"], z: Float[Tensor, "B H t D"], groups: int) -> Tensor:
    """weights^T z, summed over the query heads of each group: (B, G, s, D)."""
    B, H, t, s = weights.shape
    rows = H // groups * t
    return weights.reshape(B, groups, rows, s).mT @ z.to(weights.dtype).reshape(B, groups, rows, -1)


def _add_bias_grad(total: Tensor, ds: Tensor, at: slice, part: slice) -> None:
    target = _slice(total, at, part)
    target += ds.sum_to_size(target.shape)


def _add_position_grads(
    position: Position,
    p: Problem,
    ds: Tensor,
    at: slice,
    part: slice,
    dq: Tensor,
    dk: Tensor,
    extra: list[Tensor],
    parameters: list[Tensor],
) -> None:
    """What flows through the position's bias: to its parameters, and to q and k if it reads them."""
    with torch.enable_grad():
        q, k = (t.detach().requires_grad_() for t in (p.q[:, :, at], p.k[:, :, part]))
        rows = replace(rectangle(p, at, part, scored=False), q=q, k=k)
        bias = position.bias(rows)
    if not bias.requires_grad:
        return
    wanted = [t for t in parameters if t.requires_grad]
    got = torch.autograd.grad(bias, [q, k, *wanted], ds.sum_to_size(bias.shape).to(bias.dtype), allow_unused=True)
    targets = [
        dq[:, :, at],
        dk[:, :, part],
        *(e for e, t in zip(extra, parameters, strict=True) if t.requires_grad),
    ]
    for target, g in zip(targets, got, strict=True):
        if g is not None:
            target += g

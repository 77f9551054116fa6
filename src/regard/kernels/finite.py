"""NaN and infinity: who looks for them, and which rows they reach."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.kernels.problem import CAUSAL, FULL, Problem
from regard.masks import Mask
from regard.masks.algebra import And
from regard.masks.tensors import Kept, Lengths

SMALL = 4096
"""Entries up to which joining three tensors is cheaper than two more calls."""


def honest(p: Problem, run: Callable[[Problem], Tensor]) -> Tensor:
    """Run a kernel so that NaN and inf reach exactly the rows that may see them: never hidden, never through a mask.

    A kernel multiplies masked weights (0) with whatever stands in the masked slot, and 0 * NaN is NaN; torch's CPU
    flash kernel on the other hand turns NaN queries into 0. So non-finite slots are zeroed first, and the rows that
    see one are set to NaN afterwards. Looking for them costs one sum over each input; where nobody may look (while
    compiling, for one) all of it is done unasked. On accelerators, where a look would wait for the device, it is left
    out of eager calls.
    """
    if p.readable and (not p.q.is_cpu or finite(p.q, p.k, p.v)):
        return run(p)
    clean, hit = cleaned(p)
    return run(clean).masked_fill(hit[..., None], math.nan)


def cleaned(p: Problem) -> tuple[Problem, Bool[Tensor, "B H T"]]:
    """The problem with zeros for what is not finite, and the rows that see such."""
    bad_q, bad_k = ~_rows_finite(p.q), ~(_rows_finite(p.k) & _rows_finite(p.v))
    clean = replace(p, q=_zero(p.q, bad_q), k=_zero(p.k, bad_k), v=_zero(p.v, bad_k))
    if p.x is not None and p.context is not None:
        clean = replace(clean, x=_zero(p.x, bad_q.any(1)), context=_zero(p.context, bad_k.any(1)))
    if p.unturned is not None:
        clean = replace(clean, unturned=_zero(p.unturned, bad_q))
    if p.across:  # heads (and a mix's earlier rows) read each other
        bad_q, bad_k = (
            bad_q.any(1, keepdim=True).expand_as(bad_q),
            bad_k.any(1, keepdim=True).expand_as(bad_k),
        )
    hit = sees(p.mask, p.i, p.j, bad_q, bad_k.repeat_interleave(p.q.shape[1] // p.k.shape[1], 1))
    return clean, hit if p.memory is None else hit | bad_q  # everybody sees a memory


def sees(mask: Mask | None, i: Tensor, j: Tensor, bad_q: Tensor, bad_k: Tensor) -> Tensor:
    """Which query rows (B, H, T) attend to anything while bad themselves, or attend to a bad key (B, H, S)."""
    anything, bad = reaches(mask, i, j, torch.ones_like(bad_k), bad_k)
    return (bad_q & anything) | bad


def reaches(
    mask: Mask | None, i: Int[Tensor, " t"], j: Int[Tensor, " s"], *marked: Bool[Tensor, "B H s"], chunk: int = 1024
) -> list[Bool[Tensor, "B H t"]]:
    """Which queries may attend to any marked key, for each of the marks. Takes t x s steps only where the mask is more
    than causality and padding, and then looks at it once."""
    if mask is None or j.numel() == 0:
        return [m.any(-1, keepdim=True).expand(-1, -1, i.shape[0]) for m in marked]
    others: list[Mask] = []
    past = False
    for part in mask.parts if isinstance(mask, And) else (mask,):
        if isinstance(part, Kept | Lengths):
            kept = part.at(j[-1:], j)[:, :, 0]
            marked = tuple(m & kept for m in marked)
        elif part == CAUSAL:
            past = True
        elif part != FULL:
            others.append(part)
    if not others:
        if not past:
            return [m.any(-1, keepdim=True).expand(-1, -1, i.shape[0]) for m in marked]
        last = i - j[0]  # the place of the last key that each query may see
        at = last.clamp(0, j.shape[0] - 1)
        return [(m.cumsum(-1)[..., at] > 0) & (last >= 0) for m in marked]
    rest = And((*others, CAUSAL)) if past else others[0] if len(others) == 1 else And(tuple(others))

    def hit(rows: Tensor) -> list[Tensor]:
        allowed = rest.at(rows, j)
        return [(allowed & m[:, :, None]).any(-1) for m in marked]

    if torch.compiler.is_compiling():  # a loop would tie the graph to one length
        return hit(i)
    hits = [hit(i[n : n + chunk]) for n in range(0, max(1, i.shape[0]), chunk)]
    return [torch.cat(found, -1) for found in zip(*hits, strict=True)]


def finite(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing here is NaN or inf. A sum that overflows is a false alarm, and only costs time."""
    if q.numel() <= SMALL and q.shape == k.shape == v.shape:
        return all_finite(torch.cat((q, k, v)))  # a call costs more than the copy
    return all_finite(q) and all_finite(k) and all_finite(v)


def all_finite(t: Tensor) -> bool:
    """Whether the sum is, which is only so if all are."""
    # float16 alone overflows too easily.
    total = t.sum(dtype=torch.float32) if t.dtype == torch.float16 else t.sum()
    return math.isfinite(total.item())


def _rows_finite(t: Tensor) -> Tensor:
    return t.detach().isfinite().all(-1)


def _zero(t: Tensor, bad: Tensor) -> Tensor:
    return t.masked_fill(bad[..., None], 0.0)

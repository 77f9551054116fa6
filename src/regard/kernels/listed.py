"""Exact attention where queries, or runs of them, picked single keys: no tile of the score matrix is worth a visit.

A run gathers the keys of its list and sees nothing else, in C++ or by torch's own operations, some runs at a time.
What the queries of a run see of one key is an interval, so that causality, windows, padding and keys that go out of
sight for good need no mask of pairs.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.cost import Cost, io, products, rates, reached
from regard.kernels.native import PANEL, build
from regard.kernels.native.listed import FAR, Lists, gradients, outputs
from regard.kernels.problem import Problem, nothing, softmax
from regard.masks import Mask
from regard.masks.algebra import And, Or
from regard.masks.content import remembered
from regard.masks.lists import Lasting, Listed
from regard.masks.patterns import Diagonals, Prefix
from regard.masks.selection import Chosen
from regard.masks.tensors import Kept, Lengths
from regard.tracing import exporting

RUN = 64
"""Queries that gather keys together where all see nearly the same."""
ALONE = 8
"""Queries from which on the C++ multiplies matrices (as in listed.cpp)."""
BYTES = 64 * 2**20
"""Keys and values gathered at once by torch's operations stay within this."""


class Found(NamedTuple):
    """What such a mask is made of."""

    source: Listed | Lasting | Chosen
    every: list[Mask]
    """What everything that is seen must satisfy."""
    besides: list[Mask]
    """What is seen besides."""


def why_not(p: Problem) -> list[str]:
    """Single keys that were picked, perhaps with a window and first keys; plain softmax, perhaps with a bias."""
    found = found_in(p.mask)
    if found is None:
        return ["no mask in which queries picked single keys"]
    source, sizes = found.source, tuple(p.shape[3:])
    if not isinstance(source, Lasting) and sizes != (source.T, source.S):
        return [f"what was picked is for {source.T} queries and {source.S} keys"]
    reasons = [f"{type(s).__name__}: only plain softmax" for s in p.stages]
    if p.device_kind not in ("cpu", "meta"):
        reasons.append(f"tensors on {p.device_kind}, not on the CPU")
    if exporting() or torch.compiler.is_compiling():
        reasons.append("torch.compile and torch.export: how much it gathers depends on what was picked")
    elif not (p.q.is_meta or p.readable):
        reasons.append("it looks at what was picked: not where there are no numbers")
    if p.first_key:
        reasons.append("the cache has dropped keys already; what is left is dense")
    return reasons


def cost(p: Problem) -> Cost:
    """The pairs that are listed, whether or not they are seen in the end, with keys and values gathered."""
    found = found_in(p.mask)
    assert found is not None
    B, H, _, T, S = p.shape
    run, entries = _entries(found, T, S)
    pairs = float(run * entries)
    for part in found.besides:
        pairs += T * float(min(S, part.n if isinstance(part, Prefix) else sum(part.span) + run))
    gathered = 4.0 * B * H * pairs / min(run, 2 * RUN) * (p.q.shape[3] + p.v.shape[3])
    words = f"{pairs / max(1, T * S):.1%} of the pairs, picked key by key"
    if not in_cpp(p):
        return Cost(products(p, pairs), (6 if run >= ALONE else 40) * gathered, 100, words, io(p), "unfused")
    if run < ALONE:
        return Cost(products(p, pairs), 0, 60, words, io(p), "single keys")
    return Cost(products(p, pairs), gathered, 60, words, io(p), "listed")


def apart(p: Problem) -> bool:
    """Whether so little was picked that everything within the mask's bounds, even on the quickest kernel, would take
    twice as long: then no other need be asked for its price, which takes as long as choosing."""
    dense = Cost(products(p, reached(p, 128)), 0, 0, "", 0, "native")
    return 2 * rates().seconds(cost(p)) < rates().seconds(dense)


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    T, S = p.shape[3:]
    if p.q.is_meta:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    assert p.mask is not None
    lists = made(p.mask.to("cpu"), T, S)
    if in_cpp(p):
        out: Tensor = _Listed.apply(p, lists, p.bias, p.q, p.k, p.v)
        return out
    return plain(p, lists)


def in_cpp(p: Problem) -> bool:
    """Whether the C++ can run it: without dropout, in fp32 or less, with a bias that is the same for all queries."""
    if p.dropout or p.q.dtype == torch.float64 or (p.bias is not None and p.bias.shape[2] > 1):
        return False
    return (p.q.is_meta or all(map(build.readable, (p.q, p.k, p.v)))) and not build.why_not()


def found_in(mask: Mask | None) -> Found | None:
    """The parts of a mask of single keys; None where it is none, or more than the lists can say."""
    if mask is None:
        return None
    source: Listed | Lasting | Chosen | None = None
    every: list[Mask] = []
    besides: list[Mask] = []
    for part in mask.parts if isinstance(mask, And) else (mask,):
        if isinstance(part, Kept | Lengths) or _band(part):
            every.append(part)
            continue
        joined = list(part.parts) if isinstance(part, Or) else [part]
        picked = [
            m for m in joined if isinstance(m, Listed | Lasting) or (isinstance(m, Chosen) and m.block[1] < PANEL)
        ]
        others = [m for m in joined if m not in picked]
        if source is not None or len(picked) != 1 or (others and isinstance(picked[0], Lasting)):
            return None
        bands = [m for m in others if _band(m)]
        if len(bands) > 1 or any(m not in bands and not isinstance(m, Prefix) for m in others):
            return None
        if any(-m.span[0] == m.span[1] or torch.inf in m.span for m in bands):
            return None
        source, besides = picked[0], others
    return None if source is None else Found(source, every, besides)


def _band(mask: Any) -> bool:
    return isinstance(mask, Diagonals) and mask.step == 1


def _entries(found: Found, T: int, S: int) -> tuple[int, float]:
    """Queries of a run, and keys in all lists of a head together."""
    source = found.source
    if isinstance(source, Listed):
        return source.run, float(source.keys.shape[2] * source.keys.shape[3])
    heads = max(1, source.batch * source.heads)
    if isinstance(source, Chosen):
        return source.block[0], float(source.tiles.sum()) / heads * source.block[1]
    age = source.until.clamp(max=S) - torch.arange(source.until.shape[2], device=source.until.device)
    return RUN, float(age.clamp(min=0).sum()) / heads / RUN + S


@remembered(4)
def made(mask: Mask, T: int, S: int) -> Lists:
    """The lists of a mask of that kind."""
    found = found_in(mask)
    assert found is not None
    back, ahead, keep = FAR, FAR, None
    for part in found.every:
        if isinstance(part, Kept | Lengths):
            last = torch.arange(S, device="cpu")
            hidden = part.at(last[-1:], last)[:, 0, 0] if S else torch.ones(1, 0, dtype=torch.bool, device="cpu")
            keep = hidden if keep is None else keep & hidden
        else:
            back, ahead = min(back, _whole(part.span[0])), min(ahead, _whole(part.span[1]))
    prefix = max([part.n for part in found.besides if isinstance(part, Prefix)], default=0)
    near = [(int(part.span[0]), int(part.span[1])) for part in found.besides if not isinstance(part, Prefix)]
    lists = _of(found.source, T, S, min(ahead, T + S))
    keep = None if keep is None else keep.contiguous()
    return lists._replace(back=back, ahead=ahead, keep=keep, prefix=prefix, near=near[0] if near else (-1, 0))


def _whole(n: float) -> int:
    return FAR if n == torch.inf else int(n)


def _of(source: Listed | Lasting | Chosen, T: int, S: int, ahead: int) -> Lists:
    heads = (source.batch, source.heads)
    if isinstance(source, Listed):
        return Lists(source.run, heads, source.keys.int().contiguous(), most=source.keys.shape[3])
    if isinstance(source, Chosen):
        tiles, (bq, bk) = source.tiles, source.block
        ptr = F.pad(tiles.sum(3).flatten().cumsum(0), (1, 0)) * bk
        cols = tiles.flatten().nonzero()[:, 0].remainder(max(1, tiles.shape[3])).int()
        if bk > 1:
            cols = (cols[:, None] * bk + torch.arange(bk, device="cpu", dtype=torch.int32)).flatten()
        return Lists(bq, heads, cols, ptr)
    # A key is listed by all runs between its first query and its last.
    until, j, n = source.until.int().contiguous(), torch.arange(S, device="cpu"), -(-T // RUN)
    if until.shape[2] < S:
        until = F.pad(until, (0, S - until.shape[2]))
    first = (j - ahead - (S - T)).clamp(min=0).expand_as(until)
    end = (until.long() - (S - T)).clamp(max=T)
    count = torch.where(end > first, (end - 1) // RUN - first // RUN + 1, 0).flatten()
    start = count.cumsum(0) - count
    line = torch.arange(until.shape[:2].numel(), device="cpu").repeat_interleave(S) * n + (first // RUN).flatten()
    line = line.repeat_interleave(count) + torch.arange(int(count.sum()), device="cpu") - start.repeat_interleave(count)
    cols = j.int().repeat(until.shape[:2].numel()).repeat_interleave(count)
    ptr = F.pad(line.bincount(minlength=until.shape[:2].numel() * n).cumsum(0), (1, 0))
    return Lists(RUN, heads, cols[line.argsort(stable=True)].contiguous(), ptr, until=until.contiguous())


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Problem, lists: Lists, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = outputs(p.scale, lists, bias, q, k, v)
        ctx.problem, ctx.lists = p, lists
        ctx.save_for_backward(bias, q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias, q, k, v, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            tensors = (bias, q, k, v)
            wanted = [x for x, need in zip(tensors, ctx.needs_input_grad[2:], strict=True) if need]
            got = iter(torch.autograd.grad(plain(ctx.problem, ctx.lists), wanted, grad, create_graph=True))
            return None, None, *(next(got) if need else None for need in ctx.needs_input_grad[2:])
        wants = bool(ctx.needs_input_grad[2])
        return None, None, *gradients(ctx.problem.scale, ctx.lists, bias, q, k, v, out, lse, grad, wants)


def plain(p: Problem, lists: Lists) -> Tensor:
    """The same by torch's own operations, keys gathered for some runs at a time."""
    B, H, _, T, _ = p.shape
    n, dtype = -(-T // lists.run), p.v.dtype
    wide = torch.promote_types(p.q.dtype, torch.float32)  # gradients of keys are summed in it, too
    p = replace(p, q=p.q.to(wide), k=p.k.to(wide), v=p.v.to(wide))
    longest = lists.most if lists.ptr is None else int(lists.ptr.diff().max()) if len(lists.ptr) > 1 else 0
    longest = max(1, longest + lists.prefix + max(0, sum(lists.near) + lists.run))
    each = 4 * B * H * longest * (p.q.shape[3] + p.v.shape[3] + 2 * lists.run)
    outs = []
    for runs in torch.arange(n, device="cpu").split(max(1, BYTES // max(1, each))):
        if torch.is_grad_enabled():  # keys gathered are many times the inputs
            out = checkpoint(_some, p, lists, runs, use_reentrant=False, preserve_rng_state=p.dropout > 0)
        else:
            out = _some(p, lists, runs)
        outs.append(out)
    return (torch.cat(outs, 2) if outs else nothing(p, *p.q.shape[:3], p.v.shape[3])).to(dtype)


def _some(p: Problem, lists: Lists, runs: Int[Tensor, " n"]) -> Float[Tensor, "B H t V"]:
    """Outputs of these runs, which stand side by side."""
    (B, H, G, T, S), run = p.shape, lists.run
    j, free = _keys(lists, runs, T, S)
    t = runs[:, None] * run + torch.arange(run, device="cpu")  # (n, run)
    allowed = _allowed(lists, j, free, t, T, S).expand(B, H, *t.shape, -1)
    at = j.clamp(0, S - 1).expand(B, H, -1, -1)
    row = torch.arange(B, device="cpu")[:, None] * G + torch.arange(H, device="cpu") // (H // G)
    flat = ((row * S)[..., None, None] + at).flatten()
    keys, values = (z.flatten(0, 2).index_select(0, flat).view(*at.shape, z.shape[3]) for z in (p.k, p.v))
    first, end = int(t[0, 0]), min(T, int(t[-1, -1]) + 1)
    q = F.pad(p.q[:, :, first:end], (0, 0, 0, t.numel() - (end - first))).unflatten(2, t.shape)
    scores = q @ keys.mT * p.scale
    if p.bias is not None:
        bias = p.bias.to(p.q.dtype).expand(B, H, -1, S)
        if bias.shape[2] == 1:
            scores = scores + bias[:, :, 0].gather(2, at.flatten(2)).view(at.shape).unsqueeze(3)
        else:
            rows = bias[:, :, t.clamp(max=T - 1)]
            scores = scores + rows.gather(4, at.unsqueeze(3).expand(-1, -1, -1, run, -1))
    gone = scores.detach() == -torch.inf  # by the bias
    weights = softmax(scores.masked_fill(gone, 0.0), allowed & ~gone)
    if p.dropout:
        weights = F.dropout(weights, p.dropout)
    return (weights @ values).flatten(2, 3)[:, :, : end - first]


def _keys(lists: Lists, runs: Tensor, T: int, S: int) -> tuple[Int[Tensor, "b h n k"], Bool[Tensor, "b h n k"]]:
    """Keys that these runs may see, each once, -1 where there is none; and whether all of the run may."""
    (Bm, Hm), n = lists.heads, -(-T // lists.run)
    if lists.ptr is None:
        held = lists.cols.view(Bm, Hm, n, lists.most)[:, :, runs].long()
    else:
        ptr = lists.ptr.view(-1)
        line = torch.arange(Bm * Hm, device="cpu").view(Bm, Hm, 1) * n + runs
        count = ptr[line + 1] - ptr[line]
        place = torch.arange(-(-int(count.max()) // RUN) * RUN if count.numel() else 0, device="cpu")
        at = (ptr[line][..., None] + place).clamp(max=max(0, len(lists.cols) - 1))
        held = torch.where(place < count[..., None], lists.cols[at].long() if len(lists.cols) else at, -1)
    back, ahead = lists.near
    away = torch.arange(-back, lists.run + ahead, device="cpu") if back + ahead >= 0 else runs.new_zeros(0)
    first = torch.arange(min(lists.prefix, S), device="cpu").expand(*held.shape[:3], -1)
    band = (runs[:, None] * lists.run + S - T + away).expand(*held.shape[:2], -1, -1)
    free = torch.arange(held.shape[3] + first.shape[3] + band.shape[3], device="cpu") < held.shape[3] + first.shape[3]
    keys = torch.cat([held, first, band], 3)
    # In their order, so that what is to come moves nothing; of equals, what all see comes first.
    keys, order = keys.masked_fill((keys < 0) | (keys >= S), S).sort(dim=3, stable=True)
    again = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0))
    return keys.masked_fill(again | (keys == S), -1), free[order]


def _allowed(lists: Lists, j: Tensor, free: Tensor, t: Tensor, T: int, S: int) -> Bool[Tensor, "b h n run k"]:
    """Which of these keys each query of its run sees."""
    (back, ahead), i = lists.near, t[..., None] + S - T
    keys = j.unsqueeze(3)
    away = i - keys
    allowed = (free.unsqueeze(3) | ((away <= back) & (away >= -ahead))) & (keys >= 0) & (t[..., None] < T)
    allowed = allowed & (away <= lists.back) & (away >= -lists.ahead)
    at = j.clamp(min=0)
    if lists.until is not None:
        until = lists.until.expand(max(len(j), len(lists.until)), max(j.shape[1], lists.until.shape[1]), -1)
        found = until[..., None, :].expand(-1, -1, j.shape[2], -1).gather(3, at.expand(*until.shape[:2], -1, -1))
        allowed = allowed & (i < found.unsqueeze(3))
    if lists.keep is not None:
        keep = lists.keep[:, None, None].expand(-1, j.shape[1], j.shape[2], -1)
        keep = keep.expand(max(len(j), len(keep)), -1, -1, -1)
        allowed = allowed & keep.gather(3, at.expand(len(keep), -1, -1, -1)).unsqueeze(3)
    return allowed

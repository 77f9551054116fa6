"""Neighborhood attention against natten and against torch's dense attention with the same mask.

    python -m benchmarks.neighborhood

The dense mask is made beforehand; ours is made anew in every call. On a CPU natten has no kernel but FlexAttention,
not compiled and without gradients. For growing windows it is held against scores that are written out, of keys that
are gathered for each query, in time and in peak extra memory; over strides against `masks.tile_cost`.
"""

import math
import multiprocessing as mp
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import (
    Benchmark,
    Figure,
    Run,
    able,
    agree,
    command,
    compared,
    forward_backward,
    growth,
    race,
    share,
)
from regard import masks
from regard.bench.memory import PeakMemory
from regard.kernels import neighborhood as kernel
from regard.vision import neighborhood_attention

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def natten(axes: int, window: int, dilation: int) -> Way:
    """natten's own function, heads last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import natten
    function = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[axes]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        last = (z.movedim(1, -2).contiguous() for z in (q, k, v))
        return function(*last, kernel_size=window, dilation=dilation).movedim(-2, 1)

    return run


def ways(sizes: tuple[int, ...], window: int, dilation: int) -> dict[str, Way]:
    """Ours as it stands in `regard.vision` and through `regard.attention`, and torch's kernel with a ready mask."""
    mask = masks.neighborhood(sizes, window, dilation=dilation)
    allowed = mask.dense(math.prod(sizes))

    def flat(run: Way) -> Way:
        return lambda *x: run(*(z.flatten(2, -2) for z in x)).unflatten(2, sizes)

    return {
        "regard": partial(neighborhood_attention, window=window, dilation=dilation),
        "auto": flat(partial(regard.attention, mask=mask)),
        "SDPA": flat(partial(F.scaled_dot_product_attention, attn_mask=allowed)),
    }


def written_out(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Every score in memory, as a kernel without tiles has it."""
    sizes, N = q.shape[2:-1], math.prod(q.shape[2:-1])
    first, at = torch.arange(N), torch.zeros(N, 1, dtype=torch.long)
    mask = masks.neighborhood(sizes, window)
    for axis, step in zip(mask.axes, mask.steps, strict=True):
        keys = axis.bounds(first // step % axis.size)[0][:, None] + torch.arange(window)
        at = (at[:, :, None] + step * keys[:, None]).flatten(1)
    k, v = (z.flatten(2, -2)[:, :, at] for z in (k, v))
    scores = torch.einsum("bhnd,bhnkd->bhnk", q.flatten(2, -2), k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnk,bhnkd->bhnd", scores.softmax(-1), v).unflatten(2, sizes)


WAYS = {"regard": neighborhood_attention, "written out": written_out}


def added(way: str, sizes: tuple[int, ...], window: int) -> float:
    """Peak MB that one call adds to this process."""
    x = [torch.randn(1, 4, *sizes, 32) for _ in range(3)]
    small = [z[(slice(None), slice(None), *(slice(0, window) for _ in sizes))] for z in x]
    with torch.no_grad():
        WAYS[way](*small, window=window)  # first calls load what later ones share
        memory = PeakMemory(torch.device("cpu"))
        WAYS[way](*x, window=window)
    return memory.bytes() / 2**20


def growing(result: Benchmark, sizes: tuple[int, ...], windows: tuple[int, ...], repeats: int) -> None:
    """Time and memory for growing windows."""
    x = [torch.randn(1, 4, *sizes, 32) for _ in range(3)]
    for window in windows:
        runs = {name: partial(way, *x, window=window) for name, way in WAYS.items()}
        with torch.no_grad():
            agree(runs["regard"](), runs["written out"](), within=1e-4)
            times = race(runs, repeats=repeats, warmup=0, seconds=4)
        what = f"{len(sizes)}-D, window {window}: times below scores written out"
        result.add(compared(f"{what}, time", times, "regard", "written out", better="higher"))
        with mp.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            theirs, ours = (pool.apply(added, (name, sizes, window)) for name in ("written out", "regard"))
        note = f"{theirs:.0f} MB and {ours:.1f} MB"
        result.add(Figure(f"{what}, extra memory", theirs / max(ours, 0.1), better="higher", note=note))


def over_strides(result: Benchmark, sizes: tuple[int, ...], window: int, repeats: int) -> None:
    """What the kernel gains where neighbouring queries share windows, and what the model says."""
    x = [torch.randn(1, 4, *sizes, 32) for _ in range(3)]
    strides = [s for s in range(1, window + 1) if window % s == 0]
    with torch.no_grad():
        runs = {str(s): partial(neighborhood_attention, *x, window=window, stride=s) for s in strides}
        times = race(runs, repeats=repeats, seconds=6)
    visited = {}
    for stride in strides:
        mask = masks.neighborhood(sizes, window, stride=stride)
        tile = [kernel.tile_sizes(axis, kernel.TILE[len(sizes)])[0] for axis in mask.axes]
        visited[stride] = masks.tile_cost(mask, tile, 1, dynamic=True).visited
    for stride in strides[1:]:
        note = f"keys in vain would make it {visited[1] / visited[stride]:.2f}"
        what = f"window {window}, stride {stride}: times faster than stride 1"
        result.add(compared(what, times, str(stride), "1", better="higher", note=note))


def measure(
    *, repeats: int, sizes: tuple[int, ...] = (56, 56), window: int = 7, heads: int = 4, width: int = 32
) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "sizes": list(sizes), "D": width, "window": window, "dtype": "fp32"}
    words = " x ".join(map(str, sizes))
    result = Benchmark("neighborhood", f"Neighborhood attention, {window} along each axis of {words}", shape=shape)
    x = [torch.randn(1, heads, *sizes, width) for _ in range(3)]
    given = [z.clone().requires_grad_() for z in x]
    for dilation in (1, 2):
        what = f"dilation {dilation}: times faster than"
        flops = 4 * heads * width * masks.neighborhood(sizes, window, dilation=dilation).count(math.prod(sizes))
        with torch.no_grad():
            contenders: dict[str, Run] = {n: partial(w, *x) for n, w in ways(sizes, window, dilation).items()}
            others, why = able({"natten": lambda d=dilation: partial(natten(len(sizes), window, d), *x)})
            want = contenders["SDPA"]()
            for run in (contenders | others).values():
                agree(run(), want, within=1e-4)
            times = race(contenders | others, repeats=repeats, warmup=0, seconds=12)
        done = share(flops, min(times["regard"]))
        result.add(compared(f"{what} natten", times, "regard", "natten", why=why, share=done, **goal("neighborhood")))
        result.add(compared(f"{what} masked SDPA", times, "regard", "SDPA", better="higher", share=done))
        result.add(compared(f"dilation {dilation}: through regard.attention / directly", times, "auto", "regard"))

        training = {
            n: forward_backward(partial(w, *given), *given)
            for n, w in ways(sizes, window, dilation).items()
            if n != "auto"
        }
        for got, right in zip(*(run() for run in training.values()), strict=True):
            agree(got, right, within=1e-4)
        times = race(training, repeats=repeats, warmup=0, seconds=8)
        what += " masked SDPA, forward and backward"
        done = share(3.5 * flops, min(times["regard"]))
        result.add(compared(what, times, "regard", "SDPA", better="higher", share=done))
    growing(result, (math.prod(sizes),), (15, 63), repeats)
    growing(result, sizes, (3, 11), repeats)
    over_strides(result, sizes, 8, repeats)
    taken = {}
    for N in (4096, 8192, 16384):
        line = [torch.randn(1, heads, N, width) for _ in range(3)]
        with torch.no_grad():
            run = partial(neighborhood_attention, *line, window=63)
            taken[N] = min(race({"regard": run}, repeats=repeats, seconds=3)["regard"])
    result.add(Figure("1-D, window 63: exponent of the growth with length", growth(taken), ""))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

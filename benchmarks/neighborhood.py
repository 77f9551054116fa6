"""Neighborhood attention against natten and against torch's dense attention with the same mask.

    python -m benchmarks.neighborhood

The dense mask is made beforehand; ours is made anew in every call. On a CPU natten has no kernel but FlexAttention,
not compiled and without gradients.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, forward_backward, race, share
from regard import masks
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
    return result


if __name__ == "__main__":
    command(measure, __doc__)

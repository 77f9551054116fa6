"""Causal linear attention against torch's fused causal attention, its growth with length, and performer-pytorch.

    python -m benchmarks.linear

Before anything is timed the chunked form is compared with the T x T form. Chunk sizes are `python -m
benchmarks.scan_chunks`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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
from regard.kernels.linear_scan import linear_scan
from regard.linear import (
    causal_latte_attention,
    fast_attention,
    lightning_attention,
    linear_attention,
    performer_attention,
    random_directions,
)
from regard.positions.alibi import alibi_slopes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def mechanisms(heads: int, width: int) -> dict[str, Attend]:
    """What is timed, as functions of q, k and v. The goals are those of "linear"."""
    rates = alibi_slopes(heads)
    directions = random_directions(64, width, generator=torch.Generator().manual_seed(0))
    return {
        "linear": lambda q, k, v: linear_attention(q, k, v, causal=True).out,
        "scan, no decay": lambda q, k, v: linear_scan(q, k, v).out,
        "scan, decay by head": lambda q, k, v: linear_scan(q, k, v, -rates).out,
        "scan, decay by time": lambda q, k, v: linear_scan(q, k, v, -k[..., 0].abs()).out,
        "scan, decay by feature": lambda q, k, v: linear_scan(q, k, v, -k.abs()).out,
        "lightning": lambda q, k, v: lightning_attention(q, k, v, rates).out,
        "performer, r = 64": lambda q, k, v: performer_attention(q, k, v, directions, causal=True)[0],
        "latte, L = 16": lambda q, k, v: causal_latte_attention(q[..., :16], k[..., :16], v)[0],
        "fast, p = 1": lambda q, k, v: fast_attention(q, k, v, order=1, causal=True).out,
        "fast, p = 2": lambda q, k, v: fast_attention(q, k, v, order=2, causal=True).out,
    }


def inputs(length: int, heads: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(1, heads, length, width, generator=g).mul_(width**-0.25) for _ in "qkv"]


def check(width: int) -> None:
    """Chunks against the whole T x T matrix, in float64."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 1100, width, generator=g, dtype=torch.float64) for _ in "qkv")
    for decay in (None, -alibi_slopes(2, dtype=torch.float64), -k[..., 0].abs()):
        for got, want in zip(linear_scan(q, k, v, decay), linear_scan(q, k, v, decay, form="parallel"), strict=True):
            torch.testing.assert_close(got, want)
    decay, some = -k[:, :, :300, :8].abs(), [z[:, :, :300, :8] for z in (q, k, v)]
    torch.testing.assert_close(linear_scan(*some, decay).out, linear_scan(*some, decay, form="parallel").out)


def package(directions: Tensor, *, causal: bool) -> Attend:
    """performer-pytorch with the same directions; its causal form in torch, as its CUDA one needs another package."""
    from performer_pytorch.performer_pytorch import (
        causal_linear_attention_noncuda,
        linear_attention,
        softmax_kernel,
    )

    mix = causal_linear_attention_noncuda if causal else linear_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = (softmax_kernel(z, projection_matrix=directions, is_query=z is q) for z in (q, k))
        return mix(phi_q, phi_k, v)

    return run


def ours(directions: Tensor, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return performer_attention(q, k, v, directions, causal=causal, eps=1e-4)[0]


def against_package(x: Sequence[Tensor], repeats: int, count: int = 256) -> list[Figure]:
    """Performer, both ways. Causally the package takes the maximum of all keys, later ones too, out of the exponents
    and adds a constant to the denominator; the results differ by its effect on the constants added to the features."""
    directions = random_directions(count, x[0].shape[-1], generator=torch.Generator().manual_seed(0))
    figures = []
    for causal, words in ((False, "bidirectional"), (True, "causal")):
        contenders: dict[str, Run] = {"regard": partial(ours, directions, causal, *x)}
        others, why = able({"package": lambda c=causal: partial(package(directions, causal=c), *x)})
        for run in others.values():
            agree(run(), contenders["regard"](), within=1e-2 if causal else 1e-4)
        times = race(contenders | others, repeats=repeats, seconds=8)
        what = f"performer, r = {count}, {words}, T = {x[0].shape[2]}: times faster than performer-pytorch"
        figures.append(compared(what, times, "regard", "package", why=why, better="higher"))
    return figures


def timed(
    runs: dict[str, Attend], lengths: Sequence[int], at: int, heads: int, width: int, repeats: int
) -> dict[int, dict[str, list[float]]]:
    """Times of all by length, and torch's at the length of the comparison."""
    taken = {}
    for length in sorted({*lengths, at}):
        x = inputs(length, heads, width)
        contenders: dict[str, Run] = {name: partial(run, *x) for name, run in runs.items()}
        if length == at:
            contenders["SDPA"] = partial(sdpa, *x)
        taken[length] = race(contenders, repeats=repeats, seconds=10)
    return taken


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def measure(
    *,
    repeats: int,
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768),
    at: int = 16384,
    heads: int = 1,
    width: int = 64,
) -> Benchmark:
    check(width)
    shape = {"B": 1, "H": heads, "T": list(lengths), "D": width, "dtype": "fp32"}
    result = Benchmark("linear", f"Causal linear attention, SDPA at T = {at}", shape=shape)
    runs = mechanisms(heads, width)
    with torch.no_grad():
        taken = timed(runs, lengths, at, heads, width, repeats)
        for name in runs:
            # A token's products with the state: D (D + 1) into it and as many out of it, values and normaliser.
            done = share(4 * heads * at * width * (width + 1), min(taken[at][name])) if name == "linear" else None
            limit = goal("linear") if name == "linear" else {"better": "higher"}
            what = f"{name}: times faster than SDPA causal"
            result.add(compared(what, taken[at], name, "SDPA", share=done, **limit))
        for name in runs:
            exponent = growth({length: min(times[name]) for length, times in taken.items()})
            limit = goal("linear growth") if name == "linear" else {}
            result.add(Figure(f"{name}: exponent of T", exponent, "", **limit))
        result.add(*against_package(inputs(min(4096, at), heads, width), repeats))
    given = [z.requires_grad_() for z in inputs(at, heads, width)]
    pair = {"linear": runs["linear"], "SDPA": sdpa}
    training = {name: forward_backward(partial(run, *given), *given) for name, run in pair.items()}
    times = race(training, repeats=min(3, repeats))
    what = "linear: times faster than SDPA causal, forward and backward"
    result.add(compared(what, times, "linear", "SDPA", better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

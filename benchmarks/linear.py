"""Causal linear attention against torch's fused causal attention, its growth with length, and performer-pytorch.

    python -m benchmarks.linear

Every scan in all its forms, with the exponent of T in its time. Before anything is timed the forms of each are
compared. Chunk sizes are `python -m benchmarks.scan_chunks`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.goals import goal
from benchmarks.harness import (
    Benchmark,
    Figure,
    Run,
    Times,
    able,
    agree,
    command,
    compared,
    forward_backward,
    growth,
    race,
    ratio,
    share,
)
from regard.kernels.channel_scan import channel_scan
from regard.kernels.delta_scan import delta_scan
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


LONGEST = {"chunked": 32768, "step": 32768, "parallel": 8192}
"""Tokens. The parallel form of linear and delta scans holds T x T numbers."""


def scans(form: str, heads: int) -> dict[str, Attend]:
    """Every scan and kind of decay, as functions of q, k and v."""
    rates = alibi_slopes(heads)

    def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x, g = (z.transpose(1, 2).flatten(2) for z in (v, -k.abs()))
        return channel_scan(x, g, form=form).out

    def delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
        return delta_scan(q, F.normalize(k, dim=-1), v, q[..., 0].sigmoid(), decay, form=form).out

    return {
        "linear scan, no decay": lambda q, k, v: linear_scan(q, k, v, form=form).out,
        "linear scan, decay by head": lambda q, k, v: linear_scan(q, k, v, -rates, form=form).out,
        "linear scan, decay by time": lambda q, k, v: linear_scan(q, k, v, -k[..., 0].abs(), form=form).out,
        "linear scan, decay by feature": lambda q, k, v: linear_scan(q, k, v, -k.abs(), form=form).out,
        "delta scan, no decay": delta,
        "delta scan, decay by time": lambda q, k, v: delta(q, k, v, -k[..., 0].abs()),
        "delta scan, decay by feature": lambda q, k, v: delta(q, k, v, -k.abs()),
        "channel scan": channels,
    }


def mechanisms(heads: int, width: int) -> dict[str, Attend]:
    """What is timed, as functions of q, k and v. The goals are those of "linear"."""
    rates = alibi_slopes(heads)
    directions = random_directions(64, width, generator=torch.Generator().manual_seed(0))
    return {
        "linear": lambda q, k, v: linear_attention(q, k, v, causal=True).out,
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
    """The forms of every scan against the recurrence, in float64."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 300, width, generator=g, dtype=torch.float64) / width**0.25 for _ in "qkv")
    step = scans("step", 2)
    for form in ("chunked", "parallel"):
        for name, run in scans(form, 2).items():
            few = 60 if form == "parallel" and "feature" in name else 300
            x = [z[:, :, :few] for z in (q, k, v)]
            torch.testing.assert_close(run(*x), step[name](*x))


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


def timed(runs: dict[str, Attend], lengths: Sequence[int], heads: int, width: int, repeats: int) -> dict[int, Times]:
    """Times of all by length, torch's fused attention among them."""
    taken = {}
    for length in sorted(set(lengths)):
        x = inputs(length, heads, width)
        taken[length] = race({name: partial(run, *x) for name, run in runs.items()}, repeats=repeats, seconds=6)
    return taken


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grown(name: str, taken: dict[int, Times], **about: Any) -> Figure:
    """The exponent of T, and how many times as fast as torch's fused attention at each length."""
    exponent = growth({length: min(times[name]) for length, times in taken.items()})
    faster = [1 / ratio(times, name, "SDPA")[0] for times in taken.values()]
    ends = f"T = {min(taken)} .. {max(taken)}"
    return Figure(
        f"{name}: exponent of T", exponent, "", note=f"{' '.join(f'{x:.2g}' for x in faster)} x SDPA, {ends}", **about
    )


def forms(lengths: Sequence[int], heads: int, width: int, repeats: int) -> list[Figure]:
    figures = []
    for form, longest in LONGEST.items():
        runs = {f"{name}, {form}": run for name, run in scans(form, heads).items()}
        if form == "parallel":  # T x T x K numbers
            runs.pop("linear scan, decay by feature, parallel")
        some = [length for length in lengths if length <= longest]
        taken = timed(runs | {"SDPA": sdpa}, some, heads, width, repeats if form == "chunked" else min(2, repeats))
        for name in runs:
            figures.append(grown(name, taken, **(goal("scan growth") if form == "chunked" else {})))
    return figures


def measure(
    *,
    repeats: int,
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768),
    at: int = 16384,
    heads: int = 1,
    width: int = 64,
) -> Benchmark:
    check(width)
    shape = {"B": 1, "H": heads, "T": list(lengths), "D": width, "dtype": "fp32"}
    result = Benchmark("linear", f"Causal linear attention, SDPA at T = {at}", shape=shape)
    runs = mechanisms(heads, width)
    with torch.no_grad():
        taken = timed(runs | {"SDPA": sdpa}, (*lengths, at), heads, width, repeats)
        for name in runs:
            # A token's products with the state: D (D + 1) into it and as many out of it, values and normaliser.
            done = share(4 * heads * at * width * (width + 1), min(taken[at][name])) if name == "linear" else None
            limit = goal("linear") if name == "linear" else {"better": "higher"}
            what = f"{name}: times faster than SDPA causal"
            result.add(compared(what, taken[at], name, "SDPA", share=done, **limit))
        for name in (*runs, "SDPA"):
            result.add(grown(name, taken, **(goal("linear growth") if name == "linear" else {})))
        result.add(*forms(lengths, heads, width, repeats))
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

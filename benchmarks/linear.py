"""Causal linear attention against torch's fused causal attention, and how its time grows with length.

    python -m benchmarks.linear [--lengths 2048 4096 ...] [--at 16384] [--repeats 5] [--backward] [--json out.json]
    python -m benchmarks.linear --sweep          time of the scan by chunk size

On a machine that others use, `--clock cpu` with OMP_NUM_THREADS=1 counts this process's own time only.

Printed for each mechanism: the best time at the length `--at`, how many times faster that is than torch's
scaled_dot_product_attention(is_causal=True) on the same shapes, timed in turns with it, and the exponent of T in its
time, fitted over all lengths. Before anything is timed the chunked form is compared with the T x T form.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def mechanisms(heads: int, width: int) -> dict[str, Run]:
    """What is timed, as functions of q, k and v."""
    rates = alibi_slopes(heads)
    directions = random_directions(64, width, generator=torch.Generator().manual_seed(0))
    return {
        "scan, no decay": lambda q, k, v: linear_scan(q, k, v).out,
        "scan, by head": lambda q, k, v: linear_scan(q, k, v, -rates).out,
        "scan, by time": lambda q, k, v: linear_scan(q, k, v, -k[..., 0].abs()).out,
        "scan, by feature": lambda q, k, v: linear_scan(q, k, v, -k.abs()).out,
        "linear": lambda q, k, v: linear_attention(q, k, v, causal=True).out,
        "lightning": lambda q, k, v: lightning_attention(q, k, v, rates).out,
        "performer, r = 64": lambda q, k, v: performer_attention(q, k, v, directions, causal=True)[0],
        "latte, L = 16": lambda q, k, v: causal_latte_attention(q[..., :16], k[..., :16], v)[0],
        "fast, p = 1": lambda q, k, v: fast_attention(q, k, v, order=1, causal=True).out,
        "fast, p = 2": lambda q, k, v: fast_attention(q, k, v, order=2, causal=True).out,
    }


def inputs(length: int, heads: int, width: int, backward: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(1, heads, length, width, generator=g).mul_(width**-0.25).requires_grad_(backward) for _ in "qkv"
    ]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(runs: dict[str, Run], given: list[Tensor], repeats: int, clock: str) -> dict[str, float]:
    """The best of several turns, which other work on the machine disturbs least; each turn runs all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = CLOCKS[clock]()
            with torch.set_grad_enabled(given[0].requires_grad):
                out = run(*given)
            if given[0].requires_grad:
                out.backward(out.detach())
            if turn:  # the first warms up
                found[name].append(CLOCKS[clock]() - start)
    return {name: min(times) for name, times in found.items()}


def exponent(times: dict[int, float]) -> float:
    """The slope of log time over log length, by least squares."""
    x, y = [math.log(t) for t in times], [math.log(s) for s in times.values()]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def check(width: int) -> None:
    """Chunks against the whole T x T matrix, in float64."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 1100, width, generator=g, dtype=torch.float64) for _ in "qkv")
    for decay in (None, -alibi_slopes(2, dtype=torch.float64), -k[..., 0].abs()):
        for got, want in zip(linear_scan(q, k, v, decay), linear_scan(q, k, v, decay, form="parallel"), strict=True):
            torch.testing.assert_close(got, want)
    decay, some = -k[:, :, :300, :8].abs(), [z[:, :, :300, :8] for z in (q, k, v)]
    torch.testing.assert_close(linear_scan(*some, decay).out, linear_scan(*some, decay, form="parallel").out)


def sweep(length: int, heads: int, width: int, repeats: int, clock: str) -> None:
    """Times of the scan by chunk size, forward and with backward."""
    names = ["scan, no decay", "scan, by head", "scan, by time", "scan, by feature"]
    print(f"milliseconds by chunk size, T = {length}")
    print(f"{'chunk':>6}" + "".join(f"{n:>24}" for n in names))
    decays: dict[str, Callable[[Tensor], Tensor | None]] = {
        names[0]: lambda k: None,
        names[1]: lambda k: -alibi_slopes(heads),
        names[2]: lambda k: -k[..., 0].abs(),
        names[3]: lambda k: -k.abs(),
    }
    for chunk in (16, 32, 64, 128, 256):
        runs: dict[str, Run] = {
            n: lambda q, k, v, d=d, chunk=chunk: linear_scan(q, k, v, d(k), chunk=chunk).out for n, d in decays.items()
        }
        both = [seconds(runs, inputs(length, heads, width, b), repeats, clock) for b in (False, True)]
        print(f"{chunk:6}" + "".join(f"{1e3 * both[0][n]:12.0f}{1e3 * both[1][n]:12.0f}" for n in names), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--at", type=int, default=16384, help="the length of the comparison")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--only", nargs="+", help="names of mechanisms, as printed")
    parser.add_argument("--sweep", action="store_true", help="times by chunk size instead")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    check(args.width)
    threads = torch.get_num_threads()
    where = f"torch {torch.__version__}, {platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    print(f"(1, {args.heads}, T, {args.width}) fp32{', with backward' * args.backward}, {args.clock} time; {where}")
    if args.sweep:
        return sweep(args.at, args.heads, args.width, args.repeats, args.clock)
    runs = mechanisms(args.heads, args.width)
    if args.only:
        runs = {name: runs[name] for name in args.only}
    rows = {name: {"times": {}} for name in runs}
    for length in sorted({*args.lengths, args.at}):
        given = inputs(length, args.heads, args.width, args.backward)
        for name, run in runs.items():
            against = {"sdpa": sdpa} if length == args.at else {}
            found = seconds({name: run, **against}, given, args.repeats, args.clock)
            rows[name]["times"][length] = found[name]
            if against:
                rows[name] |= {"seconds": found[name], "faster": found["sdpa"] / found[name]}
    print(f"{'':18} {f'ms at {args.at}':>12} {'x SDPA':>8} {'exponent':>9}")
    for name, row in rows.items():
        row["exponent"] = exponent(row["times"])
        print(f"{name:18} {1e3 * row['seconds']:12.1f} {row['faster']:8.1f} {row['exponent']:9.2f}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "torch": torch.__version__, "threads": threads, "rows": rows}, file)


if __name__ == "__main__":
    main()

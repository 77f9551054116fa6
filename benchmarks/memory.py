"""Peak extra memory of the chunked kernel against the full score matrix, by length, in inference and in training.

    python -m benchmarks.memory [--length 16384] [--heads 1] [--json out.json]

Each figure is the growth of the process's peak resident memory over what it held before the call, each in a process
of its own, so that no allocator's leftovers count. The two kernels' outputs are compared first.
"""

import argparse
import json
import multiprocessing as mp
import platform

import torch

import regard
from regard.bench.memory import PeakMemory
from regard.masks import causal


def measure(kernel: str, length: int, heads: int, train: bool) -> float:
    """Peak MB that one call adds."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=train) for _ in range(3))
    with torch.no_grad():  # first calls load what later ones share
        regard.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], mask=causal(), kernel=kernel)
    memory = PeakMemory(torch.device("cpu"))
    with torch.set_grad_enabled(train):
        out = regard.attention(q, k, v, mask=causal(), kernel=kernel)
    if train:
        out.sum().backward()
    return memory.bytes() / 2**20


def alone(*args: object) -> float:
    """`measure` in a fresh process."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    q, k, v = (torch.randn(1, 2, 1500, 64, dtype=torch.float64) for _ in range(3))
    run = {n: regard.attention(q, k, v, mask=causal(), kernel=n) for n in ("eager", "chunked")}
    torch.testing.assert_close(run["chunked"], run["eager"])
    rows = []
    print(f"T = {args.length}, H = {args.heads}, D = 64, fp32, causal; torch {torch.__version__}, {platform.machine()}")
    print(f"{'':10} {'eager MB':>10} {'chunked MB':>10} {'ratio':>7}")
    for train in (False, True):
        eager, chunked = (alone(n, args.length, args.heads, train) for n in ("eager", "chunked"))
        rows.append({"train": train, "eager_mb": eager, "chunked_mb": chunked, "ratio": eager / chunked})
        print(f"{'training' if train else 'inference':10} {eager:10.0f} {chunked:10.1f} {eager / chunked:7.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"length": args.length, "heads": args.heads, "torch": torch.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()

"""Chunk sizes of the linear scan: which is fastest for which widths and decays, and what the default costs there.

python -m benchmarks.scan_chunks [--repeats 7]

On one thread, by the process's own time, so that other work on the machine counts little.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Benchmark, Figure, agree, arguments, finish, forward_backward
from regard.kernels.linear_scan import CHUNK, linear_scan

LENGTH, HEADS = 4096, 1
CHUNKS = (16, 32, 64, 128, 256)
WIDTHS = ((16, 64), (64, 64), (128, 128))
DECAYS = ("none", "head", "time", "feature")


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    result = Benchmark("scan_chunks", f"linear_scan by chunk size, T = {LENGTH}, {HEADS} head, fp32, one thread")
    slower: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
    for K, V in WIDTHS:
        for kind in DECAYS:
            for backward in (False, True):
                best = fastest(kind, K, V, backward, args.repeats)
                for chunk in CHUNKS:
                    slower[chunk].append(best[chunk] / min(best.values()))
                what = f"K = {K}, V = {V}, decay {kind}, {'with' if backward else 'no'} backward"
                note = ", ".join(f"{chunk}: {1e3 * best[chunk]:.0f} ms" for chunk in CHUNKS)
                result.add(Figure(f"{what}: chunk {CHUNK} over the best", slower[CHUNK][-1], note=note))
    for chunk, ratios in slower.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        result.add(Figure(f"chunk {chunk} over the best, mean and range of all", mean, "x", min(ratios), max(ratios)))
    finish(result, args)


def fastest(kind: str, K: int, V: int, backward: bool, repeats: int) -> dict[int, float]:
    """Seconds by chunk size, the least of all rounds, which other work disturbs least; each round runs all sizes."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, HEADS, LENGTH, K, generator=g).mul_(K**-0.25).requires_grad_(backward)
    v = torch.randn(1, HEADS, LENGTH, V, generator=g).requires_grad_(backward)
    rates = torch.rand(1, HEADS, LENGTH, K, generator=g)
    decay = {"none": None, "head": -rates[0, :, 0, 0], "time": -rates[..., 0], "feature": -rates}[kind]
    want = linear_scan(q, k, v, decay).out

    def run(chunk: int) -> torch.Tensor:
        return linear_scan(q, k, v, decay, chunk=chunk).out

    for chunk in CHUNKS:
        agree(run(chunk), want, within=1e-4 * float(want.detach().abs().max()))
    least = dict.fromkeys(CHUNKS, math.inf)
    for turn in range(repeats + 1):
        for chunk in CHUNKS:
            call: Callable[[], object] = partial(run, chunk)
            if backward:
                call = forward_backward(partial(run, chunk), q, k, v)
            began = time.process_time()
            call()
            if turn:  # the first warms up
                least[chunk] = min(least[chunk], time.process_time() - began)
    return least


if __name__ == "__main__":
    main()

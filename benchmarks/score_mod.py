"""A score mod of one's own (a learned relative bias under a soft cap) in tiles against the same scores formed at once.

    python -m benchmarks.score_mod

Memory is the growth of the process's peak, as in `python -m benchmarks.memory`, at two lengths: what grows linearly
takes four times as much at four times the length, the whole score matrix sixteen times.
"""

import multiprocessing as mp
from functools import partial

import torch

import regard
from benchmarks.harness import Benchmark, Figure, agree, command, compared, forward_backward, race
from regard.bench.memory import PeakMemory
from regard.masks import causal
from regard.scores import ScoreMod


def relative(
    score: torch.Tensor,
    b: torch.Tensor,
    h: torch.Tensor,
    q_idx: torch.Tensor,
    kv_idx: torch.Tensor,
    *,
    table: torch.Tensor,
) -> torch.Tensor:
    """20 tanh((score + table[h, distance]) / 20), far keys sharing the last entry."""
    return 20 * torch.tanh((score + table[h, (q_idx - kv_idx).clamp(0, table.shape[1] - 1)]) / 20)


def made(length: int, heads: int) -> tuple[ScoreMod, list[torch.Tensor]]:
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(heads, 128))
    return ScoreMod(relative, table=table), [torch.randn(1, heads, length, 64, requires_grad=True) for _ in range(3)]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mod: ScoreMod, kernel: str) -> torch.Tensor:
    return regard.attention(q, k, v, score_mix=mod, mask=causal(), kernel=kernel)


def added(kernel: str, length: int, heads: int) -> float:
    """Peak MB that one forward and backward pass adds to this process."""
    mod, (q, k, v) = made(length, heads)
    attend(q[:, :, :64], k[:, :, :64], v[:, :, :64], mod, kernel).sum().backward()  # loads what later calls share
    memory = PeakMemory(torch.device("cpu"))
    attend(q, k, v, mod, kernel).sum().backward()
    return memory.bytes() / 2**20


def alone(*args: object) -> float:
    """`added` in a fresh process."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(added, args)


def measure(*, repeats: int, length: int = 4096, heads: int = 1) -> Benchmark:
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "dtype": "fp32"}
    result = Benchmark("score_mod", f"A score mod with gradients, causal, at T = {length}", shape=shape)
    mod, given = made(length, heads)
    runs = {name: partial(attend, mod=mod, kernel=kernel) for name, kernel in (("regard", "auto"), ("eager", "eager"))}
    with torch.no_grad():
        agree(*(run(*given) for run in runs.values()))
    training = {name: forward_backward(partial(run, *given), *given, mod.table) for name, run in runs.items()}
    for got, want in zip(*(run() for run in training.values()), strict=True):
        agree(got, want)
    note = f"auto is {regard.plan(*given, score_mix=mod, mask=causal()).kernel}"
    times = race(training, repeats=min(3, repeats), warmup=0, seconds=8)
    result.add(compared("forward and backward", times, "regard", "eager", note=note))
    short, long = (alone("auto", n, heads) for n in (length, 4 * length))
    words = f"{short:.0f} MB at {length}, {long:.0f} MB at {4 * length}"
    result.add(Figure("memory of four times the length: times that of one", long / max(short, 0.1), note=words))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

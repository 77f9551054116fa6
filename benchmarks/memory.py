"""Peak extra memory of attention with a score bias against the full score matrix, in inference and in training.

    python -m benchmarks.memory

Each figure is the growth of the process's peak resident memory over what it held before the call, each in a process
of its own, so that no allocator's leftovers count. The two kernels' outputs are compared first.
"""

import multiprocessing as mp

import torch

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, agree, command
from regard.bench.memory import PeakMemory
from regard.masks import causal
from regard.positions import Alibi, Kerple
from regard.stages import Position

POSITIONS: dict[str, type[Alibi] | type[Kerple]] = {"Alibi": Alibi, "Kerple": Kerple}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position, kernel: str) -> torch.Tensor:
    return regard.attention(q, k, v, position=position, mask=causal(), kernel=kernel)


def added(name: str, kernel: str, length: int, heads: int, train: bool) -> float:
    """Peak MB that one call adds to this process."""
    torch.manual_seed(0)
    position = POSITIONS[name](heads)
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=train) for _ in range(3))
    with torch.set_grad_enabled(train):  # first calls load what later ones share
        out = attend(q[:, :, :64], k[:, :, :64], v[:, :, :64], position, kernel)
    if train:
        out.sum().backward()
    memory = PeakMemory(torch.device("cpu"))
    with torch.set_grad_enabled(train):
        out = attend(q, k, v, position, kernel)
    if train:
        out.sum().backward()
    return memory.bytes() / 2**20


def alone(*args: object) -> float:
    """`added` in a fresh process."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(added, args)


def measure(*, repeats: int, length: int = 16384, heads: int = 1) -> Benchmark:
    """Memory does not vary as time does: each is measured once, however many `repeats`."""
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "dtype": "fp32"}
    result = Benchmark("memory", f"Peak extra memory with a score bias, causal, at T = {length}", shape=shape)
    for name, make in POSITIONS.items():
        q, k, v = (torch.randn(1, 2, 1500, 64, dtype=torch.float64) for _ in range(3))
        position = make(2).double()
        with torch.no_grad():
            agree(attend(q, k, v, position, "auto"), attend(q, k, v, position, "eager"), within=1e-9)
        for train, words, row in ((False, "inference", "bias memory"), (True, "training", "bias memory training")):
            eager, ours = (alone(name, kernel, length, heads, train) for kernel in ("eager", "auto"))
            note = f"{eager:.0f} MB and {ours:.1f} MB"
            what = f"{name}, {words}: times below eager"
            result.add(Figure(what, eager / max(ours, 0.1), note=note, **goal(row)))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

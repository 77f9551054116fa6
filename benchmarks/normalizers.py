"""Sparse normalisers against the `entmax` package, forward and backward.

python -m benchmarks.normalizers
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.goals import goal
from benchmarks.harness import Benchmark, able, agree, command, compared, forward_backward, race
from regard.normalizers import Entmax, Sparsemax


def package(function: str) -> Callable[[Tensor], Tensor]:
    import entmax

    return lambda x: getattr(entmax, function)(x, -1)


def measure(*, repeats: int, rows: int = 4096, keys: int = 1024) -> Benchmark:
    shape = {"rows": rows, "keys": keys, "dtype": "fp32"}
    result = Benchmark("normalizers", f"Normalising {rows} rows of {keys} scores", shape=shape)
    torch.manual_seed(0)
    scores = (2 * torch.randn(rows, keys)).requires_grad_()
    for what, ours, function in (("entmax 1.5", Entmax(), "entmax15"), ("sparsemax", Sparsemax(), "sparsemax")):
        contenders = {
            "regard": forward_backward(partial(ours, scores, None), scores),
            "softmax": forward_backward(lambda: scores.softmax(-1), scores),
        }
        peer = {"entmax": lambda name=function: forward_backward(partial(package(name), scores), scores)}
        others, why = able(peer)
        if others:
            agree(ours(scores, None), package(function)(scores), within=1e-5)
        times = race(contenders | others, repeats=repeats)
        limit = goal("entmax") if function == "entmax15" else {"better": "higher"}
        faster = f"{what}: times faster than the package"
        result.add(compared(faster, times, "regard", "entmax", why=why, **limit))
        result.add(compared(f"{what} / torch's softmax", times, "regard", "softmax"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

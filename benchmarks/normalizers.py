"""Sparse normalisers against the `entmax` package, and top-k against torch's operations, forward and backward.

python -m benchmarks.normalizers
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.goals import goal
from benchmarks.harness import Benchmark, able, agree, command, compared, forward_backward, race
from regard.normalizers import Entmax, Sparsemax, TopK


def package(function: str, x: Tensor) -> Tensor:
    import entmax

    return getattr(entmax, function)(x, -1)


def by_topk(x: Tensor) -> Tensor:
    """Top-k in torch's operations."""
    return x.masked_fill(x < x.topk(8).values[..., -1:], -torch.inf).softmax(-1)


SPARSE = (
    ("entmax 1.5", Entmax(), "the package", partial(package, "entmax15"), goal("entmax")),
    ("sparsemax", Sparsemax(), "the package", partial(package, "sparsemax"), {"better": "higher"}),
    ("top-k, k = 8", TopK(k=8), "torch.topk and softmax", by_topk, {"better": "higher"}),
)
"""What, ours, the peer's name, the peer, and what the figure is told."""


def measure(*, repeats: int, rows: int = 4096, keys: int = 1024) -> Benchmark:
    shape = {"rows": rows, "keys": keys, "dtype": "fp32"}
    result = Benchmark("normalizers", f"Normalising {rows} rows of {keys} scores", shape=shape)
    torch.manual_seed(0)
    scores = (2 * torch.randn(1, 1, rows, keys)).requires_grad_()
    for what, ours, name, peer, limit in SPARSE:
        contenders = {
            "regard": forward_backward(partial(ours, scores, None), scores),
            "softmax": forward_backward(lambda: scores.softmax(-1), scores),
        }
        others, why = able({name: partial(forward_backward, partial(peer, scores), scores)})
        if others:
            agree(ours(scores, None), peer(scores), within=1e-5)
        times = race(contenders | others, repeats=repeats)
        result.add(compared(f"{what}: times faster than {name}", times, "regard", name, why=why, **limit))
        result.add(compared(f"{what} / torch's softmax", times, "regard", "softmax"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

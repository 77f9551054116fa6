"""Attention with a mask or a bias under torch.compile, against the same function called eagerly.

    python -m benchmarks.compiled

Compiling takes a C++ compiler; without one there is no figure.
"""

from functools import partial

import torch
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, able, agree, command, compared, forward_backward, race
from regard import masks
from regard.positions import Alibi

HEADS = 8


def ways(length: int) -> dict[str, dict]:
    """What `regard.attention` is told besides queries, keys and values."""
    ids = torch.arange(length)[None] // 777
    return {
        "causal": {"mask": masks.causal()},
        "window 256": {"mask": masks.causal() & masks.window(256)},
        "documents of 777": {"mask": masks.causal() & masks.documents(ids)},
        "alibi": {"mask": masks.causal(), "position": Alibi(HEADS)},
    }


def measure(*, repeats: int, length: int = 2048) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": HEADS, "T": length, "D": 64, "dtype": "fp32"}
    result = Benchmark("compiled", f"torch.compile against eager calls at T = {length}", shape=shape)
    for words, options in ways(length).items():

        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict = options) -> Tensor:
            return regard.attention(q, k, v, **options)

        for training in (False, True):
            torch._dynamo.reset()
            x = [torch.randn(1, HEADS, length, 64, requires_grad=training) for _ in range(3)]
            made = torch.compile(attend)
            runs: dict[str, Run] = {"eager": partial(attend, *x), "compiled": partial(made, *x)}
            if training:
                runs = {name: forward_backward(run, *x) for name, run in runs.items()}
            others, why = able({"compiled": lambda runs=runs: runs["compiled"]})
            if others:
                for got, want in zip(runs["compiled"](), runs["eager"](), strict=True):
                    agree(got, want)
            times = race(runs, repeats=3 * repeats) if others else {}
            what = f"{words}, {'forward and backward' if training else 'forward'}"
            result.add(
                compared(what, times, "compiled", "eager", why={"eager": why.get("compiled", "")}, **goal("compiled"))
            )
    return result


if __name__ == "__main__":
    command(measure, __doc__)

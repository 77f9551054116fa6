"""Packed documents and padded batches against torch's kernel, which takes such masks as a tensor alone.

python -m benchmarks.documents
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, agree, command, compared, forward_backward, race, share
from regard import masks

HEADS, WIDTH = 4, 64


def packed(length: int, mean: int) -> masks.Mask:
    """Documents of drawn lengths, one after the other, each causal."""
    starts = torch.rand(length, generator=torch.Generator().manual_seed(0)) < 1 / mean
    return masks.causal() & masks.documents(starts.cumsum(0)[None])


def measure(*, repeats: int, length: int = 8192, mean: int = 777, batch: int = 4, row: int = 1024) -> Benchmark:
    torch.manual_seed(0)
    shape = {"H": HEADS, "D": WIDTH, "documents in": length, "of about": mean, "padding": [batch, row], "dtype": "fp32"}
    result = Benchmark("documents", "Packed documents, and padded batches", shape=shape)
    lengths = [row * (n + 1) // batch for n in range(batch)]
    cases = (
        ("documents", f"documents of about {mean} in {length}", 1, length, packed(length, mean)),
        ("padding", f"padding, rows of {lengths} in {row}", batch, row, masks.padding(lengths=torch.tensor(lengths))),
    )
    for name, words, B, T, mask in cases:
        x = [torch.randn(B, HEADS, T, WIDTH, requires_grad=True) for _ in range(3)]
        dense: Tensor = mask.dense(T).expand(B, 1, T, T)
        pairs = HEADS * int(dense.sum())
        runs: dict[str, Run] = {
            "regard": partial(regard.attention, *x, mask=mask),
            "SDPA": partial(F.scaled_dot_product_attention, *x, attn_mask=dense),
        }
        seen = dense.any(-1).expand(B, HEADS, T)
        for training in (False, True):
            if training:
                runs = {key: forward_backward(run, *x) for key, run in runs.items()}
                for got, want in zip(runs["regard"](), runs["SDPA"](), strict=True):
                    agree(got, want)
                times = race(runs, repeats=repeats, seconds=15)
            else:
                with torch.no_grad():
                    agree(runs["regard"]()[seen], runs["SDPA"]()[seen], within=1e-4)
                    times = race(runs, repeats=3 * repeats, seconds=15)
            done = share((14 if training else 4) * WIDTH * pairs, min(times["regard"]))
            about = {} if training else goal(name)
            what = f"{words}, {'forward and backward' if training else 'forward'}: regard / SDPA"
            result.add(compared(what, times, "regard", "SDPA", share=done, **about))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

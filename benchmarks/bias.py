"""Score biases formed on the fly (ALiBi, KERPLE) against torch's kernel with the bias ready in memory.

    python -m benchmarks.bias

Memory is `python -m benchmarks.memory`.
"""

from functools import partial

import torch
import torch.nn.functional as F

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, agree, command, compared, forward_backward, race, share
from regard.masks import causal
from regard.positions import Alibi, Kerple
from regard.stages import Position, Rows


def ready_made(position: Position, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The bias as the (1, H, T, T) tensor that torch takes, -inf at later keys; formed in parts."""
    T = q.shape[2]
    j = torch.arange(T)
    parts = []
    for i in j.split(1024):
        rows = Rows(q=q[:, :, i], k=k, scores=q.new_empty(0), i=i, j=j)
        parts.append(position.bias(rows).detach().masked_fill(j > i[:, None], -torch.inf))
    return torch.cat(parts, 2).expand(1, q.shape[1], T, T)


def measure(*, repeats: int, length: int = 16384, heads: int = 1) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "dtype": "fp32"}
    result = Benchmark("bias", f"Score biases under a causal mask at T = {length}", shape=shape)
    q, k, v = x = [torch.randn(1, heads, length, 64) for _ in range(3)]
    given = [z.clone().requires_grad_() for z in x]
    flops = 4 * heads * 64 * length * (length + 1) // 2
    for position in (Alibi(heads), Kerple(heads)):
        name = type(position).__name__
        ready = ready_made(position, *x[:2])

        ways = {
            "regard": partial(regard.attention, position=position, mask=causal()),
            "SDPA + bias": partial(F.scaled_dot_product_attention, attn_mask=ready),
        }
        with torch.no_grad():
            contenders = {name: partial(run, *x) for name, run in ways.items()}
            agree(*(run() for run in contenders.values()))
            times = race(contenders, repeats=repeats, warmup=0, seconds=8)
        note = f"auto is {regard.plan(q, k, v, position=position, mask=causal()).kernel}"
        done = share(flops, min(times["regard"]))
        what = f"{name}, forward"
        result.add(compared(what, times, "regard", "SDPA + bias", note=note, share=done, **goal("bias")))
        training = {name: forward_backward(partial(run, *given), *given) for name, run in ways.items()}
        for got, want in zip(*(run() for run in training.values()), strict=True):
            agree(got, want)
        times = race(training, repeats=min(3, repeats), warmup=0, seconds=8)
        done = share(3.5 * flops, min(times["regard"]))
        what = f"{name}, forward and backward"
        result.add(compared(what, times, "regard", "SDPA + bias", note=note, share=done, **goal("bias")))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

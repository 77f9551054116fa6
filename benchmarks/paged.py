"""One token a step over a cache in pages of a pool, against the same cache in one piece; and what forks take.

python -m benchmarks.paged
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import regard
from benchmarks.decode import heads, often, step
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, Run, agree, command, compared, race
from regard.cache import PagePool

WIDTH, HEADS, PAGE, FORKS, PROMPT = 512, 8, 16, 8, 4096


def paged(layer: regard.Attention, x: Tensor, new: Tensor) -> Run:
    """One token after the tokens x; every call writes over the last one's."""
    S = x.shape[1]
    state = layer.init_state(len(x), S + 1, pool=PagePool(len(x) * (S // PAGE + 1), page_size=PAGE))
    state = state.write(k=heads(layer.k_proj, x), v=heads(layer.v_proj, x))

    def run() -> Tensor:
        for row in state.rows:
            row.written = S
        return layer.step(new, state)[0]

    return run


def forks(layer: regard.Attention) -> float:
    """Bytes of 8 caches of one prompt, over those of 8 forks, each a token further."""
    x, new = torch.randn(1, PROMPT, WIDTH), torch.randn(FORKS, 1, WIDTH)
    pool = PagePool(PROMPT // PAGE + FORKS, page_size=PAGE)
    state = layer.step(x, layer.init_state(1, PROMPT + 1, pool=pool))[1].reorder(torch.zeros(FORKS, dtype=torch.long))
    _, state = layer.step(new, state)
    _, copies = layer.step(x, layer.init_state(1, PROMPT + 1))
    _, copies = layer.step(new, copies.reorder(torch.zeros(FORKS, dtype=torch.long)))
    return copies.nbytes / state.nbytes


def measure(*, repeats: int, lengths: Sequence[int] = (1024, 16384), batches: Sequence[int] = (1, 4)) -> Benchmark:
    shape = {"M": WIDTH, "H": HEADS, "T": 1, "S": list(lengths), "B": list(batches), "page": PAGE, "dtype": "fp32"}
    result = Benchmark("paged", "One step of decoding over a cache in pages", shape=shape)
    torch.manual_seed(0)
    layer = regard.Attention(WIDTH, HEADS, causal=True)
    with torch.no_grad():
        for length in lengths:
            for batch in batches:
                x, new = torch.randn(batch, length, WIDTH), torch.randn(batch, 1, WIDTH)
                contenders = {"paged": paged(layer, x, new), "contiguous": step(layer, x, new)}
                agree(contenders["paged"](), contenders["contiguous"](), within=1e-5)
                times = race(contenders, repeats=repeats, number=often(length), seconds=4)
                what = f"{length} tokens, B = {batch}: pages / one piece"
                result.add(compared(what, times, "paged", "contiguous", **goal("paged")))
        what = f"memory of {FORKS} continuations of {PROMPT} tokens, copies / forks"
        result.add(Figure(what, forks(layer), **goal("paged memory")))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

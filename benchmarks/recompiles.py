"""How many graphs torch.compile makes for new lengths, after the first.

    python -m benchmarks.recompiles

Only graphs are counted, nothing is built from them: no C++ compiler is needed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, command
from regard import masks

DIM, HEADS = 64, 4


def layers() -> dict[str, Callable[[Tensor], Tensor]]:
    """Pipelines, as functions of tokens."""
    near = masks.window(64)
    return {
        "causal": regard.create("softmax", dim=DIM, num_heads=HEADS, causal=True),
        "alibi": regard.create("alibi", dim=DIM, num_heads=HEADS, causal=True),
        "rotary": regard.create("rotary", dim=DIM, num_heads=HEADS, causal=True),
        "entmax": regard.create("entmax", dim=DIM, num_heads=HEADS, causal=True),
        "window 64": regard.Attention(DIM, HEADS, causal=True, mask=near),
        "regard.attention, window 64": lambda x: regard.attention(
            *3 * (x.unflatten(-1, (HEADS, -1)).transpose(1, 2),), mask=masks.causal() & near
        ),
    }


def graphs(run: Callable[[Tensor], Tensor], lengths: Sequence[int]) -> int:
    """How many are made for inputs of these lengths, one after the other."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in lengths:
            compiled(torch.randn(1, length, DIM))
    return counter.frame_count


def measure(*, repeats: int, lengths: Sequence[int] = (128, 200, 256, 384, 500, 1024)) -> Benchmark:
    """A count does not vary: it is taken once, however many `repeats`."""
    shape = {"B": 1, "H": HEADS, "T": list(lengths), "M": DIM}
    result = Benchmark("recompiles", f"Graphs that torch.compile makes for {len(lengths)} lengths", shape=shape)
    for name, run in layers().items():
        value, note = None, ""
        try:
            value = float(graphs(run, lengths) - 1)
        except Exception as error:  # whatever the compiler makes of it is the finding
            note = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
        result.add(Figure(f"{name}: graphs after the first", value, "", note=note, **goal("recompiles")))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

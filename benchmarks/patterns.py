"""Patterns by head (shifted chunks, groups with sinks, BigBird, many windows), against torch's dense kernel.

python -m benchmarks.patterns
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, agree, command, compared, race, share
from regard import masks
from regard.masks.cross_chunks import fixed_shifts, flow_shifts
from regard.mixers.multi_window import WindowTables


def patterns(length: int, heads: int) -> dict[str, dict[str, Any]]:
    """What each asks of `regard.attention`. Chunks and groups are a quarter of the tokens, as in the papers' code."""
    causal, quarter, own = masks.causal(), length // 4, length // heads
    windows = (*(2 ** (1 + n) for n in range(heads - 2)), 0, 0)
    return {
        "shifted_chunks, fixed": {"mask": causal & masks.shifted_chunks(quarter, fixed_shifts(heads, quarter))},
        "shifted_chunks, flow": {"mask": causal & masks.shifted_chunks(own, flow_shifts(heads, own))},
        "shifted_groups, 4 sinks": {"mask": causal & masks.shifted_groups(quarter, heads, sinks=4)},
        "bigbird": {"mask": masks.bigbird(length, heads)},
        "multi_window": {"mask": masks.multi_window(windows), "position": WindowTables(windows)},
    }


def measure(*, repeats: int, length: int = 16384, heads: int = 8) -> Benchmark:
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "dtype": "fp32"}
    result = Benchmark("patterns", f"Patterns that differ by head, T = {length}", shape=shape)
    torch.manual_seed(0)
    q, k, v = x = [torch.randn(1, heads, length, 64) for _ in range(3)]
    made = patterns(length, heads)
    some = torch.arange(max(0, length - 300), length)
    contenders: dict[str, Run] = {"SDPA": partial(F.scaled_dot_product_attention, *x)}
    with torch.no_grad():
        for name, given in made.items():
            contenders[name] = partial(regard.attention, *x, **given)
            agree(contenders[name]()[:, :, some], rows(x, some, **given))
        times = race(contenders, repeats=repeats, seconds=60)
    for name, given in made.items():
        density = given["mask"].density(length)
        limit = goal("patterns") | {"goal": round(1.1 * density + 0.02, 3)}
        note = f"density {density:.3f}, {regard.plan(q, k, v, **given).kernel}"
        done = share(4 * heads * length**2 * 64 * density, min(times[name]))
        result.add(compared(f"{name}, forward / SDPA", times, name, "SDPA", note=note, share=done, **limit))
    return result


def rows(x: list[torch.Tensor], some: torch.Tensor, *, mask: masks.Mask, **stages: Any) -> torch.Tensor:
    """The last queries' outputs, with all of the mask formed for them: they stand bottom right as before."""
    q, k, v = x
    return regard.attention(q[:, :, some], k, v, mask=mask.at(some, torch.arange(k.shape[2])), kernel="eager", **stages)


if __name__ == "__main__":
    command(measure, __doc__)

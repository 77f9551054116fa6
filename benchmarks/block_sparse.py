"""Attention over random blocks at several densities, against torch's dense kernel.

python -m benchmarks.block_sparse
"""

from functools import partial

import torch
import torch.nn.functional as F

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Run, agree, command, compared, race, share
from regard import masks


def measure(
    *,
    repeats: int,
    length: int = 4096,
    heads: int = 4,
    block: int = 128,
    densities: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5),
) -> Benchmark:
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "block": block, "dtype": "fp32"}
    result = Benchmark("block_sparse", f"Random blocks of {block} at T = {length}", shape=shape)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
    blocks, some = length // block, min(512, length)
    for shared, words in ((True, "one layout"), (False, "a layout each head")):
        for density in densities:
            tiles = torch.rand(1, 1 if shared else heads, blocks, blocks) < density
            tiles |= torch.eye(blocks, dtype=torch.bool)
            mask = masks.chosen(tiles, length, length, block)
            contenders: dict[str, Run] = {
                name: partial(regard.attention, q, k, v, mask=mask, kernel=name) for name in ("auto", "block_sparse")
            }
            want = F.scaled_dot_product_attention(
                q[:, :, :some], k, v, mask.at(torch.arange(some), torch.arange(length))
            )
            for run in contenders.values():
                agree(run()[:, :, :some], want)
            contenders["SDPA"] = partial(F.scaled_dot_product_attention, q, k, v)
            with torch.no_grad():
                times = race(contenders, repeats=repeats, seconds=8)
            d = float(tiles.float().mean())
            what = f"density {d:.2f}, {words}"
            limit = goal("block sparse") | {"goal": round(1.1 * d + 0.02, 3)}
            note = f"auto is {regard.plan(q, k, v, mask=mask).kernel}"
            done = {n: share(4 * heads * length**2 * 64 * d, min(times[n])) for n in ("auto", "block_sparse")}
            result.add(compared(what, times, "auto", "SDPA", note=note, share=done["auto"], **limit))
            if note != "auto is block_sparse":
                named = f"{what}, block_sparse kernel"
                result.add(compared(named, times, "block_sparse", "SDPA", share=done["block_sparse"]))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

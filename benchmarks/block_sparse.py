"""Attention over random blocks at several densities, against torch's dense kernel.

python -m benchmarks.block_sparse
"""

import torch
import torch.nn.functional as F

import regard
from benchmarks.harness import Benchmark, agree, arguments, compared, finish, race
from regard import masks

LENGTH, HEADS, BLOCK = 4096, 4, 128


def main() -> None:
    args = arguments(__doc__)
    result = Benchmark("block_sparse", f"Random blocks of {BLOCK}, T = {LENGTH}, H = {HEADS}, D = 64, fp32")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, 64) for _ in range(3))
    blocks = LENGTH // BLOCK
    for shared, words in ((True, "one layout"), (False, "a layout each head")):
        for density in (0.05, 0.1, 0.25, 0.5):
            tiles = torch.rand(1, 1 if shared else HEADS, blocks, blocks) < density
            tiles |= torch.eye(blocks, dtype=torch.bool)
            mask = masks.chosen(tiles, LENGTH, LENGTH, BLOCK)
            contenders = {
                "block_sparse": lambda mask=mask: regard.attention(q, k, v, mask=mask, kernel="block_sparse"),
                "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
            }
            rows = slice(0, 512)
            allowed = mask.at(torch.arange(512), torch.arange(LENGTH))
            agree(
                contenders["block_sparse"]()[:, :, rows], F.scaled_dot_product_attention(q[:, :, rows], k, v, allowed)
            )
            with torch.no_grad():
                times = race(contenders, repeats=args.repeats)
            d = float(tiles.float().mean())
            what = f"density {d:.2f}, {words}"
            result.add(compared(what, times, "block_sparse", "SDPA", goal=round(1.25 * d + 0.03, 3)))
    finish(result, args)


if __name__ == "__main__":
    main()

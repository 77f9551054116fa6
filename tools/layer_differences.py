"""Print how far `regard.Attention` is from attention layers of transformers with the same weights, as a Markdown table.

    python tools/layer_differences.py

Each layer is tiny and random (tests/integrations/like_transformers.py), its tokens normal and its positions not from 0.
transformers computes angles, norms and softmax in float32 whatever the dtype, so float64 shows the rounding of those.
Progress goes to stderr.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from integrations.like_transformers import LIKES, B, M, T, build


def difference(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference between outputs, and the largest output."""
    layer, theirs, at = build(name, dtype)
    x = torch.randn(B, T, M, generator=torch.Generator().manual_seed(0)).to(dtype)
    want: Tensor = theirs(x)
    return float((layer(x, positions=at) - want).abs().max()), float(want.abs().max())


def part(module: nn.Module | None) -> str:
    return "" if module is None else f"`{module}`"


@torch.no_grad()
def main() -> None:
    """One row a model."""
    torch.set_num_threads(1)
    print("| model | class of transformers | position | heads | largest output | difference, fp64 | difference, fp32 |")
    print("|---|---|---|---|---:|---:|---:|")
    start = time.perf_counter()
    for n, (name, like) in enumerate(LIKES.items(), 1):
        layer = build(name)[0]
        (wide, size), (single, _) = difference(name, torch.float64), difference(name, torch.float32)
        parts = f"{part(layer.position)} | {part(layer.heads)}"
        print(f"| {name} | `{like.names[1]}` | {parts} | {size:.2g} | {wide:.1e} | {single:.1e} |", flush=True)
        print(f"{n} of {len(LIKES)}, {time.perf_counter() - start:.0f} s: {name}", file=sys.stderr)


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    main()

"""Attention in bf16 against fp32: regard and torch's kernel, and what each makes of the machine's peaks.

python -m benchmarks.half
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, agree, command, compared, race, share
from regard import masks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def allowed() -> float:
    """Time in bf16 over that in fp32 that this processor's instructions for bf16 should make possible."""
    if torch.cpu._is_amx_tile_supported():
        return 0.5
    return 0.667 if torch.cpu._is_avx512_bf16_supported() else 1.0


def measure(*, repeats: int, length: int = 4096, heads: int = 4, window: int = 512) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "T": length, "D": 64}
    result = Benchmark("half", f"bf16 against fp32 at T = {length}", shape=shape)
    x = {name: [torch.randn(1, heads, length, 64).to(dtype) for _ in range(3)] for name, dtype in DTYPES.items()}
    x["fp32"] = [z.float() for z in x["bf16"]]
    near = masks.causal() & masks.window(window)
    pairs = {"full": length**2, "causal": length * (length + 1) // 2, f"window {window}": near.count(length)}
    with torch.no_grad():
        for (words, count), mask in zip(pairs.items(), (None, masks.causal(), near), strict=True):
            ways: dict[str, Callable[..., Tensor]] = {"regard": partial(regard.attention, mask=mask)}
            if mask is not near:
                ways["SDPA"] = partial(F.scaled_dot_product_attention, is_causal=mask is not None)
            contenders = {
                f"{way} {name}": partial(run, *given) for way, run in ways.items() for name, given in x.items()
            }
            for way in ways:
                agree(contenders[f"{way} bf16"]().float(), contenders["regard fp32"](), within=3e-2)
            times = race(contenders, repeats=repeats, seconds=15)
            done = {
                name: share(4 * heads * 64 * count, min(taken), DTYPES[name.split()[1]])
                for name, taken in times.items()
            }
            for way in ways:
                a, b = f"{way} bf16", f"{way} fp32"
                about = goal("half") | {"goal": allowed()} if way == "regard" else {}
                result.add(compared(f"{words}: {way}, bf16 / fp32", times, a, b, share=done[a], **about))
            about = goal("half peak")
            result.add(Figure(f"{words}: regard, bf16, of the bf16 peak", done["regard bf16"], "", **about))
            if "SDPA" in ways:
                for name in x:
                    a, b = f"regard {name}", f"SDPA {name}"
                    result.add(compared(f"{words}: {name}, regard / SDPA", times, a, b, share=done[a]))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

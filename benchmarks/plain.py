"""What `regard.attention` adds to torch's own kernel on plain attention.

python -m benchmarks.plain
"""

import statistics
from functools import partial

import torch
import torch.nn.functional as F

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, agree, command, compared, race, share
from regard.masks import causal


def measure(*, repeats: int, shape: tuple[int, int, int, int] = (1, 8, 1024, 64), calls: int = 300) -> Benchmark:
    torch.manual_seed(0)
    about = "Plain attention against torch's scaled_dot_product_attention"
    result = Benchmark("plain", about, shape=dict(zip("BHTD", shape)) | {"dtype": "fp32"})
    q, k, v = (torch.randn(shape) for _ in range(3))
    B, H, T, D = shape
    for words, mask in (("full", None), ("causal", causal())):
        is_causal = mask is not None

        def ours(mask=mask):
            return regard.attention(q, k, v, mask=mask)

        def theirs(is_causal=is_causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        agree(ours(), theirs(), within=1e-5)
        times = race({"regard": ours, "torch": theirs}, repeats=5 * repeats)
        flops = 4 * B * H * D * (T * (T + 1) // 2 if is_causal else T * T)
        done = share(flops, min(times["regard"]))
        result.add(compared(f"{words} attention", times, "regard", "torch", share=done, **goal("plain")))
    tiny = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    contenders = {
        "regard": partial(regard.attention, *tiny),
        "torch": partial(F.scaled_dot_product_attention, *tiny),
    }
    times = race(contenders, repeats=repeats, number=calls)
    extra = [1e6 * (a - b) for a, b in zip(times["regard"], times["torch"], strict=True)]
    middle = statistics.median(extra)
    result.add(Figure("extra on (1, 2, 8, 16)", middle, "us", min(extra), max(extra), **goal("tiny")))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

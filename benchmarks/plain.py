"""What `regard.attention` adds to torch's own kernel on plain attention.

python -m benchmarks.plain
"""

import time

import torch
import torch.nn.functional as F

import regard
from benchmarks.harness import Benchmark, Figure, agree, arguments, compared, finish, peak, race
from regard.masks import causal

ROUNDS = 300


def per_call(run, rounds: int = ROUNDS) -> float:
    """Microseconds a call."""
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    return (time.perf_counter() - began) / rounds * 1e6


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    result = Benchmark("plain", "Plain attention against torch's scaled_dot_product_attention")
    shape = (1, 8, 1024, 64)
    q, k, v = (torch.randn(shape) for _ in range(3))
    best = peak()
    for words, mask in (("full", None), ("causal", causal())):
        is_causal = mask is not None

        def ours(mask=mask):
            return regard.attention(q, k, v, mask=mask)

        def theirs(is_causal=is_causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        agree(ours(), theirs(), within=1e-5)
        times = race({"regard": ours, "torch": theirs}, repeats=5 * args.repeats)
        flops = 4 * 8 * 1024 * 1024 * 64 / (2 if is_causal else 1) / min(times["regard"])
        note = f"{flops / best:.0%} of the matrix-product peak"
        result.add(compared(f"{words} attention {shape}", times, "regard", "torch", goal=1.02, note=note))
    tiny = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    extra = [
        per_call(lambda: regard.attention(*tiny)) - per_call(lambda: F.scaled_dot_product_attention(*tiny))
        for _ in range(args.repeats)
    ]
    middle = sorted(extra)[len(extra) // 2]
    result.add(Figure("extra on (1, 2, 8, 16)", middle, "us", min(extra), max(extra), goal=20))
    finish(result, args)


if __name__ == "__main__":
    main()

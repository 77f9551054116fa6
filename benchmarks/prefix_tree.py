"""Decoding of many sequences with one prompt: a prefix tree against a key/value cache of their own each.

python -m benchmarks.prefix_tree
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, agree, command, compared, race
from regard import KVCache
from regard.cache import PrefixTree

HEADS, WIDTH, CHUNK, STEPS = 8, 64, 64, 16


CASES = ((16, 1024, 64), (16, 4096, 64), (32, 2048, 64), (16, 1024, 1024))
"""Sequences, tokens of the common prompt, tokens of each sequence's own."""


def measure(*, repeats: int, cases: Sequence[tuple[int, int, int]] = CASES) -> Benchmark:
    shape = {"H": HEADS, "D": WIDTH, "dtype": "fp32", "(N, prompt, own)": [list(case) for case in cases]}
    about = f"{STEPS} tokens decoded by each of N sequences after a common prompt"
    result, faster = Benchmark("prefix_tree", about, shape=shape), []
    torch.manual_seed(0)
    for N, prompt, own in cases:
        k, v = torch.randn(2, HEADS, prompt, WIDTH)
        k_own, v_own = torch.randn(2, N, HEADS, own, WIDTH)
        q, new_k, new_v = torch.randn(3, STEPS, N, HEADS, 1, WIDTH)

        tree = PrefixTree(HEADS, WIDTH, chunk=CHUNK)
        whole = tree.add(k, v, tokens=range(prompt))
        sequences = [tree.fork(whole) for _ in range(N)]
        tree.free(whole)
        tree.append(sequences, k_own, v_own)

        room = prompt + own + STEPS
        cache = KVCache({name: torch.zeros(N, HEADS, room, WIDTH) for name in "kv"})
        _, cache = cache.append(
            k=torch.cat([k.expand(N, -1, -1, -1), k_own], 2), v=torch.cat([v.expand(N, -1, -1, -1), v_own], 2)
        )

        def shared(tree=tree, sequences=sequences, q=q, new_k=new_k, new_v=new_v) -> torch.Tensor:
            rows = [tree.fork(s) for s in sequences]
            outs = []
            for n in range(STEPS):
                tree.append(rows, new_k[n], new_v[n])
                outs.append(tree.attend(q[n, :, :, 0], rows))
            for row in rows:
                tree.free(row)
            return torch.stack(outs)

        def separate(cache=cache, q=q, new_k=new_k, new_v=new_v) -> torch.Tensor:
            state, outs = cache.crop(cache.length), []
            state.written[0] = cache.length  # every round writes over the last one's tokens
            for n in range(STEPS):
                held, state = state.append(k=new_k[n], v=new_v[n])
                outs.append(F.scaled_dot_product_attention(q[n], held["k"], held["v"])[:, :, 0])
            return torch.stack(outs)

        with torch.no_grad():
            agree(shared(), separate(), within=1e-4)
            times = race({"tree": shared, "caches": separate}, repeats=repeats, seconds=10)
        what = f"N = {N}, prompt {prompt}, {own} own"
        faster.append(compared(f"{what}: time", times, "tree", "caches", better="higher", note="times faster"))
        result.add(faster[-1])
        result.add(Figure(f"{what}: memory", cache.nbytes / tree.nbytes, better="higher", note="times smaller"))
    best = max(faster, key=lambda figure: figure.value or 0)
    result.add(replace(best, what="the best of these", note=best.what, **goal("prefix")))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

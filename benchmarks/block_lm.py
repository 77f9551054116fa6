"""Generating text, prompts included: a Block Transformer beside a plain decoder of as many layers, both with caches.

python -m benchmarks.block_lm
"""

from functools import partial

import torch

from benchmarks.harness import Benchmark, Figure, command, compared, race
from regard.models.block_lm import BlockLM
from regard.models.lm import LMConfig, language_model

DEPTH, WIDTH = 6, 64


def measure(
    *,
    repeats: int,
    lengths: tuple[int, ...] = (256, 2048),
    batches: tuple[int, ...] = (1, 32),
    heads: int = 4,
    new: int = 64,
) -> Benchmark:
    torch.manual_seed(0)
    dim = heads * WIDTH
    shape = {"M": dim, "H": heads, "layers": DEPTH, "tokens a block": 4, "new tokens": new, "dtype": "fp32"}
    result = Benchmark("block_lm", "Generating text: a Block Transformer beside a plain decoder", shape=shape)
    half = {"layers_global": DEPTH // 2, "layers_local": DEPTH // 2}
    config = LMConfig("rotary", dim=dim, depth=DEPTH, num_heads=heads, mlp_dim=4 * dim)
    models = {"blocks": BlockLM(dim, heads, **half).eval(), "plain": language_model(config).eval()}
    for length in lengths:
        for batch in batches:
            ids = torch.randint(256, (batch, length))
            told = f"B = {batch}, T = {length}"
            for count in (1, new):
                runs = {name: partial(model.generate, ids, count, temperature=0.0) for name, model in models.items()}
                times = race(runs, repeats=repeats, seconds=15)
                words = f"{told}, {'the first token' if count == 1 else f'{new} tokens'}"
                result.add(compared(f"{words}: blocks / plain", times, "blocks", "plain"))
            for name, each in times.items():
                result.add(Figure(f"{words}: {name}", batch * new / min(each), "tokens/s", better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)

"""Generating text, prompts included: a Block Transformer beside a plain decoder of as many layers that learns as well.

python -m benchmarks.block_lm

All are trained for the same steps on the same text, plain decoders of several widths among them. The one whose loss on
held-out text, on the bytes that both predict, is nearest to the Block Transformer's is the one to beat.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from benchmarks.harness import Benchmark, Figure, command, compared, race
from regard.models.block_lm import BlockLM
from regard.models.lm import LMConfig, language_model
from regard.tasks.text import Text, load

DEPTH, WIDTH, BLOCK = 6, 64, 4


def bits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Per byte behind the first block, which a Block Transformer does not predict."""
    logits = model(ids) if isinstance(model, BlockLM) else model(ids[:, :-1])[:, BLOCK - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, BLOCK:].flatten()) / math.log(2)


def trained(model: nn.Module, text: Text, length: int, steps: int, batch: int = 16) -> float:
    """Bits per byte of held-out text after so many steps of Adam, whose rate rises and falls."""
    adam = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps + 1, pct_start=0.1)
    for _, ids in zip(track(range(steps), description="training", transient=True), text.batches(batch, length - 1, 0)):
        adam.zero_grad()
        bits(model.train(), ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
    with torch.no_grad():
        return float(bits(model.eval(), text.heldout_windows(length - 1, 64 * length)))


def measure(
    *,
    repeats: int,
    lengths: tuple[int, ...] = (256, 2048),
    batches: tuple[int, ...] = (1, 32),
    heads: int = 4,
    new: int = 64,
    widths: tuple[int, ...] = (96, 128, 192),
    steps: int = 100,
    seen: int = 256,
) -> Benchmark:
    torch.manual_seed(0)
    dim = heads * WIDTH
    shape = {"M": dim, "H": heads, "layers": DEPTH, "tokens a block": BLOCK, "new tokens": new, "dtype": "fp32"}
    shape |= {"steps": steps, "widths of plain decoders": list(widths)}
    result = Benchmark("block_lm", "Generating text: a Block Transformer beside a plain decoder", shape=shape)
    half = {"layers_global": DEPTH // 2, "layers_local": DEPTH // 2}
    text, blocks, plain = load(length=seen), BlockLM(dim, heads, block=BLOCK, **half), {}
    for width in widths:
        config = LMConfig("rotary", dim=width, depth=DEPTH, num_heads=heads, mlp_dim=4 * width)
        plain[width] = language_model(config)
    reached = trained(blocks, text, seen, steps)
    found = {width: trained(model, text, seen, steps) for width, model in plain.items()}
    nearest = min(found, key=lambda width: abs(found[width] - reached))
    models = {"blocks": blocks, "plain": plain[nearest]}
    for told, width, value in (
        ("Block Transformer", dim, reached),
        *((f"plain, {w} wide", w, b) for w, b in found.items()),
    ):
        model = blocks if told == "Block Transformer" else plain[width]
        size = sum(p.numel() for p in model.parameters()) / 1e6
        note = f"{size:.2f} million parameters" + ", the one below" * (model is plain[nearest])
        result.add(Figure(f"{told}: held-out text", value, "bits/byte", note=note))
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

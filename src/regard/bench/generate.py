"""Continue text with a model that `regard compare --checkpoint` kept."""

from collections.abc import Iterator
from pathlib import Path

import torch

from regard.models.checkpoint import load
from regard.models.lm import check_sampling


def generate(
    checkpoint: str | Path,
    prompt: str | bytes = b"\n",
    *,
    count: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    mechanism: str | None = None,
) -> Iterator[bytes]:
    """Yield `count` bytes that continue the prompt, one at a time. Everything is checked before this returns.

    Args:
        temperature: 0 takes the likeliest byte; higher is more varied.
        mechanism: needed for a model with the caller's own mechanism: its name, as its code is trusted.

    Raises:
        ValueError: a file that is missing, damaged or no model of regard, or an option out of range.
    """
    start = prompt.encode(errors="surrogateescape") if isinstance(prompt, str) else prompt
    check_sampling(count, temperature, top_k)
    model, _ = load(checkpoint, mechanism)
    ids = torch.tensor(list(start or b"\n"))[None]
    generator = torch.Generator().manual_seed(seed)
    drawn = model.sample(ids, count, temperature=temperature, top_k=top_k, generator=generator)
    return (bytes([int(token)]) for token in drawn)

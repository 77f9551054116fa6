"""Continue text with a model that `regard compare --checkpoint` kept."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regard.files import naming
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
    model, config = load(checkpoint, mechanism)
    if config.vocab != 256:
        raise ValueError(f"{checkpoint}: it has {config.vocab} tokens; expected 256, one for each byte")
    ids = torch.tensor(list(start or b"\n"))[None]
    generator = torch.Generator().manual_seed(seed)
    drawn = model.sample(ids, count, temperature=temperature, top_k=top_k, generator=generator)
    return _bytes(Path(checkpoint), drawn)


def _bytes(path: Path, drawn: Iterator[Tensor]) -> Iterator[bytes]:
    try:
        for token in drawn:
            yield bytes([int(token)])
    except (RuntimeError, IndexError) as error:  # weights that are numbers, and lead to some that are none
        with naming(path):
            raise ValueError(f"no text can be drawn from it: {error}") from error

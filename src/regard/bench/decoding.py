"""How a model does token by token: speed, and what it keeps of the past."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.models.lm import LanguageModel

GENERATED = 64


@torch.no_grad()
def generation_speed(model: LanguageModel, length: int, device: torch.device) -> float:
    """Tokens per second of one sequence behind a past of the training length.

    Without streaming, each token is a full pass.
    """
    vocab = model.embedding.num_embeddings
    past = torch.randint(vocab, (1, length + GENERATED), generator=torch.Generator().manual_seed(0)).to(device)
    if not model.streams:
        return _rate(lambda n: model(past[:, n : n + length])[:, -1].argmax(-1).item(), range(4))
    _, states = model.step(past[:, :length], model.init_state(1, length + GENERATED))

    def step(n: int) -> None:
        nonlocal states
        logits, states = model.step(past[:, n : n + 1], states)
        logits[:, -1].argmax(-1).item()

    return _rate(step, range(length, past.shape[1]))


def _rate(work: Callable[[int], object], numbers: range) -> float:
    """How often a second the work is done, in the median over these numbers."""
    seconds = []
    for n in numbers:
        start = time.perf_counter()
        work(n)
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


@torch.no_grad()
def state_after(mixer: Any, dim: int, length: int, device: torch.device) -> int:
    """Bytes that a mixer keeps of one sequence of this length; 0 where it cannot stream."""
    try:
        state = mixer.init_state(1, length)
    except (ValueError, TypeError, NotImplementedError, AttributeError):
        return 0
    return state_bytes(mixer.step(torch.zeros(1, length, dim, device=device), state)[1])


def state_bytes(state: object) -> int:
    """Bytes of all tensors in a state. A cache, which has room for tokens to come, is asked itself."""
    seen: set[int] = set()

    def size(value: object) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(known := getattr(value, "nbytes", None), int):
            return known
        parts: Iterable[object] = ()
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, list | tuple | set):
            parts = value
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            parts = vars(value).values()
        return sum(map(size, parts))

    return size(state)

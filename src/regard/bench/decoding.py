"""How a model does token by token: speed, and what it keeps of the past."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from regard.models.lm import LanguageModel


@torch.no_grad()
def generating(model: LanguageModel, length: int, tokens: int, device: torch.device) -> Callable[[], None]:
    """A function that generates one more token each time, behind a past of the training length.

    Without streaming, each token is a full pass.

    Args:
        tokens: how often it may be called.
    """
    vocab = model.embedding.num_embeddings
    past = torch.randint(vocab, (1, length + tokens), generator=torch.Generator().manual_seed(0)).to(device)
    places = iter(range(tokens))
    if not model.eval().streams:
        return lambda: _full_pass(model, past[:, (start := next(places)) : start + length])
    _, states = model.step(past[:, :length], model.init_state(1, length + tokens))

    @torch.no_grad()
    def step() -> None:
        nonlocal states
        place = length + next(places)
        logits, states = model.step(past[:, place : place + 1], states)
        logits[:, -1].argmax(-1).item()

    return step


@torch.no_grad()
def _full_pass(model: LanguageModel, ids: Tensor) -> None:
    model(ids)[:, -1].argmax(-1).item()


@torch.no_grad()
def state_after(mixers: Iterable[Any], dim: int, length: int, device: torch.device) -> int:
    """Bytes that mixers keep of one sequence of this length, together; 0 where one of them cannot stream."""
    x, total = torch.zeros(1, length, dim, device=device), 0
    for mixer in mixers:
        try:
            state = mixer.init_state(1, length)
        except (ValueError, TypeError, NotImplementedError, AttributeError):
            return 0
        total += state_bytes(mixer.step(x, state)[1])
    return total


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

"""Memory and work follow the data, and not the size that an option names: every card, every whole-number option.

What an option of a huge value makes is refused in words that tell which, or takes for a dozen tokens what a moderate
value takes. Where parameters have that size, nothing is huge for free: then memory grows no faster than they do.
"""

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import regard
from laws.measured import footprint
from regard.laws.subject import Subject, of

HUGE = (36 * 10**10, 36 * 10**10 + 1)
"""As many bytes are in no machine, so that asking for them fails at once. The first is a square, and divided by 24."""
ENOUGH = (96, 97, 100)
"""Beyond the dozen tokens, and the 8 x 8 pixels, of the laws' small inputs."""
SIZED = ((49, 97), (48, 96), (49, 121))
"""Pairs to see growth in, which some options allow and others don't; 49 and 121 are squares."""
OTHERS = {
    "context_dim": "the width of tokens, which go with it",
    "based.feature_dim": "a state has a row for each product of two features, which is what the paper trades",
}


def is_whole(hint: Any) -> bool:
    """Whether a value of that type may be an int, of which bool is none."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return any(map(is_whole, typing.get_args(hint))) if union else hint is int


def options() -> Iterator[tuple[str, str]]:
    for name in regard.mechanisms():
        card = regard.card(name)
        for option in card.options:
            if (
                is_whole(card.made.signature.parameters[option].annotation)
                and not {option, f"{name}.{option}"} & OTHERS.keys()
            ):
                yield name, option


def builds(s: Subject, option: str, value: int) -> int | None:
    """How many numbers it is made of, without memory; None where it is refused."""
    try:
        made = s.build(device="meta", dtype=torch.float32, noise=0, **{option: value})
    except (ValueError, TypeError):
        return None
    return sum(t.numel() for t in (*made.parameters(), *made.buffers())) if isinstance(made, nn.Module) else 0


def calls(s: Subject, causal: bool | None, option: str, value: int) -> Iterator[Callable[[], Any]]:
    """A full pass, and a stream of single tokens."""
    module, given = s.build(causal=causal, **{option: value}), s.inputs()
    yield lambda: module(*given)

    def stream() -> None:
        state = module.init_state(s.batch, s.length)
        for x in given[0].split(1, 1):
            _, state = module.step(x, state)

    if causal and "streaming" in s.supports and len(given) == 1 and s.protocol == "TokenMixer":
        yield stream


def refused(error: Exception, option: str, value: int) -> bool:
    """Whether it says which option, or at least what it was."""
    return option in str(error) or str(value) in str(error)


@torch.no_grad()
def takes(s: Subject, option: str, value: int) -> list[tuple[int, int]]:
    """(bytes, operators) of all ways to run it; nothing where it is refused."""
    found = []
    for causal in s.causalities or [None]:
        try:
            found += [footprint(call) for call in calls(s, causal, option, value)]
        except (ValueError, TypeError) as error:
            if not refused(error, option, value):
                raise
            return []
    return found


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_memory_and_work_follow_the_data(name: str, option: str) -> None:
    s = of(name)
    if not hasattr(s.build(), "forward"):
        pytest.skip("it is no module that could run alone")
    for small, large in SIZED:
        if (size := builds(s, option, small)) is not None and (more := builds(s, option, large)) not in (None, size):
            few, many = takes(s, option, small), takes(s, option, large)
            for (one, _), (two, _) in zip(few, many, strict=True):
                assert two <= 1.3 * max(more / size, large / small) * one, f"{small}: {one} bytes, {large}: {two}"
            return
    enough = next((found for value in ENOUGH if (found := takes(s, option, value))), None)
    for value in HUGE:
        for found, want in zip(takes(s, option, value), enough or [], strict=False):
            assert all(f <= w for f, w in zip(found, want, strict=True)), f"{value}: {found}; {ENOUGH}: {want}"

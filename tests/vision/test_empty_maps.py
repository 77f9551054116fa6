"""Every card of feature maps: a batch of none gives none, and a map without pixels an empty one or words."""

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.subject import of

NAMES = [name for name in regard.mechanisms() if regard.card(name).protocol == "FeatureMixer"]


def outcome(module: Any, given: list[Tensor]) -> tuple[str, tuple[int, ...]]:
    """What it says in refusing these, and the shape that it gives where it doesn't."""
    try:
        return "", tuple(module(*given).shape)
    except ValueError as refusal:
        return str(refusal), ()


@pytest.mark.parametrize("name", NAMES)
def test_no_map_and_no_pixels(name: str) -> None:
    subject = of(name)
    module, given = subject.build(), subject.inputs()
    whole = module(*given)
    assert module(*(x[:0] for x in given)).shape == (0, *whole.shape[1:])
    for tall, wide in ((0, None), (None, 0), (0, 0)):
        cut = tuple(map(slice, (tall, wide)[: given[0].dim() - 2]))
        empty = [x[:, :, *cut] if x.dim() == given[0].dim() else x for x in given]
        told, shape = outcome(module, empty)
        assert "expected" in told or shape == (*whole.shape[:2], *empty[0].shape[2:])


def test_says_what_is_wrong() -> None:
    shift = regard.create("shift", dim=24, num_heads=1)
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 24, 0, 8\)\); expected a pixel at least"):
        shift(torch.zeros(2, 24, 0, 8))

"""What the laws are run on shows what they look for."""

import pytest
import torch

import regard
from regard.laws import masking, of, streaming


def test_the_sizes_differ() -> None:
    s = of("softmax")
    assert len({s.batch, s.length, s.dim, s.heads, s.width}) == 5


def test_pads_stand_on_their_side() -> None:
    lengths = (9, 4, 2)
    left, right = (masking.keep(lengths, side) for side in ("left", "right"))
    assert not left[2, 0]
    assert left[2, -1]
    assert right[2, 0]
    assert not right[2, -1]
    assert left.sum(1).tolist() == right.sum(1).tolist() == list(lengths)


def test_partitions_are_many_and_odd() -> None:
    found = streaming.partitions(12)
    assert all(sum(sizes) == 12 for sizes in found)
    assert len({tuple(sizes) for sizes in found}) == len(found) == 8
    assert {0, 1} <= {size for sizes in found for size in sizes}


def test_a_mask_of_two_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="mask"):
        regard.attention(*(torch.randn(2, 1, 3, 2) for _ in "qkv"), mask=torch.ones(3, 3, dtype=torch.bool))

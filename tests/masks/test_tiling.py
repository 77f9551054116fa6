"""The model of what tiles cost against brute force, whose author has read neither code nor test."""

import math

import pytest

from regard import masks
from regard.kernels import neighborhood as kernel
from vision import naive_generalized as naive

CASES = [
    # sizes, window, stride, dilation, causal, q_tile, k_tile
    ((24,), (6,), (3,), (1,), (False,), (3,), (3,)),
    ((23,), (5,), (2,), (3,), (False,), (4,), (2,)),
    ((20,), (4,), (4,), (1,), (True,), (4,), (4,)),
    ((20,), (4,), (4,), (1,), (False,), (4,), (4,)),
    ((9, 12), (3, 5), (1, 2), (2, 1), (False, True), (2, 3), (3, 4)),
    ((12, 12), (4, 6), (4, 3), (1, 1), (False, False), (4, 3), (4, 3)),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_brute_force(case, dynamic: bool) -> None:
    sizes, window, stride, dilation, causal, q_tile, k_tile = case
    mask = masks.neighborhood(sizes, window, stride=stride, dilation=dilation, causal=causal)
    got = masks.tile_cost(mask, q_tile, k_tile, dynamic=dynamic)
    want = naive.tile_cost(sizes, window, stride, q_tile, k_tile, dynamic, dilation, causal)
    assert got.visited == pytest.approx(want["visited"])
    assert (got.tiles, got.perfect) == (want["tiles"], want["perfect"])
    assert got.speedup == pytest.approx(want["speedup"])
    assert got.bound == pytest.approx(want["flop"])


@pytest.mark.parametrize(
    ("sizes", "window", "tile", "rows"),
    [
        ((64,), 8, 8, {1: (2.91, 4.0), 2: (2.91, 4.0), 4: (2.91, 4.0), 8: (8.0, 8.0)}),
        ((64, 64), 16, 8, {1: (8.46, 8.46), 4: (8.46, 8.46), 8: (8.46, 16.0), 16: (16.0, 16.0)}),
    ],
)
def test_wider_strides_reach_the_bound(sizes, window, tile, rows) -> None:
    for stride, expected in rows.items():
        mask = masks.neighborhood(sizes, window, stride=stride)
        found = [masks.tile_cost(mask, tile, tile, dynamic=dynamic) for dynamic in (False, True)]
        assert [round(one.speedup, 2) for one in found] == list(expected)
    assert found[0].perfect
    assert found[0].speedup == found[0].bound


@pytest.mark.parametrize(("sizes", "window"), [((96,), 12), ((24, 24), 6)])
def test_the_kernels_slabs_are_its_dynamic_form_with_tiles_of_one_key(sizes, window) -> None:
    """What the kernel computes falls over the strides as the model says, but for slabs that are all of one length."""
    found = []
    for stride in range(1, window + 1):
        mask = masks.neighborhood(sizes, window, stride=stride)
        slabs = [kernel.tile_sizes(axis, kernel.TILE[len(sizes)]) for axis in mask.axes]
        said = masks.tile_cost(mask, [b for b, _ in slabs], 1, dynamic=True).visited
        assert said <= math.prod(W for _, W in slabs)
        found.append((said, kernel.scored(mask) / math.prod(sizes)))
    said, formed = zip(*found, strict=True)
    assert said[-1] == formed[-1] == min(formed) < formed[0]
    assert said[-1] < said[0]


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"tile_cost: mask is no neighborhood \(got"):
        masks.tile_cost(masks.window(3), 2, 2)
    with pytest.raises(ValueError, match="tile_cost: q_tile"):
        masks.tile_cost(masks.neighborhood((4, 4), 2), (2, 2, 2), 2)

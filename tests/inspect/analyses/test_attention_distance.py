"""Attention distance and aligned maps against loops, and on heads of known reach."""

import math

import pytest
import torch
from tests.inspect.analyses.naive_attention_distance import naive_aligned, naive_distance
from tests.inspect.analyses.test_rollout import maps

from regard.inspect.analyses.attention_distance import aligned_maps, attention_distance
from regard.laws.agreement import close


def test_by_hand() -> None:
    """Three tokens: the first looks 2 on, the second at itself, the third 1 back and at itself."""
    one = torch.tensor([[[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]]], dtype=torch.float64)
    close(attention_distance([one])[0], torch.tensor([[2.5 / 3]], dtype=torch.float64))
    close(attention_distance([one], patch=16.0)[0], torch.tensor([[40 / 3]], dtype=torch.float64))
    want = torch.tensor([[[0.0, 0.5, 1.5, 0.0, 1.0]]], dtype=torch.float64) / 3
    close(aligned_maps([one])[0], want)


@pytest.mark.parametrize(("grid", "extra"), [((2, 3), 0), ((3, 2), 2), ((1, 5), 1), (None, 1)])
def test_equals_the_loops(grid: tuple[int, int] | None, extra: int) -> None:
    T = 6 if grid is None else grid[0] * grid[1] + extra
    given = maps(2, 2, 3, T, T)
    given[0][0, 0, 3, extra:] = 0  # a query that sees [CLS] only
    shape = grid or (1, T - extra)
    far, near = (
        attention_distance(given, grid=grid, extra_tokens=extra),
        aligned_maps(given, grid=grid, extra_tokens=extra),
    )
    for layer in range(2):
        for h in range(3):
            tables = []
            for b in range(2):
                want = naive_distance(given[layer][b, h], shape, extra)
                assert far[layer][b, h].item() == pytest.approx(want, rel=1e-10)
                tables.append(naive_aligned(given[layer][b, h], shape, extra))
            close(near[layer][h], sum(tables) / 2)


def test_heads_of_known_reach() -> None:
    """On 4 x 4 patches: itself, the patch below, everywhere. The unit square is patch = 1 / 3."""
    itself = torch.eye(16).double()
    below = itself.roll(4, 1)[:12]
    below = torch.cat([below, itself[12:]])
    even = torch.full((16, 16), 1 / 16).double()
    (got,) = attention_distance([torch.stack([itself, below, even])[None]], grid=(4, 4), patch=1 / 3)
    assert got[0, 0] == 0
    assert got[0, 1].item() == pytest.approx(12 / 16 / 3)
    corners = [(y / 3, x / 3) for y in range(4) for x in range(4)]
    assert got[0, 2].item() == pytest.approx(sum(math.dist(a, b) for a in corners for b in corners) / 256)


def test_what_is_wrong_is_named() -> None:
    given = maps(1, 1, 2, 7, 7)
    with pytest.raises(
        ValueError, match=r"attention_distance: attention does not .* = 0 and grid = \(2, 3\) \(got 7 tok"
    ):
        attention_distance(given, grid=(2, 3))
    with pytest.raises(ValueError, match=r"attention_distance: patch is out of range \(got 0\); expected .*> 0"):
        attention_distance(given, patch=0)
    with pytest.raises(
        ValueError, match=r"aligned_maps: attention does not fit extra_tokens = 7 and grid = None \(got 7 tok"
    ):
        aligned_maps(given, extra_tokens=7)
    with pytest.raises(TypeError, match=r"aligned_maps: attention has the wrong type \(got Tensor\)"):
        aligned_maps(given[0])  # type: ignore[arg-type]

"""Neighborhoods as masks: against loops over queries, natten's own mask (A055), and the layout without forming it."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from regard import masks
from regard.laws.agreement import close
from regard.masks.grids import Axis, Neighborhood
from vision.naive_neighborhood import naive_window

VECTORS = Path(__file__).parents[1] / "vectors" / "A055.npz"

LINES = [
    (L, k, s, d, causal)
    for L, k, s, d, causal in itertools.product((5, 9, 12), (1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 3), (False, True))
    if k * d <= L and s <= k
]

MAPS = [
    ((4, 5), (3, 3), (1, 1), (1, 1), (False, False)),
    ((5, 6), (2, 3), (2, 1), (2, 1), (True, False)),
    ((6, 6), (3, 3), (3, 3), (1, 1), (False, False)),
    ((5, 4), (2, 2), (1, 2), (2, 1), (True, True)),
    ((3, 4, 4), (2, 3, 4), (1, 3, 2), (1, 1, 1), (True, False, False)),
    ((2, 4, 2), (1, 2, 2), (1, 1, 2), (2, 2, 1), (False, True, False)),
]
"""Sizes, windows, strides, dilations, causal axes."""


def brute(sizes, windows, strides, dilations, causal) -> torch.Tensor:
    N = math.prod(sizes)
    places = list(itertools.product(*map(range, sizes)))
    allowed = torch.zeros(N, N, dtype=torch.bool)
    for i, place in enumerate(places):
        axes = [naive_window(*of) for of in zip(place, sizes, windows, strides, dilations, causal, strict=True)]
        for j in itertools.product(*axes):
            allowed[i, places.index(j)] = True
    return allowed


def build(sizes, windows, strides, dilations, causal) -> Neighborhood:
    return masks.neighborhood(sizes, windows, stride=strides, dilation=dilations, causal=causal)


def test_lines_equal_the_loops() -> None:
    for L, k, s, d, causal in LINES:
        got = masks.neighborhood((L,), k, stride=s, dilation=d, causal=causal).dense(L)[0, 0]
        assert torch.equal(got, brute((L,), (k,), (s,), (d,), (causal,))), (L, k, s, d, causal)


@pytest.mark.parametrize("options", MAPS)
def test_maps_equal_the_loops_in_every_form(options) -> None:
    mask, want = build(*options), brute(*options)
    N = len(want)
    assert torch.equal(mask.dense(N), want[None, None])
    assert mask.count(N) == want.sum()
    for block in (1, 4, 7):
        layout = mask.layout(N, block=block)
        padded = torch.nn.functional.pad(want, (0, -N % block) * 2).unfold(0, block, block).unfold(1, block, block)
        inside = torch.nn.functional.pad(~want, (0, -N % block) * 2).unfold(0, block, block).unfold(1, block, block)
        assert torch.equal(layout.to_dense_blocks()[0, 0], padded.flatten(2).any(-1))
        assert torch.equal(layout.to_dense_full()[0, 0], padded.flatten(2).any(-1) & ~inside.flatten(2).any(-1))
    distance = torch.arange(N)[:, None] - torch.arange(N)
    assert distance[want].max() <= mask.span[0]
    assert -distance[want].min() <= mask.span[1]
    assert mask.is_causal == all(options[4])


def test_is_nattens_mask() -> None:
    """182 lines of up to 12 tokens, from its own mask function."""
    with np.load(VECTORS) as file:
        params, bits = file["maskbank_params"], file["maskbank_bits"]
    assert len(params) == 182
    for (L, k, s, d, causal), packed in zip(params.tolist(), bits, strict=True):
        want = torch.from_numpy(np.unpackbits(packed)[:144].reshape(12, 12)[:L, :L].astype(bool))
        got = masks.neighborhood((L,), k, stride=s, dilation=d, causal=bool(causal)).dense(L)[0, 0]
        assert torch.equal(got, want), (L, k, s, d, causal)


def test_every_query_sees_whole_windows_at_borders_too() -> None:
    assert masks.neighborhood((7, 9), (3, 5)).dense(63).sum(-1).eq(15).all()
    blocked = masks.neighborhood((12,), 4, stride=4).dense(12)[0, 0]
    assert torch.equal(blocked, masks.blocks(4).dense(12)[0, 0])
    shifted = masks.neighborhood((10,), 4, stride=4).dense(10)[0, 0]
    assert shifted[8:, 6:].all()  # the last, short block sees a whole window
    assert not shifted[8:, :6].any()
    assert torch.equal(masks.neighborhood((9,), 3, causal=True).dense(9), (masks.causal() & masks.window(3)).dense(9))


def test_dilated_layers_see_exponentially_far() -> None:
    """3 layers of window 3: 7 places with dilation 1, all 27 with dilations 1, 3, 9."""
    near, far = torch.eye(27), torch.eye(27)
    for d in (1, 3, 9):
        near = masks.neighborhood((27,), 3).dense(27)[0, 0].float() @ near
        far = masks.neighborhood((27,), 3, dilation=d).dense(27)[0, 0].float() @ far
    assert near[13].count_nonzero() == 7
    assert far[13].count_nonzero() == 27


def test_equal_numbers_are_equal_masks_and_words_build_them() -> None:
    one = masks.neighborhood((4, 6), 3, dilation=(1, 2))
    assert one == masks.neighborhood((4, 6), (3, 3), dilation=(1, 2))
    assert hash(one) == hash(masks.neighborhood([4, 6], [3, 3], dilation=[1, 2]))
    assert one.axes == (Axis(4, 3), Axis(6, 3, dilation=2))
    for mask in (one, masks.neighborhood((9,), 3, stride=2, causal=True), masks.neighborhood((3, 4, 5), (2, 3, 4))):
        assert eval(repr(mask), {"neighborhood": masks.neighborhood}) == mask


def test_runs_as_any_mask_does() -> None:
    torch.manual_seed(0)
    mask = masks.neighborhood((4, 6), (3, 5), dilation=(1, 1)) | masks.global_tokens(2)
    q, k, v = (torch.randn(2, 2, 24, 4, dtype=torch.float64) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.dense(24))
    for kernel in ("eager", "block_sparse"):
        close(regard.attention(q, k, v, mask=mask, kernel=kernel), want)


def test_positions_outside_the_map_see_nothing() -> None:
    mask = masks.neighborhood((2, 3), 2)
    assert not mask.dense(8, 6)[0, 0, :2].any()
    assert torch.equal(mask.dense(8, 6)[0, 0, 2:], mask.dense(6)[0, 0])


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        (((8, 8), 9), {}, "window 9 with dilation 1 does not fit an axis of 8"),
        (((8, 6), 3), {"dilation": (2, 3)}, "does not fit an axis of 6"),
        (((8,), 3), {"stride": 4}, "stride 4 exceeds window 3"),
        (((8, 8), (3, 3, 3)), {}, "window has 3 values for 2 axes"),
        (((8, 8), 3), {"causal": (True,)}, "causal"),
        (((8, 8), 3), {"causal": "first"}, "causal"),
        (((2, 2, 2, 2), 1), {}, "1 to 3 axes"),
        (((8,), 0), {}, r"window is too small \(got 0\); expected an int >= 1"),
    ],
)
def test_bad_input(given, options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masks.neighborhood(*given, **options)
    with pytest.raises(TypeError, match="window has the wrong type"):
        masks.neighborhood((8,), 3.0)

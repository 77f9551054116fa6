"""Masks of single keys: lists of runs of queries, and keys that go out of sight."""

import pytest
import torch

from regard import masks
from regard.masks import Mask
from regard.masks.flat import flatten, unflatten
from regard.masks.lists import Lasting

SIZES = [(50, 70), (70, 50), (40, 40), (1, 9)]


def lists(T: int, S: int, run: int, k: int = 6) -> torch.Tensor:
    """Some keys twice, some none."""
    return torch.randint(-2, S, (2, 3, -(-T // run), k), generator=torch.Generator().manual_seed(T + run))


def holds(mask: Mask, want: torch.Tensor) -> None:
    """In all forms: as a tensor, one entry at a time, by blocks of several sizes, counted, turned round, in a word."""
    T, S = want.shape[2:]
    assert torch.equal(mask.dense(T, S).expand_as(want), want)
    b, h, i, j = (
        want.new_zeros(want.shape, dtype=torch.long) + z
        for z in torch.meshgrid(*map(torch.arange, want.shape), indexing="ij")
    )
    b, h = (z if n > 1 else 0 for z, n in ((b, mask.batch), (h, mask.heads)))
    assert torch.equal(mask(b, h, i + S - T, j), want)
    own = want[: mask.batch, : mask.heads]
    assert mask.count(T, S) == own.sum()
    for cut in ((16, 16), (5, 33), (1, 1)):
        padded = torch.nn.functional.pad(own, (0, -S % cut[1], 0, -T % cut[0]))
        blocks = padded.unflatten(3, (-1, cut[1])).unflatten(2, (-1, cut[0]))
        for m, w in ((mask, blocks.any(-1).any(3)), (~mask, None), (mask & masks.causal(), None)):
            if w is None:
                w = m.dense(T, S)
                w = torch.nn.functional.pad(w, (0, -S % cut[1], 0, -T % cut[0]))
                w = w.unflatten(3, (-1, cut[1])).unflatten(2, (-1, cut[0])).any(-1).any(3)
            assert torch.equal(m.layout(T, S, block=cut).to_dense_blocks(), w)
    flat = flatten(mask)
    assert flat is not None
    assert torch.equal(unflatten(*flat).dense(T, S), mask.dense(T, S))


@pytest.mark.parametrize("run", [1, 7, 64])
@pytest.mark.parametrize(("T", "S"), SIZES)
def test_lists_hold_their_keys(T: int, S: int, run: int) -> None:
    keys = lists(T, S, run)
    want = torch.zeros(2, 3, T, S, dtype=torch.bool)
    for b in range(2):
        for h in range(3):
            for t in range(T):
                for j in keys[b, h, t // run].tolist():
                    if j >= 0:
                        want[b, h, t, j] = True
    holds(masks.listed(keys, T, S, run=run), want)
    one = masks.listed(keys[:1, :1], T, S, run=run)
    holds(one, want[:1, :1].expand(2, 3, -1, -1))
    assert repr(one) == f"listed(<1x1x{-(-T // run)}x6>, run={run})"


@pytest.mark.parametrize(("T", "S"), SIZES)
def test_keys_last_until_they_go(T: int, S: int) -> None:
    until = torch.randint(0, S + 4, (2, 3, S), generator=torch.Generator().manual_seed(T))
    want = torch.arange(S - T, S)[:, None] < until[:, :, None]
    holds(Lasting(until), want)
    holds(Lasting(until[:1, :1]), want[:1, :1].expand(2, 3, -1, -1))


def test_lists_must_fit() -> None:
    keys = torch.zeros(1, 1, 5, 2, dtype=torch.long)
    assert masks.listed(keys, 9, 20, run=2).count(9, 20) == 9
    with pytest.raises(ValueError, match=r"listed: keys has the wrong shape .*\(B, H, 9, k\) for T=9, run=1"):
        masks.listed(keys, 9, 20)
    with pytest.raises(TypeError, match="listed: keys has the wrong dtype"):
        masks.listed(keys.float(), 9, 20, run=2)

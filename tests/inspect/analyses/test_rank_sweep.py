"""Rank against heads: the fit against loops, and what the paper says of low rank."""

import pytest
import torch
from tests.cross import naive_nearest as naive

from regard.cross.nearest import draw, frames, sphere
from regard.inspect.analyses.rank_sweep import rank_sweep
from regard.laws.agreement import close


def points(batch: int, queries: int, keys: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return sphere(batch, queries, dim, generator=generator), draw(batch, keys, dim, generator=generator)


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_loops(tied: bool) -> None:
    """The heads' own answers by the oracle, and the ridge's equations solved as written."""
    queries, keys = (z.double() for z in points(6, 2, 3, 3))
    got = rank_sweep(queries, keys, ranks=[1, 2], heads=[1, 3], tied=tied, ridge=0.1, seed=4)
    generator = torch.Generator().manual_seed(4)
    for row, rank in enumerate((1, 2)):
        Q = frames(3, rank, 3, generator=generator).double()
        K = Q if tied else frames(3, rank, 3, generator=generator).double()
        one, target = torch.eye(3, dtype=torch.float64)[None], naive.nearest(queries, keys)
        f = [naive.low_rank_attention(queries, keys, Q[h : h + 1], K[h : h + 1], one, hard=True) for h in range(3)]
        for column, H in enumerate((1, 3)):
            C = torch.stack([torch.stack([(f[g][:3] * f[h][:3]).sum() for g in range(H)]) for h in range(H)])
            b = torch.stack([(f[h][:3] * target[:3]).sum() for h in range(H)])
            say = torch.linalg.inv(C + 0.1 * 6 * torch.eye(H).double()) @ b
            answer = sum(say[h] * f[h][3:] for h in range(H))
            close(got[row, column], naive.loss(answer, target[3:]))


def test_rank_can_not_be_made_up_for_by_heads() -> None:
    """Two points: rank one falls with the number of heads, the more slowly the higher the dimension."""
    errors = {}
    for dim in (2, 8):
        queries, keys = points(3000, 2, 2, dim)
        errors[dim] = rank_sweep(queries, keys, ranks=[1], heads=[16, 64, 256])[0].tolist()
        full = rank_sweep(queries, keys, ranks=[dim], heads=[1], tied=True, ridge=1e-9)
        assert full.item() < 1e-9, "one head of full rank is exact"
        assert errors[dim][0] > errors[dim][1] > errors[dim][2]
    assert 0.03 < errors[2][2] < 0.1
    assert 0.25 < errors[8][2] < 0.45
    assert 0.1 < errors[2][0] < 0.3
    assert 0.4 < errors[8][0] < 0.6


def test_a_vote_of_tied_heads_stops_at_a_floor() -> None:
    queries, keys = points(3000, 2, 2, 4)
    few, many = rank_sweep(queries, keys, ranks=[1], heads=[16, 256], tied=True)[0].tolist()
    assert abs(few - many) < 0.05
    assert many > 0.2
    assert rank_sweep(queries, keys, ranks=[1], heads=[256])[0, 0].item() < many


def test_more_rank_is_better_and_seeds_repeat() -> None:
    queries, keys = points(500, 2, 4, 6)
    got = rank_sweep(queries, keys, ranks=[1, 3, 6], heads=[8], tied=True)[:, 0]
    assert got[0] > got[1] > got[2]
    assert torch.equal(got, rank_sweep(queries, keys, ranks=[1, 3, 6], heads=[8], tied=True)[:, 0])
    assert not torch.equal(got, rank_sweep(queries, keys, ranks=[1, 3, 6], heads=[8], tied=True, seed=1)[:, 0])


def test_what_is_wrong_is_named() -> None:
    queries, keys = points(4, 2, 3, 3)
    with pytest.raises(ValueError, match=r"rank_sweep: ranks is too large \(got 4\)"):
        rank_sweep(queries, keys, ranks=[4], heads=[1])
    with pytest.raises(ValueError, match=r"rank_sweep: heads are empty"):
        rank_sweep(queries, keys, ranks=[1], heads=[])
    with pytest.raises(ValueError, match=r"rank_sweep: queries have no half"):
        rank_sweep(queries[:1], keys[:1], ranks=[1], heads=[1])
    with pytest.raises(ValueError, match=r"rank_sweep: ridge "):
        rank_sweep(queries, keys, ranks=[1], heads=[1], ridge=0.0)
    with pytest.raises(ValueError, match=r"keys has the wrong shape"):
        rank_sweep(queries, keys[..., :2], ranks=[1], heads=[1])

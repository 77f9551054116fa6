"""The nearest point: targets against loops and the authors' numbers, and the attention that finds them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cross import naive_nearest as naive
from regard.cross import nearest as ours
from regard.cross.free_rank import low_rank_attention
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[1] / "vectors" / "B008.npz"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(maps: ours.Maps) -> ours.Maps:
    return ours.Maps(*(z.double() for z in maps))


def test_targets_equal_the_loops_and_the_authors_numbers() -> None:
    with np.load(VECTORS) as file:
        z = {name: torch.from_numpy(file[name]) for name in file}
    keys, queries = z["low_keys"], z["low_queries"]
    for found, name, loops in (
        (ours.nearest(queries, keys), "nearest", naive.nearest(queries, keys)),
        (ours.farthest(keys), "farthest", naive.farthest(keys)),
    ):
        assert torch.equal(found, z[name])
        assert torch.equal(found, loops)
    assert torch.equal(ours.farthest(queries, keys), naive.nearest(-queries, keys))
    tied = torch.tensor([[[1.0, 2.0], [1.0, -2.0], [-1.0, 0.0], [-1.0, 3.0]]])
    asked = torch.tensor([[[1.0, 0.0]]])
    assert torch.equal(ours.nearest(asked, tied), tied[:, :1]), "of equal ones the first"
    assert torch.equal(ours.farthest(asked, tied), tied[:, 2:3])


def test_error_is_summed_over_features() -> None:
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), ours.sphere(2, 3, 5).double()
    close(ours.squared_error(x, y), naive.loss(x, y))
    assert ours.squared_error(torch.zeros_like(y), y) == pytest.approx(1)


def test_points_are_on_the_sphere_and_of_every_orientation() -> None:
    for variant, count in (("uniform", 4), ("orthogonal", 4), ("doubled", 8)):
        x = ours.draw(2000, 4, 5, variant=variant, generator=generator())
        assert x.shape == (2000, count, 5)
        assert torch.allclose(x.norm(dim=-1), torch.ones(()), atol=1e-5)
        assert x[:, :4].mean(0).abs().max() < 0.05
        assert torch.allclose(x[:, :4].square().mean(0), torch.tensor(0.2), atol=0.03)
        again = ours.draw(2000, 4, 5, variant=variant, generator=generator())
        assert torch.equal(x, again)
    x = ours.draw(3, 4, 5, variant="orthogonal", generator=generator())
    assert torch.allclose(x @ x.mT, torch.eye(4).expand(3, -1, -1), atol=1e-5)
    x = ours.draw(3, 4, 5, variant="doubled", generator=generator())
    assert torch.equal(x[:, 4:], -x[:, :4])
    assert torch.equal(ours.farthest(x), -x), "each one's negative"


@pytest.mark.parametrize("far", [False, True])
def test_one_head_is_exact(far: bool) -> None:
    keys = ours.draw(5, 9, 4, generator=generator()).double()
    queries = keys if far else ours.sphere(5, 7, 4, generator=generator(1)).double()
    want = ours.farthest(keys) if far else ours.nearest(queries, keys)
    assert torch.equal(low_rank_attention(queries, keys, *double(ours.exact(4, far=far)), hard=True), want)
    soft = {c: low_rank_attention(queries, keys, *double(ours.exact(4, factor=c, far=far))) for c in (1.0, 1e6)}
    assert ours.squared_error(soft[1e6], want) < 1e-6
    assert ours.squared_error(soft[1.0], want) > 0.2


def test_a_majority_votes() -> None:
    maps = ours.majority(6, 2, 4, generator=generator())
    assert torch.allclose(maps.Q @ maps.Q.mT, torch.eye(2).expand(6, -1, -1), atol=1e-5)
    assert torch.equal(maps.Q, maps.K)
    assert torch.equal(maps.VO, torch.eye(4).expand(6, -1, -1) / 6)
    keys, queries = ours.draw(3, 4, 4, generator=generator(1)), ours.sphere(3, 2, 4, generator=generator(2))
    close(
        low_rank_attention(queries.double(), keys.double(), *double(maps), hard=True),
        naive.low_rank_attention(queries.double(), keys.double(), *double(maps), hard=True),
    )
    whole = double(ours.majority(3, 4, 4, generator=generator()))
    assert torch.allclose(low_rank_attention(queries.double(), keys.double(), *whole, hard=True).float(),
                          ours.nearest(queries, keys), atol=1e-6), "full rank: all say the same"  # fmt: skip


def test_a_circle_of_heads_is_spaced_evenly() -> None:
    Q, K, VO = ours.circle(4)
    angles = torch.atan2(Q[:, 0, 1], Q[:, 0, 0])
    assert torch.allclose(angles, torch.arange(4) * math.pi / 4, atol=1e-6)
    assert torch.equal(Q, K)
    assert torch.equal(VO, torch.eye(2).expand(4, -1, -1) / 4)


def test_expectations_equal_the_loops_and_what_is_drawn() -> None:
    """In the plane, two points: how heads overlap and how often they are right, by formula and by drawing."""
    q, k = (ours.sphere(5, 2, generator=generator(n)).double() for n in (0, 1))
    close(ours.agreement(q, k), naive.normal_matrix(q, k))
    keys, queries = (ours.sphere(20000, n, 2, generator=generator(n)).double() for n in (2, 1))
    target = ours.nearest(queries, keys)
    one = torch.ones(1, dtype=torch.float64)
    picked = torch.stack([
        low_rank_attention(queries, keys, *ours.weighted(a[None, None], b[None, None], one), hard=True)
        for a, b in zip(q, k, strict=True)
    ]).flatten(1)  # fmt: skip
    assert torch.allclose(picked @ picked.T / 20000, ours.agreement(q, k), atol=0.03)
    success = picked @ target.flatten() / 20000
    assert torch.allclose(success, ours.plane_success(q, k), atol=0.03)
    few = slice(0, 40)
    close(picked[:, :80] @ target[few].flatten() / 40, naive.right_hand_side(q, k, queries[few], keys[few]))
    assert ours.plane_success(q, q).tolist() == pytest.approx(5 * [0.75])


def test_the_best_say_is_least_squares() -> None:
    q, k = (ours.sphere(6, 2, generator=generator(n)).double() for n in (3, 4))
    C, b = ours.agreement(q, k), ours.plane_success(q, k)
    say, error = ours.best_say(b, C)
    close(error, naive.expected_error(say, b, C))
    for n in range(6):
        assert naive.expected_error(say + 0.01 * torch.eye(6).double()[n], b, C) > error
    assert error < naive.expected_error(torch.full_like(say, 1 / 6), b, C)
    maps = ours.weighted(q[:, None], k[:, None], say)
    for got, want in zip(maps, naive.rank_one(q, k, say), strict=True):
        close(got, want)
    keys, queries = (ours.sphere(20000, n, 2, generator=generator(n)).double() for n in (2, 1))
    answer = low_rank_attention(queries, keys, *maps, hard=True)
    assert ours.squared_error(answer, ours.nearest(queries, keys)) == pytest.approx(error.item(), abs=0.03)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"draw: points are too many to be orthogonal \(got 5\); expected at most"):
        ours.draw(1, 5, 4, variant="orthogonal")
    with pytest.raises(ValueError, match=r"draw: variant is unknown \(got 'near'\)"):
        ours.draw(1, 5, 4, variant="near")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"majority: dim is too small \(got 2\)"):
        ours.majority(3, 4, 2)
    with pytest.raises(ValueError, match=r"exact: factor "):
        ours.exact(4, factor=0.0)
    with pytest.raises(ValueError, match=r"say has the wrong shape"):
        ours.weighted(torch.ones(2, 1, 3), torch.ones(2, 1, 3), torch.ones(3))

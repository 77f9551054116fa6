"""The sparse distributed memory against all addresses counted, caps against random points, and heads of known beta."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.inspect.analyses.naive_sparse_memory import drawn_caps, naive_beta, naive_intersection, naive_weights

from regard.inspect.analyses.sparse_memory import (
    cap_intersection,
    circle_intersection,
    fitted_beta,
    sparse_memory_fit,
    sparse_memory_weights,
)
from regard.laws.agreement import close


def test_by_hand() -> None:
    """Two bits, radius 1: 3 of 4 addresses are near a point; two points 1 apart share 2, two points 2 apart share 2."""
    close(circle_intersection(2, 1).exp(), torch.tensor([3.0, 2.0, 2.0], dtype=torch.float64))
    close(circle_intersection(3, 0).exp(), torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    close(circle_intersection(3, 3).exp(), torch.full((4,), 8.0, dtype=torch.float64))
    got = sparse_memory_weights(torch.tensor([0, 1, 2]), 2, 1)
    close(got, torch.tensor([3 / 7, 2 / 7, 2 / 7], dtype=torch.float64))


@pytest.mark.parametrize("n", [5, 8])
def test_equals_all_addresses_counted(n: int) -> None:
    for radius in range(n + 1):
        want = torch.tensor([naive_intersection(n, radius, v) for v in range(n + 1)], dtype=torch.float64)
        close(circle_intersection(n, radius).exp(), want)
        if 0 < radius < n:
            assert fitted_beta(n, radius) == pytest.approx(naive_beta(n, radius))
    hamming = [0, 2, 3, 3]
    got = sparse_memory_weights(torch.tensor(hamming), n, 3)
    close(got, torch.tensor(naive_weights(hamming, n, 3), dtype=torch.float64))


def test_large_memories_do_not_overflow() -> None:
    table = circle_intersection(1000, 451)
    assert table.isfinite().sum() == 2 * 451 + 1
    assert bool((table.diff()[:902] < 1e-9).all())
    whole = sum(math.comb(1000, k) for k in range(452))
    assert table[0].item() == pytest.approx(math.log(whole))


def test_caps_are_what_random_points_say() -> None:
    cosine = torch.tensor([0.9, 0.5, 0.0, -0.4], dtype=torch.float64)
    got = cap_intersection(6, 2, cosine).exp()
    for c, share in zip(cosine.tolist(), got.tolist(), strict=True):
        assert share == pytest.approx(drawn_caps(6, c, 1 - 4 / 6, 200_000), abs=1.5e-3)
    assert got[0] > got[1] > got[2] > got[3] > 0
    assert cap_intersection(6, 1, torch.tensor([-0.9])).exp() == 0, "too far apart"


def test_caps_in_three_dimensions() -> None:
    """One cap alone (both centres the same) is 1/2 (1 - cos angle) of the sphere in three dimensions."""
    got = cap_intersection(3, 1, torch.tensor([1.0]), points=400).exp()
    assert got.item() == pytest.approx((1 - (1 - 2 / 3)) / 2, rel=1e-4)


@pytest.mark.parametrize(("n", "radius"), [(64, 22), (64, 27), (128, 55)])
def test_a_softmax_approximates_the_memory(n: int, radius: int) -> None:
    """The claim, in small: for patterns within the radius the log is nearly linear in the cosine."""
    table, v = circle_intersection(n, radius), torch.arange(radius)
    cosine = 1 - 2 * v.double() / n
    pair = torch.stack([cosine, table[v]])
    assert torch.corrcoef(pair)[0, 1] > 0.99
    slope = torch.cov(pair)[0, 1] / cosine.var()
    softmax = (slope * cosine).softmax(-1)
    memory, even = sparse_memory_weights(v, n, radius), torch.full_like(softmax, 1 / radius)
    assert (memory - softmax).abs().sum() < 0.4 * (memory - even).abs().sum()


def test_beta_falls_with_the_radius() -> None:
    betas = [fitted_beta(64, radius) for radius in range(1, 40)]
    assert all(a > b for a, b in pairwise(betas))


@pytest.mark.parametrize("groups", [1, 3])
def test_heads_of_known_temperature(groups: int) -> None:
    """Unit queries and keys with the temperature of a known memory; norms that vary explain what cosines can't."""
    radii = [20, 25, 28]
    q = F.normalize(torch.randn(2, 3, 30, 64, dtype=torch.float64), dim=-1)
    k = F.normalize(torch.randn(2, groups, 40, 64, dtype=torch.float64), dim=-1)
    q = q * torch.tensor([fitted_beta(64, r) for r in radii], dtype=torch.float64)[:, None, None]
    got = sparse_memory_fit(q, k, scale=1.0)
    assert got.radius.tolist() == radii
    close(got.beta, got.radius_beta)
    close(got.explained, torch.ones(3, dtype=torch.float64))
    uneven = sparse_memory_fit(q * torch.rand(2, 3, 30, 1) * 2, k, scale=1.0)
    assert uneven.explained.max() < 0.95
    plain = sparse_memory_fit(q, k)
    close(plain.beta, got.beta / 8)


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"circle_intersection: radius is too large \(got 5\); expected an int from 0 to 4"
    ):
        circle_intersection(4, 5)
    with pytest.raises(
        ValueError, match=r"cap_intersection: radius is too large \(got 3\); expected an int from 1 to 2"
    ):
        cap_intersection(6, 3, torch.ones(1))
    with pytest.raises(
        ValueError, match=r"sparse_memory_weights: hamming is out of range \(got 5\); expected numbers from 0 to 4"
    ):
        sparse_memory_weights(torch.tensor([5]), 4, 2)
    with pytest.raises(ValueError, match=r"sparse_memory_fit: num_heads is no multiple of num_kv_heads = 2 \(got 3\)"):
        sparse_memory_fit(torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8))
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r'pip install "regard\[inspect\]"'):
        cap_intersection(6, 1, torch.ones(1))

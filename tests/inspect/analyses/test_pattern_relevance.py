"""How much heads attend to a pattern, against loops whose author has read neither code nor test."""

import pytest
import torch
from tests.inspect.analyses.test_rollout import maps

import regard
from heads import naive_pattern_heads as naive
from regard import masks
from regard.heads.pattern_heads import pattern_mask
from regard.inspect.analyses.pattern_relevance import pattern_relevance
from regard.inspect.trace import trace
from regard.laws.agreement import close


def test_by_hand() -> None:
    one = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 1.0, 0.0]]]], dtype=torch.float64)
    got = pattern_relevance([one], masks.offset(1))
    close(got.relevance, torch.tensor([[1 / 3]], dtype=torch.float64))
    close(got.chance, torch.tensor(2 / 9, dtype=torch.float64))
    short = pattern_relevance([one], masks.offset(1), valid=torch.tensor([[True, True, False]]))
    close(short.relevance, torch.tensor([[0.25]], dtype=torch.float64))
    close(short.chance, torch.tensor(0.25, dtype=torch.float64))


def test_equals_the_loops() -> None:
    given = maps(2, 3, 2, 5, 5)
    pattern = torch.rand(3, 5, 5) > 0.5
    want = torch.stack([torch.stack([naive.relevance(m[:, h], pattern) for h in range(2)]) for m in given])
    close(pattern_relevance(given, pattern).relevance, want)
    even = torch.full((3, 5, 5), 0.2, dtype=torch.float64)
    close(pattern_relevance(given, pattern).chance, naive.relevance(even, pattern))


def test_a_pattern_is_found_where_it_was_put() -> None:
    """The claim: two layers of 8 heads, three of which were given the same tokens to look at."""
    ids = torch.stack([torch.randperm(20)[:6].repeat_interleave(2)[torch.randperm(12)] for _ in range(4)])
    pattern = masks.same_token(ids)
    where = torch.zeros(2, 8, dtype=torch.bool)
    where[0, 1] = where[0, 4] = where[1, 2] = True
    model = weights_of([torch.nonzero(row).flatten().tolist() for row in where], pattern)
    got = pattern_relevance(model, pattern)
    assert got.chance.item() == pytest.approx(1 / 12)
    close(got.relevance[where], torch.ones(3, dtype=torch.float64))
    assert got.relevance[~where].sub(1 / 12).abs().max() < 0.1
    assert got.significance(where) > 5
    assert got.significance(where.roll(1, 1)).abs() < 3


def weights_of(heads: list[list[int]], pattern: masks.Mask) -> list[torch.Tensor]:
    """The weights of layers in which these heads have the pattern."""
    torch.manual_seed(0)
    x, found = torch.randn(4, 12, 32, dtype=torch.float64), []
    for given in heads:
        layer = regard.create("pattern_heads", dim=32, num_heads=8, patterns={}).double()
        with torch.no_grad():
            found += trace(layer, {"x": x, "mask": pattern_mask(dict.fromkeys(given, pattern), 8)}).maps()
    return found


def test_what_is_wrong_is_named() -> None:
    given = maps(1, 2, 4, 3, 3)
    with pytest.raises(TypeError, match="pattern_relevance: pattern is none"):
        pattern_relevance(given, torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="pattern_relevance: pattern has the wrong shape"):
        pattern_relevance(given, torch.ones(3, 3, 3) > 0)
    with pytest.raises(ValueError, match="pattern_relevance: pattern has other sizes"):
        pattern_relevance(given, masks.per_head([masks.full()] * 4))
    with pytest.raises(ValueError, match="pattern_relevance: valid marks no token of an input"):
        pattern_relevance(given, masks.full(), valid=torch.tensor([[True] * 3, [False] * 3]))
    got = pattern_relevance(given, masks.full())
    with pytest.raises(ValueError, match="significance: important marks too few"):
        got.significance(torch.tensor([[True, False, False, False]]))
    with pytest.raises(TypeError, match="significance: important has the wrong dtype"):
        got.significance(torch.ones(1, 4))
    with pytest.raises(ValueError, match="significance: important"):
        got.significance(torch.ones(2, 4) > 0)

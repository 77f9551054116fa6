"""Local value pruning: loops whose author has read neither the code nor this test, and what it leaves out."""

import pytest
import torch

import regard
from mixers.naive_spatten import local_value_topk as naive
from regard.laws.agreement import close
from regard.normalizers import ValuePruning, local_value_topk
from vision.shared import normal


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loops(ratio: float, masked: bool) -> None:
    scores = normal(1, 2, 2, 3, 10)
    allowed = normal(2, 2, 1, 3, 10) > -0.5 if masked else None
    got = ValuePruning(ratio=ratio)(scores, allowed)
    hidden = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    for row, p, real in zip(
        got.flatten(0, 2),
        hidden.softmax(-1).flatten(0, 2),
        torch.ones_like(got).bool().flatten(0, 2) if allowed is None else allowed.expand(2, 2, 3, 10).flatten(0, 2),
        strict=True,
    ):
        close(row, naive(p, ratio, real.tolist()))
        assert (row > 0).sum() == real.sum() - int(real.sum() * ratio + 1e-9)


def test_a_mutant_of_the_loops_is_told() -> None:
    p = normal(1, 10).softmax(-1)
    close(local_value_topk(p, 0.3), naive(p, 0.3))
    assert not torch.equal(local_value_topk(p, 0.3), naive(-p, 0.3).abs())
    assert not torch.equal(local_value_topk(p, 0.3), naive(p, 0.4))


def test_a_share_of_the_values_counts_for_nothing() -> None:
    """Of 12 keys 4 reach a query no more, and the others have the weights that they had."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 12, 4, dtype=torch.float64)[:, 0].unbind()
    v.requires_grad_()
    pruned = regard.attention(q, k, v, normalizer=ValuePruning(ratio=1 / 3))
    (seen,) = torch.autograd.grad(pruned[0, 0, 0].sum(), v)
    assert (seen[0, 0, :, 0] != 0).sum() == 8
    weights = (q @ k.mT / 2).softmax(-1)[0, 0, 0]
    kept = weights.topk(8)
    close(seen[0, 0, kept.indices, 0], kept.values)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"ValuePruning: ratio is out of range \(got 1.0\)"):
        ValuePruning(ratio=1.0)
    with pytest.raises(ValueError, match=r"local_value_topk: ratio is out of range"):
        local_value_topk(torch.ones(3), -0.1)

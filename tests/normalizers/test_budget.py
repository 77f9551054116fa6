"""Budget sparsemax against the definition by a search, the entmax package, and its gradients."""

import pytest
import torch
from torch import Tensor

from regard.laws.agreement import close
from regard.normalizers import Budget, Softmax
from regard.normalizers.budget import budget_sparsemax
from regard.normalizers.entmax import sparsemax


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(z: list[float], budget: float) -> list[float]:
    """tau by halving, in Python floats."""
    low, high = min(z) - 1, max(z)
    for _ in range(200):
        tau = (low + high) / 2
        if sum(min(max(v - tau, 0.0), 1.0) for v in z) >= budget:
            low = tau
        else:
            high = tau
    return [min(max(v - low, 0.0), 1.0) for v in z]


@pytest.mark.parametrize("budget", [0.3, 1.0, 2.0, 3.7, 6.0, 7.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_equals_the_definition(budget: float, scale: float) -> None:
    z = scale * rows(5, 7)
    close(budget_sparsemax(z, budget), torch.tensor([naive(row.tolist(), budget) for row in z], dtype=torch.float64))


@pytest.mark.parametrize("budget", [0, 1, 2.5, 5, 9])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_entmax_package(budget: float, dim: int) -> None:
    package = pytest.importorskip("entmax")
    z = rows(9, 9, 9).requires_grad_()
    ours, theirs = budget_sparsemax(z, budget, dim), package.budget_bisect(z, budget, dim, 80)
    close(ours, theirs)
    if 0 < budget < 9:
        d = rows(9, 9, 9, seed=1)
        close(torch.autograd.grad(ours, z, d)[0], torch.autograd.grad(theirs, z, d)[0])


def test_a_budget_of_one_is_sparsemax() -> None:
    z = rows(4, 8)
    close(budget_sparsemax(z, 1), sparsemax(z))


def test_gradients_on_scores_and_budget() -> None:
    z = rows(4, 6).requires_grad_()
    budget = torch.tensor([[0.5], [1.0], [2.5], [4.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(budget_sparsemax, (z, budget))
    assert torch.autograd.gradgradcheck(budget_sparsemax, (z, budget))


@pytest.mark.parametrize("budget", [1.0, 2.5, 1000.0])
def test_long_rows_in_single_precision_and_far_scores(budget: float) -> None:
    z = rows(2, 50_000).float()
    z[:, ::3] = -1e9  # how some mask
    p = budget_sparsemax(z, budget)
    assert (p - budget_sparsemax(z.double(), budget)).abs().max() < 1e-6
    assert (p.double().sum(-1) - budget).abs().max() < 1e-5 * budget


def test_a_budget_is_spent_on_as_many_keys() -> None:
    z = torch.tensor([9.0, 7.0, 5.0, 0.0, -2.0], dtype=torch.float64)[None, None, None]
    assert Softmax()(z, None).amax() < 1
    assert Budget(budget=3.0)(z, None).flatten().tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_masked_keys_and_short_rows() -> None:
    z = rows(1, 2, 4, 6)
    allowed = torch.ones(4, 6, dtype=torch.bool).tril()[None, None].clone()
    allowed[:, :, 3] = False
    hurt = z.masked_fill(~allowed, float("nan")).requires_grad_()
    p = Budget(budget=2.0)(hurt, allowed)
    assert torch.equal(p[:, :, 0], torch.eye(6, dtype=torch.float64)[0].expand(1, 2, 6)), "one key has 1"
    assert torch.equal(p[:, :, 1, :2], torch.ones(1, 2, 2, dtype=torch.float64)), "two keys have 1 each"
    assert not p[:, :, 3].any()
    close(p[:, :, 2, :3], budget_sparsemax(z[:, :, 2, :3], 2.0))
    p.square().sum().backward()
    assert hurt.grad is not None
    assert hurt.grad.isfinite().all()


def test_refuses_what_is_no_budget() -> None:
    for budget in (-1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"budget_sparsemax: budget is out of range .*; expected a finite number >= 0"
        ):
            budget_sparsemax(rows(2, 3), budget)
        with pytest.raises(
            ValueError, match=r"budget_sparsemax: budget is out of range .*; expected finite numbers >= 0"
        ):
            budget_sparsemax(rows(2, 3), torch.tensor([[1.0], [budget]]))
    with pytest.raises(ValueError, match=r"Budget: budget is out of range"):
        Budget(budget=0.0)

"""Normmax against the definition by a search, the entmax package, and its gradients."""

import pytest
import torch
from torch import Tensor

from regard.laws.agreement import close
from regard.normalizers import Normmax, Softmax
from regard.normalizers.normmax import normmax


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(z: list[float], alpha: float) -> list[float]:
    """tau by halving, in Python floats."""
    low, high = max(z) - 1, max(z)
    for _ in range(200):
        tau = (low + high) / 2
        if sum(max(v - tau, 0.0) ** (alpha / (alpha - 1)) for v in z) >= 1:
            low = tau
        else:
            high = tau
    q = [max(v - low, 0.0) ** (1 / (alpha - 1)) if v > low else 0.0 for v in z]
    return [v / sum(q) for v in q]


@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 3.0, 10.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_equals_the_definition(alpha: float, scale: float) -> None:
    z = scale * rows(5, 7)
    close(normmax(z, alpha), torch.tensor([naive(row.tolist(), alpha) for row in z], dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1.1, 2.0, 5.0, 1000.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_entmax_package(alpha: float, dim: int) -> None:
    package = pytest.importorskip("entmax")
    z = rows(4, 5, 7).requires_grad_()
    ours, theirs = normmax(z, alpha, dim), package.normmax_bisect(z, alpha, dim, 80)
    close(ours, theirs)
    if alpha < 10:
        d = rows(4, 5, 7, seed=1)
        close(torch.autograd.grad(ours, z, d)[0], torch.autograd.grad(theirs, z, d)[0], 1e-8)


def test_it_is_the_best() -> None:
    """No other point of the simplex gives more than p.z - |p|."""
    z, alpha = rows(6), 1.7
    p = normmax(z, alpha)
    value = p @ z - p.norm(alpha)
    others = torch.softmax(3 * rows(500, 6, seed=1), -1)
    assert ((others @ z - others.norm(alpha, dim=-1)) <= value + 1e-12).all()
    nearer = 0.99 * p + 0.01 * others
    assert ((nearer @ z - nearer.norm(alpha, dim=-1)) <= value + 1e-12).all()


def test_gradients_on_scores_and_alpha() -> None:
    z = rows(4, 6).requires_grad_()
    alpha = torch.tensor([[1.2], [1.7], [2.0], [4.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normmax, (z, alpha))
    assert torch.autograd.gradgradcheck(normmax, (z, alpha))


@pytest.mark.parametrize("alpha", [1.1, 2.0, 50.0])
def test_long_rows_in_single_precision(alpha: float) -> None:
    z = rows(2, 50_000).float()
    p = normmax(z, alpha)
    assert (p - normmax(z.double(), alpha)).abs().max() < 1e-6
    assert (p.sum(-1) - 1).abs().max() < 1e-6


def test_weights_grow_even_and_the_rest_is_exactly_zero() -> None:
    z = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)[None, None, None]
    assert (Softmax()(z, None) > 0).all()
    mild, strong = Normmax(alpha=2.0)(z, None), Normmax(alpha=1000.0)(z, None)
    assert (mild == 0).flatten().tolist() == [False, False, False, False, True]
    assert (strong == 0).flatten().tolist() == [False, False, False, True, True]
    kept = strong[strong > 0]
    assert kept.max() / kept.min() < 1.01


def test_masked_keys_and_empty_rows_are_zero_and_cannot_poison() -> None:
    z = rows(1, 2, 3, 6)
    allowed = torch.ones(1, 1, 3, 6, dtype=torch.bool)
    allowed[..., 4:] = False
    allowed[:, :, 2] = False
    hurt = z.masked_fill(~allowed, float("nan")).requires_grad_()
    p = Normmax()(hurt, allowed)
    assert torch.equal(p[..., 4:], torch.zeros_like(p[..., 4:]))
    assert torch.equal(p[:, :, 2], torch.zeros_like(p[:, :, 2]))
    close(p[:, :, :2, :4], normmax(z[:, :, :2, :4]))
    p.square().sum().backward()
    assert hurt.grad is not None
    assert hurt.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 0.5, float("nan"), float("inf")])
def test_refuses_alpha_of_one_and_below(alpha: float) -> None:
    for make in (lambda: Normmax(alpha=alpha), lambda: normmax(rows(2, 3), alpha)):
        with pytest.raises(
            ValueError, match=r"ormmax: alpha is out of range \(got .*\); expected a finite number > 1$"
        ):
            make()
    with pytest.raises(ValueError, match=r"normmax: alpha is out of range \(got .*\); expected finite numbers > 1$"):
        normmax(rows(2, 3), torch.tensor([[2.0], [alpha]]))
    with pytest.raises(ValueError, match=r"normmax: alpha varies along the normalised axis"):
        normmax(rows(2, 3), torch.full((2, 3), 2.0))

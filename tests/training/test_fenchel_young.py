"""Fenchel-Young losses against the entmax package's, cross-entropy, and their own definition."""

import pytest
import torch
from torch import Tensor

from regard.laws.agreement import close
from regard.normalizers.budget import budget_sparsemax
from regard.training import FenchelYoungLoss, budget_loss, entmax_loss, normmax_loss, sparsemax_loss


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CLASSES = torch.randint(9, (20,), generator=torch.Generator().manual_seed(1))
PACKAGE = {
    "sparsemax": (sparsemax_loss, "sparsemax_loss", ()),
    "1.5": (entmax_loss, "entmax15_loss", ()),
    **{f"entmax {a}": (entmax_loss, "entmax_bisect_loss", (a,)) for a in (1.1, 1.3, 2.5, 3.0)},
    **{f"normmax {a}": (normmax_loss, "normmax_bisect_loss", (a,)) for a in (1.1, 1.5, 2.0, 5.0)},
}


@pytest.mark.parametrize("case", PACKAGE)
def test_equals_the_entmax_package(case: str) -> None:
    package = pytest.importorskip("entmax")
    loss, name, knob = PACKAGE[case]
    z = (2 * rows(20, 9)).requires_grad_()
    ours = loss(z, CLASSES, *knob, reduction="none")
    theirs = getattr(package, name)(z, CLASSES, *knob, *((90,) if knob else ()))
    close(ours, theirs)
    assert (ours >= 0).all()
    close(*(torch.autograd.grad(x.sum(), z)[0] for x in (ours, theirs)))
    close(loss(z, CLASSES, *knob), theirs.mean())
    close(loss(z, CLASSES, *knob, reduction="sum"), theirs.sum())


@pytest.mark.parametrize("name", ["entmax", "sparsemax", "normmax", "budget"])
def test_gradients_twice(name: str) -> None:
    z = rows(4, 6).requires_grad_()
    if name == "budget":
        target = torch.zeros(4, 6, dtype=torch.float64)
        target[:, 1:3] = 1
        loss = lambda z: budget_loss(z, target, 2.0, reduction="none")  # noqa: E731
    else:
        function = {"entmax": entmax_loss, "sparsemax": sparsemax_loss, "normmax": normmax_loss}[name]
        loss = lambda z: function(z, CLASSES[:4] % 6, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


def test_alpha_one_is_cross_entropy() -> None:
    z, soft = rows(20, 9), rows(20, 9, seed=2).softmax(-1)
    close(entmax_loss(z, CLASSES, 1), torch.nn.functional.cross_entropy(z, CLASSES))
    divergence = torch.nn.functional.kl_div(z.log_softmax(-1), soft, reduction="batchmean")
    close(entmax_loss(z, soft, 1), divergence)
    assert (entmax_loss(z, soft, 1 + 1e-7) - divergence).abs() < 1e-6


@pytest.mark.parametrize("loss", [entmax_loss, normmax_loss])
def test_distributions_as_targets(loss) -> None:
    z = rows(5, 4).requires_grad_()
    soft = rows(5, 4, seed=2).softmax(-1).requires_grad_()
    assert (loss(z, soft, 1.5, reduction="none") > 0).all()
    assert torch.autograd.gradcheck(lambda z, y: loss(z, y, 1.5, reduction="none"), (z, soft))
    hard = torch.nn.functional.one_hot(CLASSES[:5] % 4, 4).double()
    close(loss(z, hard, 1.5), loss(z, CLASSES[:5] % 4, 1.5))


def test_budget_is_0_at_its_own_prediction() -> None:
    z = rows(6, 8)
    p = budget_sparsemax(z, 3.0)
    assert budget_loss(z, p, 3.0, reduction="none").abs().max() < 1e-12
    close(budget_loss(z, CLASSES[:6] % 8, 1.0), sparsemax_loss(z, CLASSES[:6] % 8))


def test_is_zero_beyond_a_margin() -> None:
    z = torch.tensor([[3.0, 0.5, -1.0]], dtype=torch.float64)
    right = torch.tensor([0])
    assert torch.nn.functional.cross_entropy(z, right) > 0
    assert all(FenchelYoungLoss(kind=kind, alpha=2.0)(z, right) == 0 for kind in ("entmax", "normmax", "budget"))
    assert FenchelYoungLoss(alpha=2.0)(z / 3, right) > 0


def test_what_is_ignored_counts_for_nothing() -> None:
    z, target = rows(3, 5, 7), torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(3))
    target[0, 2] = target[2, 4] = -100
    counted = target != -100
    close(entmax_loss(z, target), entmax_loss(z[counted], target[counted]))
    assert entmax_loss(z, target, reduction="none")[0, 2] == 0
    moved = z.requires_grad_()
    FenchelYoungLoss(ignore_index=int(target[1, 1]))(moved, target.where(counted, 0)).backward()
    assert moved.grad is not None
    assert not moved.grad[1, 1].any()


def test_large_and_hidden_scores_lose_nothing() -> None:
    z, target = rows(4, 6), torch.tensor([0, 1, 2, 3])
    hidden = z.clone()
    hidden[:, 5] = -torch.inf
    close(entmax_loss(hidden, target), entmax_loss(z[:, :5], target))
    far = (z + 4096).float()
    assert (entmax_loss(far, target) - entmax_loss(far.double(), target)).abs() < 1e-5


def test_refusals() -> None:
    z = rows(2, 3)
    with pytest.raises(
        ValueError, match=r"entmax_loss: target is out of range \(got 3\); expected classes from 0 to 2"
    ):
        entmax_loss(z, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"entmax_loss: target has the wrong shape \(got \(3,\)\)"):
        entmax_loss(z, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"entmax_loss: alpha is out of range"):
        entmax_loss(z, torch.tensor([0, 1]), 0.5)
    with pytest.raises(ValueError, match=r"normmax_loss: alpha is out of range"):
        normmax_loss(z, torch.tensor([0, 1]), 1.0)
    with pytest.raises(ValueError, match=r"budget_loss: target holds one class a row"):
        budget_loss(z, torch.tensor([0, 1]), 2.0)
    with pytest.raises(ValueError, match=r"FenchelYoungLoss: kind is unknown|fenchel_young: kind is unknown"):
        FenchelYoungLoss(kind="other")  # type: ignore[arg-type]

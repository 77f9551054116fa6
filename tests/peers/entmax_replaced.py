"""A pytest plugin under which the entmax package's maps and losses are regard's; its modules call these by name.

`k` is how many of the largest scores theirs sorts first and `n_iter` how often it bisects: no result depends on them.
"""

from typing import Any

import entmax
import torch
from entmax import activations, losses, root_finding
from torch import Tensor

import regard.normalizers.budget
import regard.normalizers.entmax
import regard.normalizers.normmax
import regard.training.fenchel_young as fenchel_young
from peers.counting import counted


def _as(X: Tensor, knob: Any) -> Any:
    return knob.to(X.dtype) if isinstance(knob, torch.Tensor) else knob


@counted
def sparsemax(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    return regard.normalizers.entmax.sparsemax(X, dim)


@counted
def entmax15(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    return regard.normalizers.entmax.entmax15(X, dim)


@counted
def sparsemax_bisect(X: Tensor, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    return regard.normalizers.entmax.sparsemax(X, dim)


@counted
def entmax_bisect(X: Tensor, alpha: Any = 1.5, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    return regard.normalizers.entmax.entmax(X, _as(X, alpha), dim)


@counted
def normmax_bisect(X: Tensor, alpha: Any = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    return regard.normalizers.normmax.normmax(X, _as(X, alpha), dim)


@counted
def budget_bisect(X: Tensor, budget: Any = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    return regard.normalizers.budget.budget_sparsemax(X, _as(X, budget), dim)


@counted
def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    return fenchel_young.sparsemax_loss(X, target, reduction="none")


@counted
def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    return fenchel_young.entmax_loss(X, target, 1.5, reduction="none")


@counted
def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int = 50) -> Tensor:
    return fenchel_young.sparsemax_loss(X, target, reduction="none")


@counted
def entmax_bisect_loss(X: Tensor, target: Tensor, alpha: float = 1.5, n_iter: int = 50) -> Tensor:
    return fenchel_young.entmax_loss(X, target, alpha, reduction="none")


@counted
def normmax_bisect_loss(X: Tensor, target: Tensor, alpha: float = 2, n_iter: int = 50) -> Tensor:
    return fenchel_young.normmax_loss(X, target, alpha, reduction="none")


REPLACED = (sparsemax, entmax15, sparsemax_bisect, entmax_bisect, normmax_bisect, budget_bisect)
LOSSES = (sparsemax_loss, entmax15_loss, sparsemax_bisect_loss, entmax_bisect_loss, normmax_bisect_loss)


def pytest_configure() -> None:
    for function in REPLACED + LOSSES:
        for module in (entmax, activations, losses, root_finding):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)

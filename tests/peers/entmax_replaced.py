"""A pytest plugin under which the entmax package's maps are regard's; its losses and modules call these by name."""

from typing import Any

import entmax
import torch
from entmax import activations, losses, root_finding
from torch import Tensor

from peers.counting import counted
from regard.normalizers.entmax import entmax as ours
from regard.normalizers.entmax import entmax15 as ours15
from regard.normalizers.entmax import sparsemax as ours2


@counted
def sparsemax(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    """k is how many of the largest scores theirs sorts first; the result does not depend on it."""
    return ours2(X, dim)


@counted
def entmax15(X: Tensor, dim: int = -1, k: int | None = None) -> Tensor:
    return ours15(X, dim)


@counted
def sparsemax_bisect(X: Tensor, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    return ours2(X, dim)


@counted
def entmax_bisect(X: Tensor, alpha: Any = 1.5, dim: int = -1, n_iter: int = 50, ensure_sum_one: bool = True) -> Tensor:
    return ours(X, alpha.to(X.dtype) if isinstance(alpha, torch.Tensor) else alpha, dim)


def pytest_configure() -> None:
    for function in (sparsemax, entmax15, sparsemax_bisect, entmax_bisect):
        for module in (entmax, activations, losses, root_finding):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)

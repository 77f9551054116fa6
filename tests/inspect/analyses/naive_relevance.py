"""Chefer et al.'s relevancy rules in plain loops, numbered as in the authors' code."""

import torch
from torch import Tensor


def naive_weighted(attention: Tensor, gradient: Tensor) -> Tensor:
    """(5), of one example: mean over heads of what is positive in gradient times attention."""
    H, T, S = attention.shape
    out = torch.zeros(T, S, dtype=torch.float64)
    for i in range(T):
        for j in range(S):
            for h in range(H):
                out[i, j] += max(float(gradient[h, i, j] * attention[h, i, j]), 0.0) / H
    return out


def naive_matmul(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            for k in range(a.shape[1]):
                out[i, j] += a[i, k] * b[k, j]
    return out


def naive_normalised(R: Tensor) -> Tensor:
    """(8, 9): without the identity, each row divided by its sum, and the identity back."""
    T = R.shape[0]
    out = torch.zeros(T, T, dtype=torch.float64)
    for i in range(T):
        total = sum(float(R[i, j]) - (i == j) for j in range(T))
        for j in range(T):
            rest = float(R[i, j]) - (i == j)
            out[i, j] = (rest / total if total else 0.0) + (i == j)
    return out


def naive_self(layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(6) layer by layer."""
    R = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
    for attention, gradient in layers:
        R = R + naive_matmul(naive_weighted(attention, gradient), R)
    return R


class NaiveStreams:
    """Two streams x and y of one example."""

    def __init__(self, T: int, S: int) -> None:
        self.xx, self.yy = torch.eye(T, dtype=torch.float64), torch.eye(S, dtype=torch.float64)
        self.xy, self.yx = torch.zeros(T, S, dtype=torch.float64), torch.zeros(S, T, dtype=torch.float64)

    def self_x(self, pair: tuple[Tensor, Tensor]) -> None:
        """(6, 7)"""
        a = naive_weighted(*pair)
        self.xx, self.xy = self.xx + naive_matmul(a, self.xx), self.xy + naive_matmul(a, self.xy)

    def self_y(self, pair: tuple[Tensor, Tensor]) -> None:
        a = naive_weighted(*pair)
        self.yy, self.yx = self.yy + naive_matmul(a, self.yy), self.yx + naive_matmul(a, self.yx)

    def from_y(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What (10, 11) add to xy and xx when x attends to y."""
        a = naive_weighted(*pair)
        left = naive_matmul(naive_normalised(self.xx).T, a)
        return naive_matmul(left, naive_normalised(self.yy)), naive_matmul(a, self.yx)

    def from_x(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a = naive_weighted(*pair)
        left = naive_matmul(naive_normalised(self.yy).T, a)
        return naive_matmul(left, naive_normalised(self.xx)), naive_matmul(a, self.xy)

    def cross_x(self, pair: tuple[Tensor, Tensor]) -> None:
        xy, xx = self.from_y(pair)
        self.xy, self.xx = self.xy + xy, self.xx + xx

    def co(self, x_to_y: tuple[Tensor, Tensor], y_to_x: tuple[Tensor, Tensor]) -> None:
        """Both directions, each from the old maps."""
        (xy, xx), (yx, yy) = self.from_y(x_to_y), self.from_x(y_to_x)
        self.xy, self.xx, self.yx, self.yy = self.xy + xy, self.xx + xx, self.yx + yx, self.yy + yy

"""Attention written out entry by entry, and small random problems for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import regard
from regard.stages import Position, Rows

CASES = range(20)


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    allowed: Tensor
    """(B, H, T, S), True = may attend."""

    def entries(self):
        """(b, h, t, i, j, key head) of every entry; i counts from the first key."""
        B, H, T, S = self.allowed.shape
        group = H // self.k.shape[1]
        for b in range(B):
            for h in range(H):
                for t in range(T):
                    for j in range(S):
                        yield b, h, t, t + S - T, j, h // group

    def dot(self, b: int, h: int, t: int, j: int) -> Tensor:
        g = h // (self.q.shape[1] // self.k.shape[1])
        return sum(self.q[b, h, t, d] * self.k[b, g, j, d] for d in range(self.q.shape[-1]))


def case(seed: int) -> Case:
    """Sizes, head sharing, causality and masks vary with the seed; some rows may see nothing."""
    gen = torch.Generator().manual_seed(seed)

    def pick(*options: int) -> int:
        return options[int(torch.randint(len(options), (), generator=gen))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    B, G, R, T, more, D, V = (
        pick(1, 2),
        pick(1, 2),
        pick(1, 2, 3),
        pick(1, 3, 4),
        pick(0, 0, 2),
        pick(2, 4, 6),
        pick(3, 5),
    )
    S = T + more
    allowed = torch.ones(B, G * R, T, S, dtype=torch.bool)
    if seed % 2:
        allowed = allowed.tril(S - T)
    if seed % 3 == 1:
        allowed = allowed & (torch.rand(B, 1, 1, S, generator=gen) > 0.3)
    if seed % 3 == 2:
        allowed = allowed & (torch.rand(B, G * R, T, S, generator=gen) > 0.3)
    return Case(normal(B, G * R, T, D), normal(B, G, S, D), normal(B, G, S, V), allowed)


def attention(
    c: Case,
    logit: Callable[[int, int, int, int, int], Tensor],
    value: Callable[[int, int, int], Tensor] = lambda h, i, j: 0,
) -> Tensor:
    """softmax over the allowed j of logit(b, h, t, i, j), times v_j + value(h, i, j); 0 for an empty row."""
    B, H, T, S = c.allowed.shape
    group = H // c.k.shape[1]
    out = torch.zeros(B, H, T, c.v.shape[-1], dtype=c.v.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                i, keys = t + S - T, [j for j in range(S) if c.allowed[b, h, t, j]]
                e = {j: math.exp(float(logit(b, h, t, i, j))) for j in keys}
                for j in keys:
                    out[b, h, t] += e[j] / sum(e.values()) * (c.v[b, h // group, j] + value(h, i, j))
    return out


def run(c: Case, position: Position, kernel: str = "auto") -> Tensor:
    return regard.attention(c.q, c.k, c.v, mask=c.allowed, position=position, kernel=kernel)


def check(c: Case, position: Position, wanted: Tensor) -> None:
    """Whichever kernel runs."""
    for kernel in ("auto", "eager"):
        close(run(c, position, kernel), wanted)


def rows(
    q: Tensor, k: Tensor, *, i: Tensor | None = None, j: Tensor | None = None, allowed: Tensor | None = None
) -> Rows:
    """What a kernel hands to a hook for the whole matrix, with as many key heads as query heads."""
    T, S = q.shape[2], k.shape[2]
    i = torch.arange(S - T, S) if i is None else i
    j = torch.arange(S) if j is None else j
    return Rows(q=q, k=k, scores=q @ k.mT / math.sqrt(q.shape[-1]), i=i, j=j, allowed=allowed)


def vectors(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "vectors" / f"{name}.npz") as data:
        return dict(data)


def close(got: Tensor, wanted: Tensor, *, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=got.dtype), rtol=0, atol=atol)

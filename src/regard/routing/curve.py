"""A generalised Hilbert curve through any box: tokens near one another along it are near in space and time.

The box is split into two, three or five boxes along its longer sides, each passed in turn, until lines are left. Sides
are halved so that parts are even where they can be: then every step goes to a face neighbour. Odd sides leave a few
diagonal steps. The recursion is that of abetusk's `gilbert`, as the code of Jenga has it.
"""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import whole


class _Side(NamedTuple):
    """A side of a box, from its corner on."""

    step: int
    """How far apart neighbours along it stand in row-major order."""
    n: int
    """Places; below 0 where it leads back."""

    @property
    def size(self) -> int:
        return abs(self.n)

    @property
    def sign(self) -> int:
        return 1 if self.n > 0 else -1

    @property
    def end(self) -> int:
        """From the corner to just behind the side."""
        return self.step * self.n

    @property
    def last(self) -> int:
        """From the corner to the side's last place."""
        return self.step * (self.n - self.sign)

    def back(self) -> "_Side":
        return _Side(self.step, -self.n)

    def halves(self) -> "tuple[_Side, _Side]":
        cut = self.n // 2  # rounded down also where it leads back
        if cut % 2 and self.size > 2:
            cut += self.sign
        return _Side(self.step, cut), _Side(self.step, self.n - cut)


def _walk(at: int, a: _Side, b: _Side, c: _Side, out: list[int]) -> None:
    """Through the box with its corner at `at`, which leaves it at the far end of `a`."""
    w, h, d = a.size, b.size, c.size
    for side, others in ((a, h * d), (b, w * d), (c, w * h)):
        if others == 1:
            out.extend(range(at, at + side.end, side.step * side.sign))
            return
    (a1, a2), (b1, b2), (c1, c2) = a.halves(), b.halves(), c.halves()
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes
        _walk(at, a1, b, c, out)
        _walk(at + a1.end, a2, b, c, out)
    elif 3 * h > 4 * d:  # high, or wide: out, along, and back
        _walk(at, b1, c, a1, out)
        _walk(at + b1.end, a, b2, c, out)
        _walk(at + a.last + b1.last, b1.back(), c, a2.back(), out)
    elif 3 * d > 4 * h:
        _walk(at, c1, a1, b, out)
        _walk(at + c1.end, a, b, c2, out)
        _walk(at + a.last + c1.last, c1.back(), a2.back(), b, out)
    else:
        _walk(at, b1, c1, a1, out)
        _walk(at + b1.end, c, a1, b2, out)
        _walk(at + b1.last + c.last, a, b1.back(), c2.back(), out)
        _walk(at + a.last + b1.end + c.last, c.back(), a2.back(), b2, out)
        _walk(at + a.last + b1.last, b1.back(), c1, a2.back(), out)


@functools.lru_cache(16)
def _order(T: int, Y: int, X: int) -> tuple[int, ...]:
    sides = [_Side(1, X), _Side(X, Y), _Side(Y * X, T)]
    longest = max(sides, key=lambda side: side.n)  # the first among equals
    out: list[int] = []
    second, third = (side for side in sides if side is not longest)
    _walk(0, longest, second, third, out)
    return tuple(out)


def gilbert_order(T: int, Y: int, X: int) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """The curve through T frames of Y rows and X columns, of which token n = (t Y + y) X + x.

    Returns:
        place, order: place[n] is where token n stands along the curve, order[p] the token at place p; so x[order] are
        tokens along the curve, and x[order][place] is x.

    Raises:
        ValueError: if a size is below 1.
    """
    whole("gilbert_order", T=T, Y=Y, X=X)
    order = torch.tensor(_order(T, Y, X), device="cpu")
    return order.argsort(), order


def curve_neighbours(T: int, Y: int, X: int, block: int) -> Bool[Tensor, "n n"]:
    """Whether two blocks of `block` places along the curve touch: by a face, an edge or a corner of tokens of theirs.

    Raises:
        ValueError: if a size or the block is below 1.
    """
    whole("curve_neighbours", block=block)
    at = gilbert_order(T, Y, X)[0].div(block, rounding_mode="floor").view(T, Y, X)
    near = torch.eye(-(-T * Y * X // block), dtype=torch.bool, device="cpu")

    def pair(size: int, step: int) -> tuple[slice, slice]:
        """Places along an axis, and those `step` behind them."""
        return slice(max(0, -step), size - max(0, step)), slice(max(0, step), size - max(0, -step))

    for t, y, x in [(0, 0, 1)] + [(0, 1, x) for x in (-1, 0, 1)] + [(1, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
        one, other = zip(pair(T, t), pair(Y, y), pair(X, x), strict=True)
        near[at[one].flatten(), at[other].flatten()] = True
    return near | near.T

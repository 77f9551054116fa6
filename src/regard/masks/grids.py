"""Neighborhoods: each token of a sequence, image or volume sees a window around it, shifted inward at the borders.

On an axis of length L with window k, dilation d and stride s, tokens i with the same g = i mod d form a group of n
tokens, counted by p = i // d. A query takes the window of its leader t, every s-th of the group:

    bidirectional:  t = min(p // s s + s // 2, n - 1);  it sees u in [c, c + k),  c = clamp(t - k // 2, 0, n - k)
    causal:         t = min(p // s s + s - 1, n - 1);   it sees u in [max(t - k + 1, 0), p]

and of several axes the product. s = 1 slides, s = k cuts into blocks; every bidirectional query sees exactly k keys.

Hassani et al. 2023, https://arxiv.org/abs/2204.07143 (windows); Hassani, Shi 2022, https://arxiv.org/abs/2209.15001
(dilation); Hassani et al. 2025, https://arxiv.org/abs/2504.16922 (stride): abstracts read, the authors' code followed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.masks.algebra import Index, Mask
from regard.masks.checks import integer
from regard.masks.verdict import Tiles, Verdict


@dataclass(frozen=True)
class Axis:
    """One axis of a neighborhood, and the rule along it."""

    size: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def bounds(self, i: Int[Tensor, "..."]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
        """The first and the last place that query i sees; those between are `dilation` apart."""
        k, d, s = self.window, self.dilation, self.stride
        g, p = i % d, i // d
        n = (self.size - g + d - 1) // d
        if self.causal:
            leader = (p // s * s + s - 1).minimum(n - 1)
            first, last = (leader - k + 1).clamp(min=0), p
        else:
            leader = (p // s * s + s // 2).minimum(n - 1)
            first = (leader - k // 2).clamp(min=0).minimum(n - k)
            last = first + k - 1
        return first * d + g, last * d + g

    def sees(self, i: Int[Tensor, "..."], j: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether query place i sees key place j."""
        first, last = self.bounds(i)
        inside = (j >= first) & (j <= last)
        return inside if self.dilation == 1 else inside & ((j - first) % self.dilation == 0)

    @property
    def reach(self) -> int:
        """No key is farther away than this."""
        return (self.window - 1) * self.dilation


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """The product of its axes, over tokens in row-major order."""

    axes: tuple[Axis, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many places each axis has."""
        return tuple(axis.size for axis in self.axes)

    @property
    def steps(self) -> tuple[int, ...]:
        """How far apart in the sequence neighbours along each axis stand."""
        return tuple(math.prod(self.sizes[n + 1 :]) for n in range(len(self.axes)))

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        N = math.prod(self.sizes)
        allowed = (i >= 0) & (i < N) & (j >= 0) & (j < N)
        for axis, step in zip(self.axes, self.steps, strict=True):
            allowed = allowed & axis.sees(i // step % axis.size, j // step % axis.size)
        return allowed

    def judge(self, tiles: Tiles) -> Verdict:
        # Whole rows (planes) of the first axis are ruled out; what is left is looked into.
        axis, step = self.axes[0], self.steps[0]
        top, bottom = (edge // step for edge in (tiles.i_lo, tiles.i_hi))
        if axis.dilation == 1:
            first, last = axis.bounds(top.clamp(0, axis.size - 1))[0], axis.bounds(bottom.clamp(0, axis.size - 1))[1]
        else:
            first, last = top - axis.reach, bottom if axis.causal else bottom + axis.reach
        may = (tiles.j_hi // step >= first) & (tiles.j_lo // step <= last)
        no = torch.zeros_like(may)
        return Verdict(no, may, no, may)

    @property
    def span(self) -> tuple[int | float, int | float]:
        pairs = list(zip(self.axes, self.steps, strict=True))
        return sum(a.reach * step for a, step in pairs), sum(a.reach * step for a, step in pairs if not a.causal)

    def __repr__(self) -> str:
        columns = [[getattr(a, name) for a in self.axes] for name in ("size", "window", "dilation", "stride", "causal")]
        texts = [str(tuple(c)) if name == 0 or len(set(c)) > 1 else str(c[0]) for name, c in enumerate(columns)]
        names, defaults = ("", "", "dilation=", "stride=", "causal="), (None, None, 1, 1, False)
        shown = [n + t for n, t, c, default in zip(names, texts, columns, defaults, strict=True) if set(c) != {default}]
        return f"neighborhood({', '.join(shown)})"


def neighborhood(
    sizes: Sequence[int],
    window: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """Windows around each token of a map of 1 to 3 axes, flattened row by row; one value for all axes, or one for each.

    Args:
        sizes: of the axes, outermost first; T = S = their product.
        window: keys a query sees along an axis, its own included.
        dilation: distance between them.
        stride: that many neighbouring queries share a window; at most `window`.
        causal: no query sees a later place of that axis.
    """
    return Neighborhood(axes_of("neighborhood", sizes, window, dilation, stride, causal))


def axes_of(
    who: str,
    sizes: Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    causal: bool | Sequence[bool],
) -> tuple[Axis, ...]:
    """One Axis for each size; raises where a window does not fit."""
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{who}: 1 to 3 axes (got sizes {tuple(sizes)})")
    count = len(sizes)
    rows = zip(
        (integer(f"{who}: sizes", n) for n in sizes),
        _each(who, "window", window, count),
        _each(who, "dilation", dilation, count),
        _each(who, "stride", stride, count),
        _flags(who, causal, count),
        strict=True,
    )
    axes = tuple(Axis(*row) for row in rows)
    for axis in axes:
        if axis.stride > axis.window:
            raise ValueError(f"{who}: stride {axis.stride} exceeds window {axis.window}; expected stride <= window")
        if axis.window * axis.dilation > axis.size:
            raise ValueError(
                f"{who}: window {axis.window} with dilation {axis.dilation} does not fit an axis of {axis.size}; "
                f"expected window * dilation <= size"
            )
    return axes


def _each(who: str, name: str, value: int | Sequence[int], count: int) -> list[int]:
    """The value of each axis."""
    values = list(value) if isinstance(value, tuple | list) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"{who}: {name} has {len(values)} values for {count} axes (got {value}); expected 1 or {count}"
        )
    return [integer(f"{who}: {name}", v) for v in values]


def _flags(who: str, value: bool | Sequence[bool], count: int) -> list[bool]:
    flags = list(value) if isinstance(value, tuple | list) else [bool(value)] * count
    if len(flags) != count or not all(isinstance(f, bool) for f in flags) or not isinstance(value, bool | tuple | list):
        raise ValueError(f"{who}: causal must be a bool or {count} of them (got {value!r})")
    return flags

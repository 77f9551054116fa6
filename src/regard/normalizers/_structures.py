"""Which edges a query may have at once: distributions over sets of edges, with exact marginals.

Scores theta are log potentials of edges; an edge that is hidden is in no set. All is computed in log space, along rows
in a tree of pairs: as many steps as S has digits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import refuse, whole
from regard.normalizers.softmax import softmax


def low(z: Tensor) -> float:
    """In place of -inf: nothing is added to it often enough to matter, and its gradients are 0, not NaN."""
    return max(-1e30, torch.finfo(z.dtype).min / 64)


Join = Callable[[Tensor, Tensor], Tensor]


class Structure:
    """What is known of a query's edges beforehand."""

    def marginals(self, theta: Float[Tensor, "*b S"], keep: Bool[Tensor, "*b S"]) -> Float[Tensor, "*b S"]:
        """Of each edge, the probability that it is there: d log_partition / d theta. 0 where there is no set at all."""
        raise NotImplementedError

    def log_partition(self, theta: Float[Tensor, "*b S"], keep: Bool[Tensor, "*b S"]) -> Float[Tensor, "*b"]:
        """log of the sum over all sets of exp of what their edges sum to. -inf where there is no set at all."""
        raise NotImplementedError

    def weigh(self, sets: Int[Tensor, "N S"]) -> Float[Tensor, " N"]:
        """The log weight of each set before any score, -inf if there is no such set."""
        raise NotImplementedError


def _only(good: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    return torch.zeros(good.shape, dtype=torch.float64).masked_fill(~good, -math.inf)


def _log_sum(z: Float[Tensor, "*b S"]) -> Float[Tensor, "*b"]:
    empty = (z.detach() == -math.inf).all(-1)
    return z.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, -math.inf)


def _hidden(theta: Tensor, keep: Tensor, fill: float = -math.inf) -> Tensor:
    return theta.masked_fill(~keep, fill)


@dataclass(frozen=True)
class OneEdge(Structure):
    """Exactly one: softmax."""

    def marginals(self, theta: Tensor, keep: Tensor) -> Tensor:
        return softmax(theta, keep)

    def log_partition(self, theta: Tensor, keep: Tensor) -> Tensor:
        return _log_sum(_hidden(theta, keep))

    def weigh(self, sets: Tensor) -> Tensor:
        return _only(sets.sum(-1) == 1)


@dataclass(frozen=True)
class AtMostOne(Structure):
    """One or none: softmax with one more score, 0, that stands for none."""

    def marginals(self, theta: Tensor, keep: Tensor) -> Tensor:
        return softmax(torch.cat([theta, torch.zeros_like(theta[..., :1])], -1), self._more(keep))[..., :-1]

    def log_partition(self, theta: Tensor, keep: Tensor) -> Tensor:
        return _log_sum(torch.cat([_hidden(theta, keep), torch.zeros_like(theta[..., :1])], -1))

    def _more(self, keep: Tensor) -> Tensor:
        return torch.cat([keep, torch.ones_like(keep[..., :1])], -1)

    def weigh(self, sets: Tensor) -> Tensor:
        return _only(sets.sum(-1) <= 1)


@dataclass(frozen=True)
class Independent(Structure):
    """Any, each by itself: sigmoid."""

    def marginals(self, theta: Tensor, keep: Tensor) -> Tensor:
        return theta.sigmoid().masked_fill(~keep, 0.0)

    def log_partition(self, theta: Tensor, keep: Tensor) -> Tensor:
        return -torch.nn.functional.logsigmoid(-theta).masked_fill(~keep, 0.0).sum(-1)  # softplus, for any score

    def weigh(self, sets: Tensor) -> Tensor:
        return _only(sets.sum(-1) >= 0)


def around(leaves: Tensor, join: Join, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What stands before each along the first axis, what behind it, and all of them, joined in order."""
    n = leaves.shape[0]
    if n == 1:
        return unit.expand_as(leaves), unit.expand_as(leaves), leaves[0]
    if n % 2:
        leaves = torch.cat([leaves, unit.expand_as(leaves[:1])])
    left, right = leaves[0::2], leaves[1::2]
    before, behind, whole_ = around(join(left, right), join, unit)
    first = torch.stack([before, join(before, left)], 1).flatten(0, 1)[:n]
    second = torch.stack([join(right, behind), behind], 1).flatten(0, 1)[:n]
    return first, second, whole_


def _convolved(a: Float[Tensor, "*b n"], b: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """log of the product of two polynomials, without the powers that they have no place for."""
    n = a.shape[-1]
    power = torch.arange(n, device=a.device)
    rest = power - power[:, None]
    shifted = b[..., rest.clamp(min=0)].masked_fill(rest < 0, low(b))
    return (a[..., :, None] + shifted).logsumexp(-2)


def _multiplied(a: Float[Tensor, "*b n n"], b: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """log of the product of two matrices."""
    return (a[..., :, :, None] + b[..., None, :, :]).logsumexp(-2)


@dataclass(frozen=True)
class ExactlyK(Structure):
    """k of them: elementary symmetric polynomials. None where fewer than k may be seen."""

    k: int

    def __post_init__(self) -> None:
        whole("ExactlyK", k=self.k)

    def _around(self, theta: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = torch.stack([torch.zeros_like(theta), _hidden(theta, keep, low(theta))], -1)
        leaf = torch.nn.functional.pad(leaf, (0, self.k - 1), value=low(leaf))
        unit = torch.full_like(leaf[..., :1, :], low(leaf))
        unit[..., 0] = 0.0
        return around(leaf.movedim(-2, 0), _convolved, unit[..., 0, :])

    def marginals(self, theta: Tensor, keep: Tensor) -> Tensor:
        before, behind, every = self._around(theta, keep)
        others = (before[..., : self.k] + behind[..., : self.k].flip(-1)).logsumexp(-1).movedim(0, -1)
        shown = keep & (keep.sum(-1, keepdim=True) >= self.k)
        odds = (theta + others - every[..., self.k, None]).masked_fill(~shown, low(theta))
        return odds.exp()

    def log_partition(self, theta: Tensor, keep: Tensor) -> Tensor:
        return self._around(theta, keep)[2][..., self.k].masked_fill(keep.sum(-1) < self.k, -math.inf)

    def weigh(self, sets: Tensor) -> Tensor:
        return _only(sets.sum(-1) == self.k)


def _level(a: Float[Tensor, "*b n n"], b: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n n"]:
    """The same, less its greatest: of long chains float32 would lose the differences."""
    z = _multiplied(a, b)
    return z - z.detach().amax((-2, -1), keepdim=True)


def _links(theta: Tensor, transition: Tensor, initial: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """A matrix for each place, along the first axis, from the state before it to its own, and the one of no place. One
    more state, the last, is that before the first place."""
    step = torch.nn.functional.pad(transition, (0, 1, 0, 1), value=low(theta))
    start = theta.new_zeros(theta.shape[-1]) if initial is None else initial
    step = torch.cat([step[:-1], torch.nn.functional.pad(start, (0, 1), value=low(theta))[None]])
    links = step + torch.nn.functional.pad(theta, (0, 1))[..., None, :]
    unit = torch.full_like(step, low(theta))
    unit.diagonal().zero_()
    return (links if keep is None else torch.where(keep[..., None, None], links, unit)).movedim(-3, 0), unit


def chain_marginals(
    theta: Float[Tensor, "*b S C"],
    transition: Float[Tensor, "C C"],
    initial: Float[Tensor, " C"] | None = None,
    keep: Bool[Tensor, "*b S"] | None = None,
) -> Float[Tensor, "*b S C"]:
    """Of a state at each place: the marginals, by which those of a place sum to 1.

    Args:
        theta, transition, initial: log potentials; `transition` of a row's state and then a column's.
        keep: places that are not kept are not in the chain: their neighbours meet.
    """
    links, unit = _links(theta, transition, initial, keep)
    before, behind, _ = around(links, _level, unit)
    C = theta.shape[-1]
    m = (_level(before, links)[..., C, :C] + behind[..., :C, :].logsumexp(-1)).softmax(-1).movedim(0, -2)
    return m if keep is None else m.masked_fill(~keep[..., None], 0.0)


def chain_log_partition(
    theta: Float[Tensor, "*b S C"],
    transition: Float[Tensor, "C C"],
    initial: Float[Tensor, " C"] | None = None,
    keep: Bool[Tensor, "*b S"] | None = None,
) -> Float[Tensor, "*b"]:
    """log of the sum over all sequences of states; arguments as of `chain_marginals`."""
    links, unit = _links(theta, transition, initial, keep)
    return around(links, _multiplied, unit)[2][..., theta.shape[-1], :].logsumexp(-1)


@dataclass(frozen=True)
class Chain(Structure):
    """Any, where a key counts more or less if the one before it does: log potentials transition[before, here]."""

    transition: Float[Tensor, "2 2"]
    initial: Float[Tensor, " 2"] | None = None

    def __post_init__(self) -> None:
        for name, shape in (("transition", (2, 2)), ("initial", (2,))):
            z = getattr(self, name)
            if z is not None and tuple(z.shape) != shape:
                refuse("Chain", name, "has the wrong shape", tuple(z.shape), str(shape))

    def _given(self, theta: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        initial = None if self.initial is None else self.initial.to(theta)
        return torch.stack([torch.zeros_like(theta), theta], -1), self.transition.to(theta), initial, keep

    def marginals(self, theta: Tensor, keep: Tensor) -> Tensor:
        return chain_marginals(*self._given(theta, keep))[..., 1]

    def log_partition(self, theta: Tensor, keep: Tensor) -> Tensor:
        return chain_log_partition(*self._given(theta, keep))

    def weigh(self, sets: Tensor) -> Tensor:
        t = self.transition.to(torch.float64)
        first = 0.0 if self.initial is None else self.initial.to(torch.float64)[sets[:, 0]]
        return first + t[sets[:, :-1], sets[:, 1:]].sum(-1)

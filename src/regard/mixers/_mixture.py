"""A mixture of Gaussians over queries and values, and its steps of EM, a few queries at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.checks import fits, number, refuse
from regard.kernels.problem import combine, dots
from regard.kernels.sums import over_keys
from regard.masks import Mask
from regard.normalizers.softmax import softmax
from regard.tracing import active, exporting

TILE_BYTES = 16 * 2**20
"""Weights formed at once."""
MOST = 100
"""Steps. Each is as dear as attention itself."""

Magnitude = Literal["magnitude"]
Positions = tuple[Tensor | None, Tensor | None, Tensor | None]


def lengths(z: Tensor) -> Tensor:
    """|z|^2 of each vector."""
    return z.square().sum(-1)


def log_weights(
    q: Float[Tensor, "B H t D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    a: float | Tensor,
    b: float | Tensor,
    log_prior: Magnitude | Tensor | None,
    initial: Float[Tensor, "B H t V"] | None = None,
    positions: Positions = (None, None, None),
) -> Float[Tensor, "B H t S"]:
    """log w_ij up to a constant of each query; precisions are numbers, or (B, H, 1, S).

    What the prior takes away from a distance is never added to it, and with one precision for all keys neither is what
    is the same for all of them.
    """
    (rq, rk, rv), magnitude = positions, isinstance(log_prior, str)
    own, theirs = lengths(q)[..., None] if many(a) else 0, 0 if magnitude else lengths(k)[..., None, :]
    z = dots(q, k) - (own + theirs) / 2
    if rq is not None:
        z = z + torch.einsum("bhtd,tsd->bhts", q, rq) - (own + (0 if magnitude else lengths(rq))) / 2
    if rk is not None:  # the key first
        z = z + torch.einsum("bhsd,std->bhts", k, rk) - (theirs + (0 if magnitude else lengths(rk).mT)) / 2
    z = a * z
    if initial is not None:
        z = z + b * (
            dots(initial, v) - ((lengths(initial)[..., None] if many(b) else 0) + lengths(v)[..., None, :]) / 2
        )
    if magnitude:
        return z + b / 2 * (lengths(v)[..., None, :] + (0 if rv is None else 2 * _along(v, rv) + lengths(rv)))
    return z + log_prior if isinstance(log_prior, Tensor) else z


def many(precision: float | Tensor | None) -> bool:
    """Whether each key has its own."""
    return isinstance(precision, Tensor) and precision.dim() > 0


def _along(v: Float[Tensor, "B H S V"], rv: Float[Tensor, "t S V"]) -> Float[Tensor, "B H t S"]:
    return torch.einsum("bhsv,tsv->bhts", v, rv)


def moved(
    old: Float[Tensor, "B H S W"],
    pull: Float[Tensor, "B H S W1"],
    precision: float | Tensor,
    prior: float | Tensor | None,
) -> Float[Tensor, "B H S W"]:
    """Means after a step; the last column of `pull` is the weight of what they are drawn to. Without any they stay."""
    if prior is None:
        prior, precision = 0.0, 1.0
    elif many(precision):
        precision = precision.mT  # type: ignore[union-attr]
    total = prior + precision * pull[..., -1:]
    some = total > 0
    return torch.where(some, (prior * old + precision * pull[..., :-1]) / torch.where(some, total, 1.0), old)


@dataclass(frozen=True, eq=False)
class Mixture:
    """All that stays as it is while keys and values move."""

    q: Float[Tensor, "B H T D"]
    a: float | Tensor
    b: float | Tensor
    log_prior: Magnitude | Tensor | None
    initial: Float[Tensor, "B H T V"] | None
    positions: Positions
    mask: Mask | None
    rows: int

    def weights(self, k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S V"], at: slice) -> Float[Tensor, "B H t S"]:
        """Of these queries."""
        T, S, pi = self.q.shape[2], k.shape[2], self.log_prior
        (rq, rk, rv), j = self.positions, torch.arange(S, device=k.device)
        here = (rq if rq is None else rq[at], rk if rk is None else rk[:, at], rv if rv is None else rv[at])
        v0 = None if self.initial is None else self.initial[:, :, at]
        pi = pi[:, :, at] if isinstance(pi, Tensor) and pi.shape[2] > 1 else pi
        z = log_weights(self.q[:, :, at], k, v, self.a, self.b, pi, v0, here)
        return softmax(z, None if self.mask is None else self.mask.at(torch.arange(S - T, S, device=k.device)[at], j))

    def each(self, run: Callable[[slice], Tensor]) -> list[Tensor]:
        """`run` on some queries at a time, each chunk computed again in backward instead of kept."""
        T = self.q.shape[2]
        if exporting() or self.rows >= T:
            return [run(slice(0, T))]
        if torch.is_grad_enabled() and not active():  # torch.func knows no checkpoints
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        return [run(slice(start, min(start + self.rows, T))) for start in range(0, T, self.rows)]

    def read(self, k: Tensor, v: Tensor, z: Float[Tensor, "B H S W"]) -> Float[Tensor, "B H T W"]:
        """sum_j w_ij z_j."""
        return torch.cat(self.each(lambda at: combine(self.weights(k, v, at), z)), 2)

    def placed(self, k: Tensor, v: Tensor) -> Float[Tensor, "B H T V"]:
        """sum_j w_ij rv_ij."""
        rv: Any = self.positions[2]
        return torch.cat(self.each(lambda at: torch.einsum("bhts,tsv->bhtv", self.weights(k, v, at), rv[at])), 2)

    def told(
        self, k: Tensor, v: Tensor, z: Float[Tensor, "B H T W"], some: Bool[Tensor, "B _ T"] | None
    ) -> Float[Tensor, "B H S W1"]:
        """sum_i w_ij z_i over some queries, and sum_i w_ij in one more column."""
        z = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        z = z if some is None else z.masked_fill(~some[..., None], 0)
        parts = self.each(lambda at: over_keys(self.weights(k, v, at).mT, z[:, :, at]))
        return sum(parts[1:], parts[0])


def precisions(who: str, **given: float | Tensor | None) -> None:
    """Refuse numbers below 0."""
    number(who, least=0, **{name: z for name, z in given.items() if not (z is None or isinstance(z, Tensor))})


def fit(name: str, axes: tuple[str, ...], tensors: Any, sizes: dict[str, int]) -> None:
    """Refuse what is no tuple of tensors with these axes; positions may leave some out."""
    if tensors is None:
        return
    if not isinstance(tensors, tuple | list) or len(tensors) != len(axes):
        got = f"{len(tensors)}" if isinstance(tensors, tuple | list) else type(tensors).__name__
        refuse("probabilistic_attention", name, "is no tuple of the right length", got, f"{len(axes)} tensors")
    for n, (wanted, z) in enumerate(zip(axes, tensors, strict=True)):
        if z is not None or name == "known":
            fits("probabilistic_attention", wanted, sizes, **{f"{name}[{n}]": z})

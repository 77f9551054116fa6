"""Which point of a set is nearest to a query, or farthest: the target, the points, and attention that finds it.

On the unit sphere the nearest point is the one with the greatest inner product. One head of full rank whose queries and
keys are the points themselves tells it exactly, with hard attention or with great scores; heads of low rank can vote.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import checked, choice, fits, number, refuse, whole

Variant = Literal["uniform", "orthogonal", "doubled"]


class Maps(NamedTuple):
    """What `low_rank_attention` takes."""

    Q: Float[Tensor, "H r M"]
    K: Float[Tensor, "H r M"]
    VO: Float[Tensor, "H M M"]


def sphere(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Points uniform on the unit sphere; their features are the last axis."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def draw(
    batch: int, points: int, dim: int, *, variant: Variant = "uniform", generator: torch.Generator | None = None
) -> Float[Tensor, "B S M"]:
    """Sets of points on the unit sphere.

    Args:
        points: S.
        variant: "uniform"; "orthogonal" to each other, no more than dim; or "doubled", S uniform ones and then their
            negatives.
    """
    whole("draw", batch=batch, points=points, dim=dim)
    choice("draw", get_args(Variant), variant=variant)
    if variant == "orthogonal":
        if points > dim:
            refuse("draw", "points", "are too many to be orthogonal", points, f"at most dim = {dim}")
        return frames(batch, points, dim, generator=generator)
    x = sphere(batch, points, dim, generator=generator)
    return torch.cat([x, -x], 1) if variant == "doubled" else x


def frames(number: int, rank: int, dim: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "H r M"]:
    """Orthonormal rows, of every orientation alike."""
    made, triangle = torch.linalg.qr(torch.randn(number, dim, rank, generator=generator))
    return (made * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT  # else no first entry would be positive


def nearest(queries: Float[Tensor, "B T M"], keys: Float[Tensor, "B S M"]) -> Float[Tensor, "B T M"]:
    """The key with the greatest inner product; of equal ones the first."""
    return _picked(keys, (queries @ keys.mT).argmax(-1))


def farthest(queries: Float[Tensor, "B T M"], keys: Float[Tensor, "B S M"] | None = None) -> Float[Tensor, "B T M"]:
    """The key with the smallest inner product; default among the queries themselves."""
    keys = queries if keys is None else keys
    return _picked(keys, (queries @ keys.mT).argmin(-1))


def squared_error(answer: Float[Tensor, "B T M"], target: Float[Tensor, "B T M"]) -> Float[Tensor, ""]:
    """|answer - target|^2, the mean over queries: the answer 0 scores 1, in any dimension."""
    return (answer - target).square().sum(-1).mean()


def exact(dim: int, *, factor: float = 1.0, far: bool = False) -> Maps:
    """One head of full rank that finds the nearest point, or the farthest.

    Args:
        factor: of the scores; softmax needs it far above log(S) / (the gap between the best two scores).
    """
    whole("exact", dim=dim)
    number("exact", above=0, factor=factor)
    one = torch.eye(dim)[None]
    return Maps((-factor if far else factor) * one, one, one)


def majority(heads: int, rank: int, dim: int, *, generator: torch.Generator | None = None) -> Maps:
    """Heads that look at the points in random subspaces, each with the same say."""
    whole("majority", heads=heads, rank=rank)
    whole("majority", rank, dim=dim)
    rows = frames(heads, rank, dim, generator=generator)
    return Maps(rows, rows, torch.eye(dim).expand(heads, -1, -1) / heads)


def circle(heads: int) -> Maps:
    """Rank-one heads in the plane, at angles with equal distances, each with the same say."""
    whole("circle", heads=heads)
    angle = torch.arange(heads) * (math.pi / heads)
    rows = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    return Maps(rows, rows, torch.eye(2).expand(heads, -1, -1) / heads)


def weighted(q: Float[Tensor, "H r M"], k: Float[Tensor, "H r M"], say: Float[Tensor, " H"]) -> Maps:
    """Heads that hand on `say` times the point that each picks."""
    fits("weighted", "H r M", q=q, k=k)
    fits("weighted", "H", {"H": len(q)}, say=say)
    return Maps(q, k, say[:, None, None] * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device))


def agreement(q: Float[Tensor, "H M"], k: Float[Tensor, "H M"]) -> Float[Tensor, "H H"]:
    """E <picked by g, picked by h> for hard heads with unit q and k among two points: how they overlap."""
    return 0.5 + 2 / math.pi**2 * _asin(q @ q.mT) * _asin(k @ k.mT)


def plane_success(q: Float[Tensor, "H 2"], k: Float[Tensor, "H 2"]) -> Float[Tensor, " H"]:
    """E <picked by h, nearest> in the plane, of two points: how often a head is right."""
    angle = (q * k).sum(-1).clamp(-1, 1).acos()
    away = math.pi / 2 - (math.pi / 2 - angle).abs()
    return 0.5 + (math.pi / 2 - angle).sign() * (0.25 - (away / math.pi) ** 2)


class Say(NamedTuple):
    """How much each head should say, and what error that leaves."""

    say: Float[Tensor, " H"]
    error: Float[Tensor, ""]


@checked()
def best_say(success: Float[Tensor, " H"], overlap: Float[Tensor, "H H"]) -> Say:
    """Least squares from expectations: a = C^-1 b, whose error is 1 - 2 b a + a C a."""
    say = torch.linalg.solve(overlap, success)
    return Say(say, 1 - 2 * success @ say + say @ overlap @ say)


def _picked(keys: Float[Tensor, "B S M"], at: Tensor) -> Float[Tensor, "B T M"]:
    return keys.gather(1, at[..., None].expand(-1, -1, keys.shape[-1]))


def _asin(x: Tensor) -> Tensor:
    return x.clamp(-1, 1).asin()

"""The nearest point: of points on a sphere, tell each query's nearest, or each point's farthest.

    x_1 ... x_S, y_1 ... y_T on the unit sphere;   at y_i, say the x_j with the greatest <y_i, x_j>

Amsel, Yehudai, Bruna 2024, "On the Benefits of Rank in Attention Layers" (arXiv 2407.16153). One attention head of full
rank can do it for any number of points; heads of low rank can't, but for very many of them, or for more layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import choice, refuse, whole
from regard.cross.nearest import Variant, draw, farthest, nearest, sphere, squared_error
from regard.models.mixer import Mechanism, layers
from regard.models.tokens import TokenModel
from regard.tasks import HELDOUT_SEED, Batch, Defaults, Metric, Size, Task, counts


@dataclass(frozen=True)
class NearestPoint(Task):
    """Bidirectional mixers read the points, and behind them the queries, which are marked; no place matters."""

    name: ClassVar[str] = "nearest_point"
    gist: ClassVar[str] = "Tell each query's nearest, or each point's farthest, of points on a sphere."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {"TokenMixer": frozenset({"bidirectional"})}
    metric: ClassVar[Metric] = Metric(
        "mean squared distance", "error", better=-1, main="error", along="", loss="squared distance"
    )
    defaults: ClassVar[Defaults] = Defaults(steps=500, batch=64, dim=32, depth=1, heads=2, lr=3e-3)

    features: int = 8
    """The sphere's dimensions."""
    points: int = 16
    queries: int = 0
    """0: every point asks for its farthest."""
    variant: Variant = "uniform"
    """As in `regard.cross.nearest.draw`."""
    heldout: int = 512

    def __post_init__(self) -> None:
        counts(self, features=2, points=2, heldout=1)
        whole(self, 0, queries=self.queries)
        choice(self, get_args(Variant), variant=self.variant)
        if self.variant == "orthogonal" and self.points > self.features:
            most = f"at most features = {self.features}"
            refuse(self, "points", "are too many to be orthogonal", self.points, most)

    @property
    def tokens(self) -> int:
        return self.points * (2 if self.variant == "doubled" else 1) + self.queries

    def describe(self) -> str:
        asked = f"{self.queries} queries' nearest" if self.queries else "each one's farthest"
        return f"{self.points} {self.variant} points in {self.features} dimensions, {asked}, generated"

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        mixers = layers(mechanism, dim=size.dim, num_heads=size.heads, depth=size.depth)
        read = nn.Linear(self.features + bool(self.queries), size.dim)
        return TokenModel(read, mixers, nn.Linear(size.dim, self.features), dim=size.dim, mlp_dim=size.mlp_dim)

    def example(self) -> Batch:
        return (torch.zeros(1, self.tokens, self.features + bool(self.queries)),)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._sets(batch, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, target = batch
        return squared_error(model(x)[:, -target.shape[1] :].float(), target)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        x, target = self._sets(self.heldout, torch.Generator().manual_seed(HELDOUT_SEED))
        told = torch.cat([model(part.to(device)).cpu() for part in x.split(batch)])
        return {self.metric.main: squared_error(told[:, -target.shape[1] :].double(), target.double()).item()}, []

    def _sets(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "B tokens F"], Float[Tensor, "B T features"]]:
        keys = draw(count, self.points, self.features, variant=self.variant, generator=generator)
        if not self.queries:
            return keys, farthest(keys)
        queries = sphere(count, self.queries, self.features, generator=generator)
        marked = [nn.functional.pad(z, (0, 1), value=mark) for z, mark in ((keys, 0.0), (queries, 1.0))]
        return torch.cat(marked, 1), nearest(queries, keys)

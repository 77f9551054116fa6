"""Imputation: fill the gaps of several series at once, from what they and the others show before and after.

    X = A sin(2 pi (f t + p)) + noise        a few waves, mixed into all channels; a share of the entries is hidden

Training hides a share of each batch's own; the test hides given shares. The task is that of SAITS (Du, Côté, Liu 2023,
arXiv 2202.08516), whose data is not generated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard import checks
from regard.models.mixer import Mechanism, layers
from regard.models.tokens import TokenModel
from regard.tasks import HELDOUT_SEED, Batch, Defaults, Metric, Size, Task, counts


def waves(
    count: int, length: int, channels: int, number: int, noise: float, generator: torch.Generator
) -> Float[Tensor, "count length channels"]:
    """Each series mixes `number` waves of its own, of one to eight periods, into all its channels; variance about 1."""
    shape = (count, 1, number)
    periods = 1 + 7 * torch.rand(shape, generator=generator)
    start = torch.rand(shape, generator=generator)
    time = torch.linspace(0, 1, length)[:, None]
    mixing = torch.randn(count, number, channels, generator=generator) * (2 / number) ** 0.5
    series = torch.sin(2 * math.pi * (periods * time + start)) @ mixing
    return series + noise * torch.randn(series.shape, generator=generator)


@dataclass(frozen=True)
class Imputation(Task):
    """Bidirectional mixers read every step's values, 0 where hidden, and which of them are; they tell all values."""

    name: ClassVar[str] = "imputation"
    gist: ClassVar[str] = "Fill the gaps of several time series at once."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {"TokenMixer": frozenset({"bidirectional"})}
    metric: ClassVar[Metric] = Metric(
        "mean absolute error", "error", better=-1, main="mean", along="missing", loss="squared error"
    )
    defaults: ClassVar[Defaults] = Defaults(steps=400, batch=32, dim=48, depth=2, heads=4, lr=3e-3)

    length: int = 48
    channels: int = 4
    waves: int = 2
    noise: float = 0.1
    missing: tuple[int, ...] = (20, 50, 80)
    """Percentages that the test hides; training hides any from the least to the most of them."""
    heldout: int = 256

    def __post_init__(self) -> None:
        counts(self, length=2, channels=1, waves=1, missing=1, heldout=1)
        checks.whole(self, most=99, missing=max(self.missing))
        checks.number(self, least=0, noise=self.noise)

    @property
    def tokens(self) -> int:
        return self.length

    def describe(self) -> str:
        return f"{self.channels} series of {self.length} steps, {self.waves} waves, generated"

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        mixers = layers(mechanism, dim=size.dim, num_heads=size.heads, depth=size.depth)
        read, tell = nn.Linear(2 * self.channels, size.dim), nn.Linear(size.dim, self.channels)
        return TokenModel(read, mixers, tell, dim=size.dim, mlp_dim=size.mlp_dim, positions=self.length)

    def example(self) -> Batch:
        return (torch.zeros(1, self.length, 2 * self.channels),)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        least, most = min(self.missing) / 100, max(self.missing) / 100
        while True:
            share = least + (most - least) * torch.rand(batch, 1, 1, generator=generator)
            yield self._series(batch, share, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        series, hidden = batch
        return (model(self.visible(series, hidden)) - series)[hidden].square().mean()

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        found = {}
        generator = torch.Generator().manual_seed(HELDOUT_SEED)
        for percent in self.missing:
            series, hidden = self._series(self.heldout, torch.tensor(percent / 100), generator)
            pieces = self.visible(series, hidden).split(batch)
            told = torch.cat([model(piece.to(device)).cpu() for piece in pieces])
            found[f"{percent}%"] = (told - series)[hidden].double().abs().mean().item()
        return {self.metric.main: sum(found.values()) / len(found), **(found if len(found) > 1 else {})}, []

    @staticmethod
    def visible(series: Float[Tensor, "B T C"], hidden: Bool[Tensor, "B T C"]) -> Float[Tensor, "B T 2*C"]:
        """What the model reads: the values with 0 in place of hidden ones, and 1 where a value is there."""
        return torch.cat([series.masked_fill(hidden, 0.0), (~hidden).to(series.dtype)], -1)

    def _series(self, count: int, share: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        series = waves(count, self.length, self.channels, self.waves, self.noise, generator)
        return series, torch.rand(series.shape, generator=generator) < share

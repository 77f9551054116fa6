"""A small spiking network: convolutions whose inputs to the neurons are gated, then two layers of neurons.

The paper, and what was read of it, stand on the card of `regard.vision.spiking_spatial`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, refuse, whole
from regard.vision.spiking_spatial import AdvanceSpatialAttention, LeakyIntegrateFire


class Spiked(NamedTuple):
    """Shares of the steps in which each class fired, and the share of neurons a step that fired in each layer."""

    classes: Float[Tensor, "B classes"]
    rates: list[Float[Tensor, ""]]


class SpikingLayer(nn.Module):
    """Convolution, norm over batch and steps, pooling, the gate, neurons.

    Args:
        inputs, outputs: channels.
        steps: T.
        pool: sides of the cells whose means are taken.
        gated: False leaves the gate out.
    """

    def __init__(self, inputs: int, outputs: int, *, steps: int, pool: int = 1, gated: bool = True) -> None:
        super().__init__()
        self.pool = pool
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.gate = AdvanceSpatialAttention(steps=steps) if gated else nn.Identity()
        self.neurons = LeakyIntegrateFire()

    def forward(self, x: Float[Tensor, "B T I Y X"]) -> Float[Tensor, "B T O y x"]:
        z = F.avg_pool2d(self.norm(self.conv(x.flatten(0, 1))), self.pool)
        spikes: Tensor = self.neurons(self.gate(z.unflatten(0, x.shape[:2])))
        return spikes


class SpikingNet(nn.Module):
    """Events (B, T, C, Y, X) to classes: three layers of maps, two of neurons.

    Args:
        channels, classes: of the events and of the answer.
        size: sides of the maps.
        steps: T.
        widths: channels of the layers of maps.
        pools: and how they pool; the code's are 1, 2, 2.
        hidden: width of the first layer of neurons.
        gated: False leaves the gates out.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: int,
        steps: int = 60,
        widths: Sequence[int] = (64, 128, 128),
        pools: Sequence[int] = (1, 2, 2),
        hidden: int = 256,
        gated: bool = True,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, classes=classes, size=size, steps=steps, hidden=hidden)
        if len(widths) != len(pools):
            refuse(self, "pools", "has another number of layers", len(pools), f"{len(widths)}, as widths")
        self.steps, self.channels = steps, channels
        self.layers = nn.ModuleList(
            SpikingLayer(inputs, outputs, steps=steps, pool=pool, gated=gated)
            for (inputs, outputs), pool in zip(pairwise((channels, *widths)), pools, strict=True)
        )
        for pool in pools:
            size //= pool
        self.hidden, self.out = nn.Linear(size * size * widths[-1], hidden), nn.Linear(hidden, classes)
        self.neurons = LeakyIntegrateFire()

    @checked(T="steps", C="channels")
    def forward(self, x: Float[Tensor, "B T C Y X"]) -> Spiked:
        rates = []
        for layer in self.layers:
            x = layer(x)
            rates.append(x.mean())
        x = x.flatten(2)
        for linear in (self.hidden, self.out):
            x = self.neurons(linear(x))
            rates.append(x.mean())
        return Spiked(x.mean(1), rates)

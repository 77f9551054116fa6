"""Reconstructed: a gate of little latency for re-identification, for a block that could not be read.

What is that paper's is how a block is chosen: every placement after a backbone's stages is measured.
"""

import time
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import median
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, refuse, whole

CARD = Card(
    "light_gate",
    equation="""a = sigmoid(W2 ReLU(W1 mean of x + b1) + b2)     for each channel
m = sigmoid(w . x + b)                           for each place             y = a m x, both of the same x
a stand-in: the paper's own operator is unknown here""",
    papers=(
        Paper(
            "A Little Bit Attention Is All You Need for Person Re-Identification",
            "Eisenbach, Lübberstedt, Aganian, Gross",
            2023,
            "2302.14574",
            "abstract and the introduction's beginning; neither the block nor any code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*(2*M*(M//reduction) + Y*X*M)", ""),
    claim="Little latency: no pairs of places, so that work grows with places and a non-local block's with their "
    "square: tests/vision/test_light_gate.py::test_work_grows_with_places_not_with_their_pairs.",
    differs=(
        "The operator is not the paper's, which could not be read: it is the plainest gate of channels and places.",
        "Gates start near 1, by a last bias of 4, so that a trained backbone is hardly disturbed.",
    ),
    verified="reconstructed",
    example={"reduction": 4},
    defaults={"reduction": "ours, as squeeze and excitation", "over": "ours"},
)

Over = Literal["channel", "space", "both"]


@CARD.module
class LightGate(nn.Module):
    """The stand-in gate.

    Args:
        dim: C.
        reduction: the inner width is C // reduction, 1 at least.
        over: whether channels are gated, places, or both.
    """

    def __init__(self, dim: int, *, reduction: int = 16, over: Over = "both") -> None:
        super().__init__()
        whole(self, dim=dim, reduction=reduction)
        choice(self, ("channel", "space", "both"), over=over)
        self.dim, self.over = dim, over
        inner = max(1, dim // reduction)
        self.down = self.up = self.place = None
        if over != "space":
            self.down, self.up = nn.Linear(dim, inner), nn.Linear(inner, dim)
        if over != "channel":
            self.place = nn.Linear(dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.down, self.up, self.place):
            if part is not None:
                part.reset_parameters()
        for part in (self.up, self.place):
            if part is not None:
                nn.init.constant_(part.bias, 4.0)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        y = x
        if self.down is not None and self.up is not None:
            a = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
            y = y * a[:, :, None, None]
        if self.place is not None:
            y = y * self.place(x.movedim(1, -1)).sigmoid().movedim(-1, 1)
        return y

    def extra_repr(self) -> str:
        return f"{self.dim}, over={self.over!r}"


class Placement(NamedTuple):
    """What a backbone with gates after some of its stages is like."""

    places: tuple[int, ...]
    """After which stages, from 0."""
    parameters: int
    seconds: float
    """The median of repeated forward passes."""
    score: float
    """What the caller's measure gives."""


def placements(
    stages: Sequence[nn.Module],
    block: Callable[[int], nn.Module],
    x: Float[Tensor, "B C Y X"],
    score: Callable[[nn.Module], float],
    *,
    most: int = 2,
    repeats: int = 5,
) -> list[Placement]:
    """Try the block after every subset of up to `most` stages, none first.

    Args:
        stages: of a backbone, from maps to maps, that are used as they are, one after the other.
        block: a new block for maps behind the stage of that number.
        x: what latency is measured with; batch 1, on the device where the model is to run, is what counts.
        score: trains and measures, or just measures, a network; higher is better. Latency is measured after it.
    """
    whole("placements", 0, most=most)
    whole("placements", repeats=repeats)
    if not stages:
        refuse("placements", "stages", "are none", stages, "one at least")
    found = []
    for number in range(min(most, len(stages)) + 1):
        for places in combinations(range(len(stages)), number):
            parts: list[nn.Module] = []
            for n, stage in enumerate(stages):
                parts += [stage, block(n)] if n in places else [stage]
            network = nn.Sequential(*parts)
            size = sum(p.numel() for p in network.parameters())
            result = float(score(network))
            found.append(Placement(places, size, _latency(network, x, repeats), result))
    return found


@torch.no_grad()
def _latency(network: nn.Module, x: Tensor, repeats: int) -> float:
    """After one pass that doesn't count: whatever is set up once is set up there."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        network(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])

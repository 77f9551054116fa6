"""Nodes of a graph: tell a node's class from features too noisy to tell it alone, with the help of its neighbours.

Every graph is drawn from a stochastic block model: nodes of one class are joined more often than others. Training sees
new graphs all the time, and so does the test.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import number
from regard.models.mixer import Mechanism, layers
from regard.models.tokens import TokenModel
from regard.tasks import ACCURACY, HELDOUT_SEED, Batch, Defaults, Metric, Size, Task, counts


def block_model(
    graphs: int, nodes: int, classes: int, near: float, far: float, noise: float, generator: torch.Generator
) -> tuple[Float[Tensor, "N classes"], Int[Tensor, "2 E"], Int[Tensor, " N"]]:
    """Features, edges and classes of several graphs side by side, N = graphs * nodes; every edge stands both ways.

    Nodes of one class are joined with probability `near`, others with `far`. A node's features are its class, one-hot,
    plus `noise` times a normal draw.
    """
    label = torch.randint(classes, (graphs, nodes), generator=generator)
    chance = torch.where(label[:, :, None] == label[:, None], near, far)
    joined = (torch.rand(graphs, nodes, nodes, generator=generator) < chance).triu(1)
    graph, one, other = (joined | joined.mT).nonzero().T
    features = F.one_hot(label.flatten(), classes).float()
    features = features + noise * torch.randn(features.shape, generator=generator)
    return features, torch.stack([one, other]) + graph * nodes, label.flatten()


@dataclass(frozen=True)
class Nodes(Task):
    """GraphMixers in the layers; every node is told apart."""

    name: ClassVar[str] = "nodes"
    gist: ClassVar[str] = "Tell the classes of a graph's nodes from noisy features and their neighbours."
    takes: ClassVar[Mapping[str, frozenset[str]]] = {"GraphMixer": frozenset()}
    metric: ClassVar[Metric] = ACCURACY
    loss_scale: ClassVar[float] = 1 / math.log(2)
    baseline: ClassVar[str] = "gatv2"
    defaults: ClassVar[Defaults] = Defaults(steps=200, batch=8, dim=48, depth=2, heads=4, lr=3e-3)

    nodes: int = 96
    classes: int = 4
    near: float = 0.16
    far: float = 0.03
    noise: float = 1.0
    heldout: int = 64
    """Held-out graphs."""

    def __post_init__(self) -> None:
        counts(self, nodes=2, classes=2, heldout=1)
        number(self, least=0, most=1, near=self.near, far=self.far)
        number(self, least=0, noise=self.noise)

    @property
    def tokens(self) -> int:
        return self.nodes

    def describe(self) -> str:
        return f"graphs of {self.nodes} nodes in {self.classes} classes, generated"

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        mixers = layers(mechanism, dim=size.dim, num_heads=size.heads, depth=size.depth)
        read, tell = nn.Linear(self.classes, size.dim), nn.Linear(size.dim, self.classes)
        return TokenModel(read, mixers, tell, dim=size.dim, mlp_dim=size.mlp_dim)

    def example(self) -> Batch:
        return self._graphs(1, torch.Generator().manual_seed(0))[:2]

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._graphs(batch, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        features, edges, label = batch
        return F.cross_entropy(model(features, edges).float(), label)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        generator = torch.Generator().manual_seed(HELDOUT_SEED)
        hits = []
        for _ in range(self.heldout):
            features, edges, label = self._graphs(1, generator)
            hits.append(model(features.to(device), edges.to(device)).argmax(-1).cpu() == label)
        return {self.metric.main: torch.cat(hits).double().mean().item()}, []

    def _graphs(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return block_model(count, self.nodes, self.classes, self.near, self.far, self.noise, generator)

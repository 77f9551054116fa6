"""Retrieval over several hops: names that stand for other names, and the value at the end of a chain of them.

    B A   Q P   C B   R Q   D C   ...   D? Q? C? ...        B = A, so D = C = B = A: at D?, name A

Musat 2025, "Mechanism and Emergence of Stacked Attention Heads in Multi-Layer Transformers" (ICLR 2025, arXiv
2411.12118): retrieval of growing depth needs more layers, and is learned only where shallow questions are asked too.

Differs from the paper: of it the abstract alone was read, so that the format is our own. Every name is asked for once,
and in training every link asks for its chain's end as well, which makes shallow questions frequent; a chain's links
stand in order, as a causal mixer needs them, with those of the other chains between them; values are names like all
others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import refuse
from regard.tasks import Batch, Defaults, Metric, counts
from regard.tasks._labelled import IGNORED, Labelled


def chains(
    count: int, links: int, among: int, vocab: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Inputs, labels (-100 where nothing is asked), and how many hops a question takes (0 where there is none).

    Each example has `among` chains of `links` links: a link is two tokens, a name and what it stands for, and its
    second token has the chain's end as label. Then every name but the chains' ends is asked for once, in random
    order. length = 3 * links * among.
    """
    names = 1 + torch.rand(count, vocab - 1, generator=generator).argsort(1)[:, : among * (links + 1)]
    names = names.view(count, among, links + 1)
    # Sorting a random order of the links by chain, and putting each chain's links there by depth, keeps them in order.
    mixed = torch.rand(count, among * links, generator=generator).argsort(1) // links
    depth = torch.nn.functional.one_hot(mixed, among).cumsum(1).gather(2, mixed[..., None])[..., 0]
    rows = torch.arange(count)[:, None]
    facts = torch.stack([names[rows, mixed, depth], names[rows, mixed, depth - 1]], 2).flatten(1)
    asked = torch.rand(count, among * links, generator=generator).argsort(1)
    chain, hops = asked // links, asked % links + 1
    ends = names[:, :, 0]
    told = torch.stack([torch.full_like(mixed, IGNORED), ends.gather(1, mixed)], 2).flatten(1)
    inputs = torch.cat([facts, names[rows, chain, hops]], 1)
    labels = torch.cat([told, ends.gather(1, chain)], 1)
    return inputs, labels, torch.cat([torch.zeros_like(facts), hops], 1)


@dataclass(frozen=True)
class Retrieval(Labelled):
    """Every number of hops up to `hops` is trained on, and measured apart."""

    name: ClassVar[str] = "retrieval"
    gist: ClassVar[str] = "Follow a name through several links to the value at its end."
    metric: ClassVar[Metric] = Metric(
        "accuracy", "accuracy", better=1, main="mean", along="hops", loss="bits", percent=True
    )
    defaults: ClassVar[Defaults] = Defaults(steps=800, batch=32, dim=64, depth=3, heads=2, lr=1e-2)

    vocab: int = 32
    hops: int = 3
    chains: int = 4

    def __post_init__(self) -> None:
        counts(self, vocab=4, hops=1, chains=1, heldout=1)
        if self.chains * (self.hops + 1) > self.vocab - 1:
            least = self.chains * (self.hops + 1) + 1
            refuse(self, "vocab", "is too small for all names", self.vocab, f"an int >= {least}")

    @property
    def tokens(self) -> int:
        return 3 * self.hops * self.chains

    def describe(self) -> str:
        return f"{self.chains} chains of {self.hops} links, {self.vocab} symbols, generated"

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield chains(batch, self.hops, self.chains, self.vocab, generator)[:2]

    def questions(self, count: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        inputs, labels, depth = chains(count, self.hops, self.chains, self.vocab, generator)
        for hops in range(1, self.hops + 1):
            yield f"{hops}", inputs, labels.masked_fill(depth != hops, IGNORED)

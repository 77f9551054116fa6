"""Multi-query associative recall: a list of key-value pairs, and later some of the keys again, each asking its value.

    k_1 v_1 k_2 v_2 ... k_n v_n  0 k_2 0 0 k_1 0 ...        at each key that comes again, name its value

Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Re 2023, "Zoology: Measuring and Improving Recall in Efficient
Language Models" (arXiv 2312.04927); the format is that of the authors' generator, whose numbers it gives exactly.

Differs from the paper: one model learns all numbers of pairs together, and is tested on each; every mechanism has a
short convolution before it and none gets positions, where the paper gives learned positions to attention alone; the
layers have MLPs, whose width makes the budgets equal: wide ones, so that Mamba-2's large layers fit.

About 1/n right at n pairs is what a model gets that names some value of the list, as all do before they find out which
belongs to which: with too few steps, or decays that start too strong, it says nothing of how much a state holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as counting
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import number, refuse
from regard.tasks import Batch, Defaults, Metric, counts
from regard.tasks._labelled import IGNORED, Labelled


def recall(
    count: int, length: int, pairs: int, vocab: int, *, power: float = 0.01, seed: int
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Inputs, and labels that are -100 but where a key asks for its value.

    Keys are drawn from 1 .. vocab//2 - 1 and values from vocab//2 .. vocab - 1, without repetition in an example. Each
    key comes again once, at an even distance behind the pairs: in slot g with weight (g + 1)^(power - 1).
    """
    draw = np.random.RandomState(seed)
    slots = np.arange((length - 2 * pairs) // 2)
    weights = (slots + 1.0) ** (power - 1)

    def rows(among: np.ndarray, p: np.ndarray | None = None) -> np.ndarray:
        return np.stack([draw.choice(among, pairs, replace=False, p=p) for _ in range(count)])

    keys, values = rows(np.arange(1, vocab // 2)), rows(np.arange(vocab // 2, vocab))
    places = 2 * pairs + 2 * rows(slots, weights / weights.sum())
    inputs, labels = np.zeros((count, length), np.int64), np.full((count, length), IGNORED)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(inputs, places, keys, 1)
    np.put_along_axis(labels, places, values, 1)
    return torch.from_numpy(inputs), torch.from_numpy(labels)


@dataclass(frozen=True)
class MultiQueryRecall(Labelled):
    """A batch has one number of pairs, each in its turn."""

    name: ClassVar[str] = "mqar"
    gist: ClassVar[str] = "Recall the value that stood behind each of many keys."
    metric: ClassVar[Metric] = Metric(
        "accuracy", "accuracy", better=1, main="mean", along="pairs", loss="bits", percent=True
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=600,
        batch=32,
        dim=32,
        depth=2,
        heads=2,
        lr=1e-2,
        mlp=8,
    )

    vocab: int = 64
    length: int = 64
    pairs: tuple[int, ...] = (2, 4, 8, 16)
    power: float = 0.01

    def __post_init__(self) -> None:
        counts(self, vocab=4, length=4, pairs=1, heldout=1)
        number(self, power=self.power)
        most = max(self.pairs)
        if self.length % 2 or 4 * most > self.length:
            refuse(self, "length", f"has no room for {most} pairs", self.length, f"an even int >= {4 * most}")
        if most > self.vocab // 2 - 1:
            refuse(self, "vocab", f"is too small for {most} pairs", self.vocab, f"an int >= {2 * most + 2}")

    @property
    def tokens(self) -> int:
        return self.length

    def describe(self) -> str:
        return f"{', '.join(map(str, self.pairs))} pairs of {self.vocab} symbols, generated"

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        seeds = np.random.SeedSequence(seed)
        for n in counting():
            mine = int(seeds.spawn(1)[0].generate_state(1)[0])
            yield recall(batch, self.length, self.pairs[n % len(self.pairs)], self.vocab, power=self.power, seed=mine)

    def questions(self, count: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        for pairs in self.pairs:
            mine = int(np.random.SeedSequence((seed, pairs)).generate_state(1)[0])
            yield (f"{pairs}", *recall(count, self.length, pairs, self.vocab, power=self.power, seed=mine))

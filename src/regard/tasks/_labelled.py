"""What the tasks of recall share: token ids go in, and some positions have a label that the model must name."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from regard.models.mixer import Mechanism, layers
from regard.models.tokens import AfterConvolution, TokenModel
from regard.tasks import HELDOUT_SEED, Batch, Size, Task

IGNORED = -100
"""The label of a position that nothing is asked about."""


@dataclass(frozen=True)
class Labelled(Task):
    """Causal mixers behind a short convolution; cross-entropy and accuracy at the labelled positions alone.

    The convolution lets every mechanism, with positions or without, bind a token to the one before it: the part of
    the work that these tasks do not ask about.
    """

    takes: ClassVar[Mapping[str, frozenset[str]]] = {"TokenMixer": frozenset({"causal"})}
    loss_scale: ClassVar[float] = 1 / math.log(2)
    positions: ClassVar[bool] = False
    """Whether the host brings learned positions."""
    answers: ClassVar[int | None] = None
    """How many answers there are; None: the symbols."""

    vocab: int
    heldout: int = field(default=512, kw_only=True)
    """Held-out examples, of each group."""

    def model(self, mechanism: Mechanism, size: Size) -> nn.Module:
        made = layers(mechanism, dim=size.dim, num_heads=size.heads, depth=size.depth, causal=True)
        mixers = [AfterConvolution(mixer, size.dim) for mixer in made]
        read, tell = nn.Embedding(self.vocab, size.dim), nn.Linear(size.dim, self.answers or self.vocab, bias=False)
        places = self.tokens if self.positions else 0
        return TokenModel(read, mixers, tell, dim=size.dim, mlp_dim=size.mlp_dim, positions=places)

    def example(self) -> Batch:
        return (torch.zeros(1, self.tokens, dtype=torch.long),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(model(inputs).flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def measure(self, model: nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        right: dict[str, list[Tensor]] = {}
        for label, inputs, labels in self.questions(self.heldout, HELDOUT_SEED):
            for x, y in zip(inputs.split(batch), labels.split(batch)):
                asked = y != IGNORED
                hits = model(x.to(device)).argmax(-1).cpu()[asked] == y[asked]
                right.setdefault(label, []).append(hits)
        shares = {label: torch.cat(hits).double().mean().item() for label, hits in right.items()}
        return {self.metric.main: sum(shares.values()) / len(shares), **(shares if len(shares) > 1 else {})}, []

    def questions(
        self, count: int, seed: int
    ) -> Iterator[tuple[str, Int[Tensor, "count length"], Int[Tensor, "count length"]]]:
        """(label, inputs, labels) of each group that is measured apart."""
        raise NotImplementedError

"""Absence: a sequence, a copy of it with gaps, and the sequence again: which of its elements does the copy lack?

    a b c d e | a b d e / a b c d e        missing: no mark where c was; the last c is 1, all else 0
    a b c d e | a b # d e / a b c d e      placeholder: a mark stands in the gap
    a b c d e | a b c # d e / a b c d e    needle: nothing is missing, a mark was put in behind c

The data of "AbsenceBench: Language Models Can't Tell What's Missing" (authors' code, harvey-fin/absence-bench; paper's
abstract) for small models. There documents are numbers, poems and diffs, and a language model is asked in words:
`regard.prompts.absence` does that. The finding is that models name what was put in and miss what was left out, for
attention has no key to look at where a gap is; marks in the gaps help.

Differs from the benchmark: this form, symbols with a label at each of the last part, is our own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import choice, refuse, whole
from regard.tasks import HELDOUT_SEED, Batch, Defaults, Metric, counts
from regard.tasks._labelled import IGNORED, Labelled

PAD, COPY, AGAIN, MARK = range(4)
"""Symbols that are no elements: behind the end, before the copy, before the last part, in or behind a gap."""
EDITS = ("missing", "placeholder", "needle")


def gaps(count: int, elements: int, share: float, generator: torch.Generator) -> Bool[Tensor, "count elements"]:
    """Which elements go: each with this chance, drawn again where that takes none or all."""
    gone = torch.zeros(count, elements, dtype=torch.bool)
    while len(again := (~(gone.any(1) & ~gone.all(1))).nonzero()[:, 0]):
        gone[again] = torch.rand(len(again), elements, generator=generator) < share
    return gone


def asked(
    sequence: Int[Tensor, "N n"], gone: Bool[Tensor, "N n"], edit: str, length: int
) -> tuple[Int[Tensor, "N length"], Int[Tensor, "N length"]]:
    """Inputs, filled up with PAD, and labels: of the last part 1 where an element is gone, else 0; -100 elsewhere."""
    inputs = torch.full((len(sequence), length), PAD)
    labels = torch.full((len(sequence), length), IGNORED)
    for row, (whole_, out) in enumerate(zip(sequence, gone)):
        mark = torch.full_like(whole_, MARK)
        if edit == "needle":
            both = torch.stack([whole_, mark], 1).flatten()
            copy = both[torch.stack([torch.ones_like(out), out], 1).flatten()]
        else:
            copy = torch.where(out, mark, whole_) if edit == "placeholder" else whole_[~out]
        line = torch.cat([whole_, torch.tensor([COPY]), copy, torch.tensor([AGAIN]), whole_])
        inputs[row, : len(line)] = line
        labels[row, len(line) - len(whole_) : len(line)] = out.long()
    return inputs, labels


def f1(
    predicted: Bool[Tensor, "*b n"], gone: Bool[Tensor, "*b n"], among: Bool[Tensor, "*b n"] | None = None
) -> Tensor:
    """2 tp / (2 tp + fp + fn) of each document, over its elements; where nothing is gone, 1 - fp / n."""
    among = torch.ones_like(gone) if among is None else among
    hits, named, lost = ((x & among).sum(-1).double() for x in (predicted & gone, predicted, gone))
    none_gone = 1 - named / among.sum(-1).clamp(min=1)
    return torch.where(lost > 0, 2 * hits / (named + lost).clamp(min=1), none_gone)


@dataclass(frozen=True)
class Absence(Labelled):
    """A batch has one share of gaps, each in its turn; the mean F1 of documents is measured at each.

    A batch is symbols (B, length) and labels (B, length); a seed draws its own without end, and the held-out ones
    have a seed that no run has. Naming every element gives F1 = 2 p / (1 + p) where a share p is gone, which
    `describe` says.
    """

    name: ClassVar[str] = "absence"
    gist: ClassVar[str] = "Say which elements of a sequence a copy of it lacks."
    metric: ClassVar[Metric] = Metric("F1", "F1", better=1, main="mean", along="gone", loss="bits", percent=True)
    defaults: ClassVar[Defaults] = Defaults(steps=800, batch=64, dim=64, depth=2, heads=4, lr=5e-3)
    positions: ClassVar[bool] = True
    answers: ClassVar[int | None] = 2

    vocab: int = 32
    elements: int = 16
    gone: tuple[int, ...] = (20, 50)
    """Percentages of the elements."""
    edit: str = "missing"
    """"missing", or a control: "placeholder" or "needle"."""
    repeats: int = 0
    """1: an element may stand in a sequence more than once; 0: each once."""

    def __post_init__(self) -> None:
        counts(self, vocab=6, elements=2, gone=1, heldout=1)
        whole(self, most=99, gone=max(self.gone))
        whole(self, 0, most=1, repeats=self.repeats)
        choice(self, EDITS, edit=self.edit)
        if not self.repeats and self.elements > self.vocab - 4:
            refuse(self, "vocab", "is too small for its elements", self.vocab, f"an int >= {self.elements + 4}")

    @property
    def tokens(self) -> int:
        return self.elements * (4 if self.edit == "needle" else 3) + 2

    def describe(self) -> str:
        floors = ", ".join(f"{2 * p / (100 + p):.2f}" for p in self.gone)
        shares = ", ".join(f"{p}%" for p in self.gone)
        return f"{self.elements} of {self.vocab - 4} symbols, {shares} {self.edit}, generated; all named: F1 {floors}"

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for percent in self.gone:
                yield self._documents(batch, percent, generator)

    def questions(self, count: int, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for percent in self.gone:
            yield (f"{percent}%", *self._documents(count, percent, generator))

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, batch: int, device: torch.device) -> tuple[dict[str, float], list[str]]:
        found = {}
        for label, inputs, labels in self.questions(self.heldout, HELDOUT_SEED):
            told = torch.cat([model(x.to(device)).argmax(-1).cpu() == 1 for x in inputs.split(batch)])
            found[label] = f1(told, labels == 1, labels != IGNORED).mean().item()
        return {self.metric.main: sum(found.values()) / len(found), **(found if len(found) > 1 else {})}, []

    def _documents(self, count: int, percent: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The gaps are drawn first, never from the symbols."""
        gone = gaps(count, self.elements, percent / 100, generator)
        symbols = self.vocab - 4
        if self.repeats:
            sequence = torch.randint(symbols, (count, self.elements), generator=generator)
        else:
            sequence = torch.rand(count, symbols, generator=generator).argsort(1)[:, : self.elements]
        return asked(sequence + 4, gone, self.edit, self.tokens)

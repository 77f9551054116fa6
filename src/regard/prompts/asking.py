"""Ask a language model and say how often it is right, by length and by how deep in the text what is asked for stands.

    score(model, tokenizer, "needle", length=(128, 256), samples=20)        a transformers model, greedily
    ask(answer, "needle(keys=4)", length=4096)                              any function from a prompt to text

Whatever stands around the call stays there: a model under `regard.swap`, or a cache that keeps less, which `cache`
makes.
"""

import importlib
import pkgutil
import random
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from regard.checks import refuse, whole
from regard.index import lacks, unknown
from regard.spec import single

Count = Callable[[str], int]
"""How many tokens a text has."""


@dataclass(frozen=True)
class Question:
    """What is said to a model, and what it should say."""

    prompt: str
    answers: tuple[str, ...]
    """All of them are asked for."""
    depth: float | None = None
    """Where in the text they stand: 0 at its beginning, 1 at its end, the mean of several; None: everywhere."""
    given: Any = None
    """What a task's `mark` needs beyond the answers."""


@dataclass(frozen=True)
class Prompts(ABC):
    """One kind of question. Fields are its options; a seed, a length and a count of tokens decide the questions."""

    name: ClassVar[str]
    gist: ClassVar[str]
    """One line, under 90 characters."""

    @property
    def room(self) -> int:
        """Tokens that an answer may take; they count towards the length."""
        return 32

    @abstractmethod
    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        """One question whose prompt and answer have at most `length` tokens, and nearly so many.

        Args:
            depth: where what is asked for is to stand, from 0 to 1, as far as there is one such place.
        """

    def questions(self, length: int, samples: int, tokens: Count, seed: int = 0) -> list[Question]:
        """Questions at depths that are spread evenly."""
        draw = random.Random(f"{self.name} {length} {seed}")
        return [self.question(length, (n + 0.5) / samples, tokens, draw) for n in range(samples)]

    def mark(self, question: Question, said: str) -> float:
        """The share of answers that were said anywhere, upper or lower case: RULER's string_match_all."""
        return statistics.fmean(answer.lower() in said.lower() for answer in question.answers)


@dataclass(frozen=True)
class Row:
    """One question that was asked."""

    length: int
    depth: float | None
    mark: float
    said: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What a model said, and marks from 0 to 1."""

    task: str
    rows: tuple[Row, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(row.mark for row in self.rows)

    def by_length(self) -> dict[int, float]:
        """The mean mark at each length."""
        return _means((row.length, row.mark) for row in self.rows)

    def by_depth(self, bins: int = 5) -> dict[str, float]:
        """The mean mark in each of so many equal parts of the text, '0-20%' first; {} where no place is asked for."""
        whole("Scores.by_depth", bins=bins)
        deep = [(min(int(row.depth * bins), bins - 1), row.mark) for row in self.rows if row.depth is not None]
        return {f"{100 * n // bins}-{100 * (n + 1) // bins}%": mark for n, mark in sorted(_means(deep).items())}

    def __str__(self) -> str:
        lengths = ", ".join(f"{length}: {mark:.2f}" for length, mark in self.by_length().items())
        depths = ", ".join(f"{part}: {mark:.2f}" for part, mark in self.by_depth().items())
        return "; ".join(filter(None, [f"{self.task} {self.mean:.2f}", f"by length {lengths}", f"by depth {depths}"]))


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for key, mark in pairs:
        found.setdefault(key, []).append(mark)
    return {key: statistics.fmean(marks) for key, marks in found.items()}


def names() -> list[str]:
    """All kinds of questions."""
    return sorted(_classes())


def make(task: "str | Prompts") -> Prompts:
    """The kind of questions of that name, with options in brackets: 'needle(keys=4)'.

    Raises:
        ValueError: an unknown name or option.
    """
    if isinstance(task, Prompts):
        return task
    part, known = single(task, "prompts"), _classes()
    if part.name not in known:
        raise ValueError(unknown("prompts", part.name, known))
    options = [f.name for f in fields(known[part.name])]
    for option in part.options:
        if option not in options:
            raise ValueError(f"prompts {lacks(part.name, 'option', option, options)}")
    return known[part.name](**part.options)


def _classes() -> dict[str, type[Prompts]]:
    import regard.prompts as room

    paths = (path for _, path, _ in pkgutil.iter_modules(room.__path__) if not path.startswith("_"))
    every = (value for path in paths for value in vars(importlib.import_module(f"{room.__name__}.{path}")).values())
    return {k.name: k for k in every if isinstance(k, type) and issubclass(k, Prompts) and k is not Prompts}


def ask(
    answer: Callable[[str], str],
    task: str | Prompts,
    *,
    length: int | Sequence[int],
    samples: int = 20,
    seed: int = 0,
    tokens: Count = len,
) -> Scores:
    """Ask any function: it is called with each prompt, and gives the text that it would go on with.

    Args:
        tokens: what lengths are counted in; by default characters.
    """
    return _asked(lambda prompts: [answer(prompt) for prompt in prompts], make(task), length, samples, seed, tokens, 1)


@torch.no_grad()
def score(
    model: nn.Module,
    tokenizer: Any,
    task: str | Prompts,
    *,
    length: int | Sequence[int],
    samples: int = 20,
    seed: int = 0,
    batch: int = 8,
    cache: Callable[[], Any] | None = None,
    **options: Any,
) -> Scores:
    """Ask a transformers model, which answers greedily, in batches padded on the left.

    Args:
        model: what has `generate`.
        tokenizer: its tokenizer; its padding is not touched.
        task: a name of `names()`, with options in brackets.
        length: tokens of prompt and answer together, or several such.
        samples: questions at each length.
        cache: called before each batch for its `past_key_values`.
        options: handed on to `generate`.
    """
    kind = make(task)
    device = next(model.parameters()).device
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    given = {"do_sample": False, "max_new_tokens": kind.room, "pad_token_id": pad} | options
    generate = getattr(model, "generate", None)
    if generate is None:
        refuse("score", "model", "cannot generate", type(model).__name__, "a transformers model with a language head")

    def answers(prompts: Sequence[str]) -> list[str]:
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        most = max(map(len, rows))
        ids = torch.tensor([[pad] * (most - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows], device=device)
        past = {} if cache is None else {"past_key_values": cache()}
        out = generate(input_ids=ids, attention_mask=mask, **given, **past)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, most:]]

    training = model.training
    model.eval()
    try:
        return _asked(answers, kind, length, samples, seed, lambda text: len(tokenizer(text)["input_ids"]), batch)
    finally:
        model.train(training)


def _asked(
    answers: Callable[[Sequence[str]], list[str]],
    kind: Prompts,
    length: int | Sequence[int],
    samples: int,
    seed: int,
    tokens: Count,
    batch: int,
) -> Scores:
    lengths = (length,) if isinstance(length, int) else tuple(length)
    whole("score", samples=samples, batch=batch)
    rows: list[Row] = []
    for each in lengths:
        whole("score", length=each)
        questions = kind.questions(each, samples, tokens, seed)
        for at in range(0, samples, batch):
            some = questions[at : at + batch]
            for question, said in zip(some, answers([q.prompt for q in some]), strict=True):
                rows.append(Row(each, question.depth, kind.mark(question, said), said, question.answers))
    if not rows:
        refuse("score", "length", "is missing", tuple(lengths), "at least one")
    return Scores(kind.name, tuple(rows))

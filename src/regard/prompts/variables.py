"""Variable tracking: assignments hidden in a text, each of the variable before it; name all that have a value.

    VAR KOPIR = 48123 ... VAR TANEM = VAR KOPIR ... VAR BIDOL = VAR TANEM ...      which variables are 48123?

RULER's multi-hop tracing: Hsieh et al. 2024, arXiv 2404.06654; read: authors' code, NVIDIA/RULER at c3f5e3b. Every
chain has `hops` links behind its first assignment, in order; the first chain is asked for.

Differs: the wording is ours, the first assignment stands at a given depth and the others at random ones behind it,
and no solved example comes first.
"""

import itertools
import random
import statistics
from dataclasses import dataclass
from typing import ClassVar

from regard.checks import whole
from regard.prompts._text import NOISE, digits, hidden, most
from regard.prompts.asking import Count, Prompts, Question


@dataclass(frozen=True)
class Variables(Prompts):
    """One question: text, chains of assignments in it, and which variables have the first chain's value."""

    name: ClassVar[str] = "variables"
    gist: ClassVar[str] = "Follow assignments through a long text to all variables of a value."

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        whole(self, chains=self.chains)
        whole(self, 0, hops=self.hops)

    @property
    def room(self) -> int:
        return 8 * (self.hops + 1)

    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        names: dict[str, None] = {}
        while len(names) < self.chains * (self.hops + 1):
            names["".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))] = None
        every = list(names)
        told, depths, value = [], [], ""
        for n in range(self.chains):
            mine = every[n * (self.hops + 1) : (n + 1) * (self.hops + 1)]
            number = digits(5, draw)
            told += [f"VAR {mine[0]} = {number}."]
            told += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(mine)]
            first = depth if n == 0 else draw.random()
            depths += [first, *sorted(draw.uniform(first, 1) for _ in mine[1:])]
            value = value or number
        asked = self.hops + 1

        def prompt(n: int) -> str:
            text, _ = hidden([NOISE[at % len(NOISE)] for at in range(n)], told, depths)
            question = f"Which variables have the value {value}, at once or through others?"
            head, answer = (
                "Keep track of the variables in this text.",
                f"The {asked} variables of the value {value} are",
            )
            return "\n".join([head, " ".join(text), f"{question} {answer}"])

        n = most("variables", prompt, length - self.room, tokens)
        _, stand = hidden([""] * n, told, depths)
        return Question(prompt(n), tuple(every[:asked]), statistics.fmean(stand[:asked]))

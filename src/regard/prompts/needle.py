"""Needles in a haystack: sentences that give keys their values, hidden in text that says nothing; name a key's values.

    The river runs to the sea. ... The secret number of kopiru is 4812. ... What is the secret number of kopiru?

Single, multi-key, multi-value and multi-query needles of RULER: Hsieh et al. 2024, "RULER: What's the Real Context
Size of Your Long-Context Language Models?" (arXiv 2404.06654; read: authors' code, NVIDIA/RULER at c3f5e3b). There a
haystack is noise, essays, or other needles; the distracting keys are asked nothing.

Differs: words are syllables and numbers have four digits instead of seven, the wording is ours, there are no essays,
and the needle that is asked for stands at a given depth instead of one of 40 at random. `form="lines"` is ours: all
text is lines `ab=xy`, for models that read bytes and know no words; the haystack is other needles then.
"""

import random
import statistics
from dataclasses import dataclass
from typing import ClassVar

from regard.checks import choice, refuse, whole
from regard.prompts._text import NOISE, digits, hidden, letters, most, words
from regard.prompts.asking import Count, Prompts, Question

KEYS = 600
"""Of two letters; few more are left to draw."""


@dataclass(frozen=True)
class Needle(Prompts):
    """One question: text, needles in it, and which values `queries` of the keys have."""

    name: ClassVar[str] = "needle"
    gist: ClassVar[str] = "Find the values of keys that are hidden in a long text."

    keys: int = 1
    """Keys with needles, of which all but the queries distract."""
    values: int = 1
    """Needles of each key; all its values are asked for."""
    queries: int = 1
    """Keys that are asked for."""
    haystack: str = "noise"
    """"noise", or "needles" of other keys."""
    form: str = "sentences"
    """"sentences", or "lines" `ab=xy`."""

    def __post_init__(self) -> None:
        whole(self, keys=self.keys, values=self.values, queries=self.queries)
        choice(self, ("noise", "needles"), haystack=self.haystack)
        choice(self, ("sentences", "lines"), form=self.form)
        if self.form == "lines" and self.queries > 1:
            refuse(self, "queries", "are too many for lines", self.queries, "1: a line asks for one key")

    @property
    def room(self) -> int:
        return (6 if self.form == "lines" else 12) * self.values * self.queries

    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        keyed = max(self.keys, self.queries)
        asks_lines = self.form == "lines"
        known: set[str] = set()

        def fresh() -> str:
            if asks_lines and len(known) >= KEYS:
                refuse(self, "length", "has room for more keys than there are", length, f"at most {6 * KEYS} for lines")
            name = letters(2, draw) if asks_lines else words(1, draw)[0]
            while name in known:
                name = letters(2, draw) if asks_lines else words(1, draw)[0]
            known.add(name)
            return name

        def value() -> str:
            return letters(2, draw) if asks_lines else digits(4, draw)

        def say(key: str, number: str) -> str:
            return f"{key}={number}" if asks_lines else f"The secret number of {key} is {number}."

        names = [fresh() for _ in range(keyed)]
        held = {name: [value() for _ in range(self.values)] for name in names}
        needles = [say(name, number) for name in names for number in held[name]]
        asked = self.queries * self.values
        depths = [depth, *(draw.random() for _ in needles[1:])]
        made: list[str] = []

        def hay(n: int) -> list[str]:
            while len(made) < n:
                other = asks_lines or self.haystack == "needles"
                made.append(say(fresh(), value()) if other else NOISE[len(made) % len(NOISE)])
            return made[:n]

        def prompt(n: int) -> str:
            text, _ = hidden(hay(n), needles, depths)
            if asks_lines:
                return "\n".join([*text, f"{names[0]}="])
            of = (
                names[0]
                if self.queries == 1
                else ", ".join(names[: self.queries - 1]) + f" and {names[self.queries - 1]}"
            )
            what, verb = ("number", "is") if asked == 1 else ("numbers", "are")
            head = f"Secret {what} {verb} hidden in this text. Remember."
            ask = f"What {verb} the secret {what} of {of}?"
            return "\n".join([head, " ".join(text), f"{ask} The secret {what} of {of} {verb}"])

        n = most("needle", prompt, length - self.room, tokens)
        _, stand = hidden(hay(n), needles, depths)
        answers = tuple(number for name in names[: self.queries] for number in held[name])
        return Question(prompt(n), answers, statistics.fmean(stand[:asked]))

    def mark(self, question: Question, said: str) -> float:
        """In lines of one value, only what is said at once counts."""
        return super().mark(question, said[:2] if self.form == "lines" and self.values == 1 else said)

"""Absence in words: a document, a copy of it with gaps, and which elements are missing?

"AbsenceBench: Language Models Can't Tell What's Missing" (authors' code, harvey-fin/absence-bench at a897610, and the
paper's abstract). Numbers are a sequence min + step i in some order; poems come as lines of the caller's, and changes
as the lines of a diff, of which only changed ones can be left out.

Differs: the wording is ours; poems and diffs are not downloaded but given, cut to as many elements as fit the length;
a share of 0 asks about a whole copy. As in the authors' code the mark is F1 over the original's elements, of each
document: what was never there costs nothing. Naming all of them gives 2 p / (1 + p) where a share p is gone.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from regard.checks import choice, number, refuse, whole
from regard.prompts._text import most, words
from regard.prompts.asking import Count, Prompts, Question

STEPS = (1, 2, 4, 7, 13)
HEADERS = ("+++", "---", "diff --git", "index ", "@@")
PLACEHOLDER = "_" * 10
WHAT = {"numbers": "numbers", "lines": "lines", "diff": "changed lines"}


def numbers(count: int, order: str, step: int, draw: random.Random) -> list[str]:
    """start + step i for i < count, ascending, descending or in random order; the start is from 0 to 10,000."""
    start = draw.randint(0, 10_000)
    found = [str(start + step * n) for n in range(count)]
    if order == "random":
        draw.shuffle(found)
    return found[::-1] if order == "descending" else found


def removable(elements: Sequence[str], domain: str) -> list[bool]:
    """Which elements may go: of a diff only changed lines that come once, else all."""
    if domain != "diff":
        return [True] * len(elements)
    return [
        line.startswith(("+", "-")) and not line.startswith(HEADERS) and elements.count(line) == 1 for line in elements
    ]


def gaps(may: Sequence[bool], share: float, draw: random.Random) -> frozenset[int]:
    """Which elements go: each that may with this chance, drawn again where that takes none or all of the document."""
    if share == 0 or not any(may) or len(may) < 2:
        return frozenset()
    while True:
        gone = frozenset(n for n, can in enumerate(may) if draw.random() < share and can)
        if 0 < len(gone) < len(may):
            return gone


def edited(
    elements: Sequence[str],
    gone: frozenset[int],
    edit: str = "missing",
    domain: str = "lines",
    needles: Sequence[str] = (),
) -> list[str]:
    """The copy: without what is gone, with a mark in its place, or whole and with a needle behind each.

    Lines that come more than once are dropped from the copy of a diff altogether, and never asked for.
    """
    extra = iter(needles)
    copy = []
    for n, element in enumerate(elements):
        if domain == "diff" and elements.count(element) > 1:
            continue
        if n not in gone or edit == "needle":
            copy.append(element)
        if n in gone and edit != "missing":
            copy.append(PLACEHOLDER if edit == "placeholder" else next(extra))
    return copy


def said_of(element: str, said: str, domain: str) -> bool:
    """Whether an answer names this element: numbers as a line of their own, lines anywhere, upper or lower case."""
    if domain == "numbers":
        return element in [line.strip() for line in said.split("\n")]
    return element.strip().lower() in said.lower()


def f1(elements: Sequence[str], gone: frozenset[int], said: str, domain: str) -> float:
    """2 tp / (2 tp + fp + fn) over the original's elements, empty lines apart; where none is gone, 1 - fp / n."""
    hits = named = lost = 0
    for n, element in enumerate(elements):
        if not element.strip() or (domain == "diff" and elements.count(element) > 1):
            continue
        told = said_of(element, said, domain)
        hits, named, lost = hits + (told and n in gone), named + told, lost + (n in gone)
    return 2 * hits / (named + lost) if gone and named + lost else 0.0 if gone else 1 - named / max(len(elements), 1)


@dataclass(frozen=True)
class Absence(Prompts):
    """One question: an original, a copy, and which elements are missing; or, of a needle, extra."""

    name: ClassVar[str] = "absence"
    gist: ClassVar[str] = "Name the elements of a document that its copy lacks."

    domain: str = "numbers"
    """"numbers"; "lines" and "diff" of the `text` that is given, or of made-up ones."""
    share: float = 0.1
    """The chance of each element to be left out; 0: none is."""
    order: str = "random"
    """Of numbers: "ascending" and "descending" show a gap by the step alone."""
    step: int = 0
    """Between numbers; 0: one of 1, 2, 4, 7, 13."""
    edit: str = "missing"
    """"missing", or a control: "placeholder" or "needle"."""
    elements: int = 0
    """Of a document; 0: as many as the length has room for."""
    text: str = ""

    def __post_init__(self) -> None:
        choice(self, WHAT, domain=self.domain)
        choice(self, ("ascending", "descending", "random"), order=self.order)
        choice(self, ("missing", "placeholder", "needle"), edit=self.edit)
        number(self, least=0, below=1, share=self.share)
        whole(self, 0, step=self.step, elements=self.elements)
        if self.edit == "needle" and self.domain == "diff":
            refuse(self, "edit", "is unknown for diffs", self.edit, '"missing" or "placeholder"')

    @property
    def room(self) -> int:
        return 64

    def document(self, count: int, draw: random.Random) -> list[str]:
        """An original of at most so many elements."""
        if self.domain == "numbers":
            return numbers(count, self.order, self.step or draw.choice(STEPS), draw)
        if self.text:
            return self.text.splitlines()[:count]
        lines = [" ".join(words(4, draw, 2)) for _ in range(count)]
        return [draw.choice("+- ") + line for line in lines] if self.domain == "diff" else lines

    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        seed = draw.random()
        what, adjective = WHAT[self.domain], "extra" if self.edit == "needle" else "missing"

        def made(n: int) -> tuple[list[str], frozenset[int], list[str], str]:
            mine = random.Random(seed)
            original = self.document(n, mine)
            gone = gaps(removable(original, self.domain), self.share, random.Random(seed + n))
            needles = [" ".join(words(4, mine, 3)) for _ in gone]
            if self.domain == "numbers":
                needles = [str(20_000 + mine.randrange(10_000)) for _ in gone]
            copy = edited(original, gone, self.edit, self.domain, needles)
            ask = f"Which {what} are {adjective} in it? List the {adjective} {what} alone, and nothing else."
            parts = [
                "The original:",
                *original,
                "",
                f"My copy, in which {what} may be {adjective}:",
                *copy,
                "",
                ask,
                "",
            ]
            return original, gone, needles, "\n".join(parts)

        least = self.elements or 2
        n = most("absence", lambda n: made(n)[-1], length - self.room, tokens, least) if not self.elements else least
        original, gone, needles, prompt = made(n)
        answers = tuple(needles) if self.edit == "needle" else tuple(original[n] for n in sorted(gone))
        return Question(prompt, answers, None, (original, gone))

    def mark(self, question: Question, said: str) -> float:
        original, gone = question.given
        if self.edit != "needle":
            return f1(original, gone, said, self.domain)
        found = sum(said_of(needle, said, self.domain) for needle in question.answers)
        wrong = sum(said_of(element, said, self.domain) for element in original)
        return 2 * found / (found + wrong + len(question.answers)) if question.answers else 1 - wrong / len(original)

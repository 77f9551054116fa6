"""What prompts are made of: words without a list of them, sentences that say nothing, and as much text as fits."""

import bisect
import random
from collections.abc import Callable, Sequence

from regard.checks import refuse
from regard.prompts.asking import Count

NOISE = (
    "The river runs to the sea.",
    "The lamp is on the table.",
    "A dog sleeps by the door.",
    "It rains on the hills.",
    "We went out and came back.",
)
"""A haystack that says nothing."""


def words(count: int, draw: random.Random, syllables: int = 3) -> list[str]:
    """So many different words, such as 'kopiru': syllables of a consonant and a vowel."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(syllables))] = None
    return list(found)


def digits(count: int, draw: random.Random) -> str:
    """A number of so many digits, the first of which is no 0."""
    return str(draw.randrange(10 ** (count - 1), 10**count))


def letters(count: int, draw: random.Random) -> str:
    """So many of a to z."""
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(count))


def most(who: str, prompt: Callable[[int], str], length: int, tokens: Count, least: int = 0) -> int:
    """The largest n, found by halving, at which prompt(n), which grows with n, has at most `length` tokens.

    Raises:
        ValueError: even prompt(least) has more.
    """
    if tokens(prompt(least)) > length:
        need = tokens(prompt(least))
        refuse(who, "length", "has no room for the question", length, f"{need} tokens at least, beside the answer")
    high = least + 1
    while tokens(prompt(high)) <= length:
        high *= 2
    between = range(least + 1, high)
    return least + bisect.bisect_right(between, length, key=lambda n: tokens(prompt(n)))


def hidden(hay: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> tuple[list[str], list[float]]:
    """The haystack with each needle put in at its depth, and the depths at which they then stand."""
    pieces = [(depth * len(hay), 0, needle, n) for n, (depth, needle) in enumerate(zip(depths, needles))]
    pieces += [(n + 0.5, 1, straw, -1) for n, straw in enumerate(hay)]
    pieces.sort(key=lambda piece: piece[:2])
    last = max(len(pieces) - 1, 1)
    stand = {n: at / last for at, (_, _, _, n) in enumerate(pieces) if n >= 0}
    return [text for _, _, text, _ in pieces], [stand[n] for n in range(len(needles))]

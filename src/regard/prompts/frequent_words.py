"""Words that come often: name the commonest of a long list. What is asked for stands everywhere and nowhere.

Both of RULER's tasks of aggregation: Hsieh et al. 2024, arXiv 2404.06654; read: authors' code, NVIDIA/RULER at c3f5e3b.

    common words      1. kopiru 2. banete 3. kopiru ...     `asked` words come `often` times each, all others `seldom`
    frequent words    kopiru ... banete kopiru kopiru ...   the k-th commonest comes in a share k^-power / zeta(power)

Of the second, the commonest is '...', which is not asked for. Differs: words are syllables, the wording is ours, and
no solved example comes first; here `often` and `seldom` do not depend on the length.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from regard.checks import choice, number, refuse, whole
from regard.prompts._text import letters, most, words
from regard.prompts.asking import Count, Prompts, Question


@dataclass(frozen=True)
class CommonWords(Prompts):
    """One question: a numbered list of words, of which some come more often than the rest."""

    name: ClassVar[str] = "common_words"
    gist: ClassVar[str] = "Name the words of a long list that come more often than the rest."

    asked: int = 10
    often: int = 6
    seldom: int = 1
    syllables: int = 3

    def __post_init__(self) -> None:
        whole(self, asked=self.asked, often=self.often, seldom=self.seldom, syllables=self.syllables)
        if self.often <= self.seldom:
            refuse(self, "often", "is no more than seldom", self.often, f"an int > {self.seldom}")

    @property
    def room(self) -> int:
        return 12 * self.asked

    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        seed, count = draw.random(), self.asked
        common = words(count, draw, self.syllables)

        def prompt(n: int) -> str:
            shuffled, others = random.Random(seed), words(n + count, random.Random(seed), self.syllables)
            rest = [word for word in others if word not in common][:n]
            listed = common * self.often + rest * self.seldom
            shuffled.shuffle(listed)
            numbered = " ".join(f"{at}. {word}" for at, word in enumerate(listed, 1))
            head = "Some words of this list come more often than others. Remember those."
            ask = f"Which {count} words come most often in the list?"
            return f"{head}\n{numbered}\n{ask} The {count} words that come most often are:"

        n = most("common_words", prompt, length - self.room, tokens)
        return Question(prompt(n), tuple(common))


@dataclass(frozen=True)
class FrequentWords(Prompts):
    """One question: words of a made-up code, whose frequencies fall as a power of their rank."""

    name: ClassVar[str] = "frequent_words"
    gist: ClassVar[str] = "Name the most frequent words of a long coded text."

    asked: int = 3
    power: float = 2.0
    """Nearer to 1, more of the text are other words."""
    syllables: int = 3
    form: str = "sentences"
    """"sentences", or "lines" `ab=xy` of one key: its commonest value, that of a third, is asked for."""

    def __post_init__(self) -> None:
        whole(self, asked=self.asked, syllables=self.syllables)
        number(self, above=1, power=self.power)
        choice(self, ("sentences", "lines"), form=self.form)

    @property
    def room(self) -> int:
        return 6 if self.form == "lines" else 12 * self.asked

    def question(self, length: int, depth: float, tokens: Count, draw: random.Random) -> Question:
        seed = draw.random()
        if self.form == "lines":
            return self._lines(length, tokens, draw)
        code = ["...", *words(max(length // 50, self.asked + 1), draw, self.syllables)]
        zeta = sum(k**-self.power for k in range(1, 10_000)) + 10_000 ** (1 - self.power) / (self.power - 1)

        def prompt(n: int) -> str:
            # Every word that is asked for comes at least once, where n is small.
            times = [int(n * k**-self.power / zeta) for k in range(1, len(code) + 1)]
            text = [word for word, often in zip(code, times) for _ in range(often)]
            random.Random(seed).shuffle(text)
            head = f"Find the {self.asked} words that come most often in this coded text, apart from the dots."
            end = f"The {self.asked} words that come most often in the coded text are:"
            return f"{head} {' '.join(text)}\n{end}"

        least = next(n for n in range(1, 10**6) if int(n * (self.asked + 1) ** -self.power / zeta) >= 1)
        n = most("frequent_words", prompt, length - self.room, tokens, least)
        return Question(prompt(n), tuple(code[1 : self.asked + 1]))

    def _lines(self, length: int, tokens: Count, draw: random.Random) -> Question:
        key, common, seed = letters(2, draw), letters(2, draw), draw.random()

        def prompt(n: int) -> str:
            mine = random.Random(seed)
            others = [letters(2, mine) for _ in range(n - n // 3)]
            values = [common] * (n // 3) + [value for value in others if value != common]
            mine.shuffle(values)
            return "".join(f"{key}={value}\n" for value in values) + f"{key}="

        return Question(prompt(most("frequent_words", prompt, length - self.room, tokens, 6)), (common,))

    def mark(self, question: Question, said: str) -> float:
        """In lines only what is said at once counts."""
        return super().mark(question, said[:2] if self.form == "lines" else said)

"""A law: a statement that must hold for whatever claims to be an attention of some kind, and the function that looks.

    @law("L4", needs="causal")
    def future_changes_nothing(s: Subject) -> None:
        '''The future changes nothing.'''
        ...  # raises Broken where it doesn't hold

The function stays what it is; `LAWS` has it with its id, its statement and whom it speaks of.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from regard.laws.subject import Subject

BATCHED = "TokenMixer CrossMixer FeatureMixer Pooler Pointer"
"""Protocols whose tensors have a batch."""
MIXERS = f"{BATCHED} GraphMixer"
LAYERS = f"{MIXERS} Loss"
"""Protocols of modules that take tensors and give one."""


Weight = Literal["light", "heavy", "long"]
"""light, hundredths of a second: the suite looks at them for every card, always. heavy, up to seconds: always for one
card of each protocol and family and for those that have changed, for all on demand. long, many seconds: on demand."""


@dataclass(frozen=True)
class Law:
    """One law. `check(subject)` returns, or raises `Broken` (or whatever the subject itself raises)."""

    id: str
    """As in 'L4'; several laws may share one, of which they are sides."""
    name: str
    statement: str
    why_not: Callable[[Subject], str]
    """Why it says nothing about the subject; '' where it does."""
    check: Callable[[Subject], None]
    weight: Weight = "light"

    def __str__(self) -> str:
        return f"{self.id} {self.name}"


LAWS: list[Law] = []
"""All laws, in the order of their files."""


def law(
    id: str,
    *,
    needs: str = "",
    traits: str = "",
    protocols: str = "TokenMixer",
    pipeline: bool = False,
    function: bool = False,
    where: Callable[[Subject], str] = lambda s: "",
    weight: Weight = "light",
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Make a law of a function, whose docstring is the statement. The function stays what it is.

    Args:
        needs, traits: what the subject must claim, with blanks between.
        protocols: of which kinds it may be.
        pipeline: only for what fills slots of `regard.Attention`.
        function: only for what has a form as a function of queries, keys and values.
        where: why it doesn't apply, for whatever else may keep it from that.
        weight: how long it takes, and so when it is looked at.
    """

    def why_not(s: Subject) -> str:
        if s.protocol not in protocols.split():
            return f"it is a {s.protocol}"
        for claimed, wanted, what in ((s.supports, needs, "support"), (s.traits, traits, "be")):
            if missing := [w for w in wanted.split() if w not in claimed]:
                return f"it does not claim to {what} {', '.join(missing)}"
        if "cross" in needs.split() and s.protocol == "TokenMixer" and not s.crossings:
            return "it is causal, and so of one length"
        if pipeline and not s.is_part:
            return "it is no part of regard.Attention"
        if function and s.form() is None:
            return "it is no function of queries, keys and values"
        return where(s)

    def make(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        statement = inspect.cleandoc(check.__doc__ or "").replace("\n", " ")
        LAWS.append(Law(id, check.__name__, statement, why_not, check, weight))
        return check

    return make

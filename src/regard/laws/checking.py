"""`regard.check`: put anybody's attention through the laws, and say law by law what holds."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from regard.laws.agreement import Broken, DoesNotApply
from regard.laws.every import LAWS
from regard.laws.foreign import subject
from regard.laws.registry import Law
from regard.laws.subject import Subject

Outcome = Literal["holds", "fails", "excepted", "does not apply"]
SIZES = ("batch", "length", "heads")
SMALL = (1, 2, 3, 4, 5, 6, 8, 10)
PATIENCE = 5.0
"""Seconds in which a smaller input is looked for, a law."""


@dataclass(frozen=True)
class Finding:
    """What was found of one law."""

    law: Law
    outcome: Outcome
    why: str = ""
    """The difference where it fails, else the reason."""
    sizes: Mapping[str, int] | None = None
    """Of the smallest input at which it fails: B, T, M and H."""
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The statement where it holds, else where and why it doesn't."""
        if self.outcome == "holds":
            return self.law.statement
        at = "" if self.sizes is None else ", ".join(f"{axis}={size}" for axis, size in self.sizes.items()) + ": "
        return at + self.why

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "law": self.law.id,
            "name": self.law.name,
            "statement": self.law.statement,
            "outcome": self.outcome,
            "why": self.why,
            "sizes": None if self.sizes is None else dict(self.sizes),
            "seconds": round(self.seconds, 4),
        }


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the laws."""

    name: str
    supports: tuple[str, ...]
    traits: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing fails."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.outcome == "fails")

    def data(self) -> dict[str, Any]:
        """For JSON."""
        found = [finding.data() for finding in self.findings]
        claims = {"supports": list(self.supports), "traits": list(self.traits)}
        return {"name": self.name, "ok": self.ok, **claims, "laws": found}

    def __str__(self) -> str:
        rows = [f"{one.outcome:15}{one.law}\n{' ' * 15}{one.text}" for one in self.findings]
        return "\n".join([*rows, self.summary()])

    def summary(self) -> str:
        """One line."""
        count = {outcome: sum(f.outcome == outcome for f in self.findings) for outcome in get_args(Outcome)}
        return f"{self.name}: " + ", ".join(f"{n} {outcome}" for outcome, n in count.items() if n)


def check(
    thing: object,
    *,
    protocol: str | None = None,
    supports: Iterable[str] | None = None,
    traits: Iterable[str] | None = None,
    dim: int | None = None,
    heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Callable[..., tuple[Any, ...]] | None = None,
    exceptions: Mapping[str, str] | None = None,
    laws: Iterable[str] | None = None,
    long: bool = False,
    seen: Callable[[Finding], None] | None = None,
) -> Report:
    """Put an attention through every law that speaks of it.

    Args:
        thing: a mechanism's name or card; a class, or a function that makes a module; a built module; a function of
            queries, keys and values (B, H, T, D); or 'package.module:Thing'. `regard.laws.adapter` says how it is
            called, and in which form masks reach it. `protocol`, `supports`, `traits` and `exceptions` may be
            attributes of it.
        protocol: what it takes and gives, see `regard.kinds`; default TokenMixer, (B, T, M) -> (B, T, M).
        supports: what it claims to be able to do, see `regard.cards.FEATURES`; default what its signatures say.
        traits: which properties it claims, see `regard.cards.TRAITS`; default none.
        dim, heads: M and H of the instances; default 24 and 6.
        options: arguments to build it with.
        inputs: f(shape) -> the positional arguments of `forward`, where the protocol alone does not say them.
        exceptions: law id, or id and name -> why it need not hold.
        laws: ids or names, to look at those alone.
        long: the laws that take many seconds, too: compilation for other lengths and masks, export, a million tokens.
        seen: called with every finding when it is there.

    Raises:
        ValueError, TypeError: it can't be found, built or called; unknown protocols, features, traits and laws.
    """
    asked, findings = chosen(laws, long), []
    with _undisturbed():
        s = subject(
            thing,
            protocol=protocol,
            supports=supports,
            traits=traits,
            dim=dim,
            heads=heads,
            options=options,
            inputs=inputs,
            exceptions=exceptions,
        )
        if long and s.foreign and supports is None:
            s = replace(s, supports=s.supports | {"compile"})
        for law in asked:
            findings.append(look(law, s))
            if seen is not None:
                seen(findings[-1])
    return Report(s.name, tuple(sorted(s.supports)), tuple(sorted(s.traits)), tuple(findings))


def chosen(laws: Iterable[str] | None, long: bool) -> list[Law]:
    """The laws to look at: those named, by id or name, or all, the long ones if they are wanted."""
    if laws is not None:
        named = set(laws)
        if unknown := named - {name for law in LAWS for name in (law.id, law.name)}:
            raise ValueError(f"laws are unknown (got {sorted(unknown)}); expected ids or names of regard.laws.LAWS")
        return [law for law in LAWS if {law.id, law.name} & named]
    return [law for law in LAWS if long or law.weight != "long"]


def look(law: Law, s: Subject) -> Finding:
    """What is found of one law; where it fails, at the smallest sizes at which it still does."""
    start = time.perf_counter()
    s = replace(s, drawn=[])
    if why := law.why_not(s):
        return Finding(law, "does not apply", why)
    error = attempt(law, s)
    if isinstance(error, DoesNotApply):
        return Finding(law, "does not apply", str(error))
    if error is None:
        return Finding(law, "holds", seconds=time.perf_counter() - start)
    if reason := s.reason(law.id, law.name):
        return Finding(law, "excepted", reason, seconds=time.perf_counter() - start)
    smallest, error = shrunk(law, s, error)
    batches, lengths = zip(*smallest.drawn) if smallest.drawn else ((smallest.batch,), (smallest.length,))
    length = getattr(error, "length", None) or max(lengths)
    sizes = {"B": max(batches), "T": length, "M": smallest.dim, "H": smallest.heads}
    return Finding(law, "fails", said(error), sizes, time.perf_counter() - start)


def attempt(law: Law, s: Subject) -> Exception | None:
    """What the law raises, if anything."""
    torch.manual_seed(0)
    try:
        law.check(s)
    except Exception as error:
        return error
    return None


def said(error: Exception) -> str:
    """In one line; an error that is no law's own is named."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return text if isinstance(error, Broken) else f"{type(error).__name__}: {text}"


def shrunk(law: Law, s: Subject, error: Exception) -> tuple[Subject, Exception]:
    """The smallest sizes at which it fails in the same way, found greedily, axis by axis."""
    end = time.perf_counter() + PATIENCE
    for axis in SIZES if s.given is None else ():
        for size in SMALL:
            if size >= getattr(s, axis) or time.perf_counter() > end:
                break
            if axis == "heads" and (s.fixed or s.dim % size):
                continue
            changed: dict[str, Any] = {axis: size, "drawn": []}
            smaller = replace(s, **changed)
            found = attempt(law, smaller)
            if found is not None and type(found) is type(error):
                s, error = smaller, found
                break
    return s, error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """The caller's random numbers and settings are as before."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def suite(thing: object, **claims: Any) -> Callable[..., None]:
    """A test for pytest, one case a law, to be given a name in a test file:

        test_my_attention = regard.laws.suite("mypackage.attention:MyAttention", traits={"position_free"})

    Args:
        thing, claims: as in `check`. Laws that don't apply are no cases.
    """
    import pytest

    long, asked = claims.pop("long", False), claims.pop("laws", None)
    with _undisturbed():
        s = subject(thing, **claims)
        cases = [law for law in chosen(asked, long) if not law.why_not(s)]

    @pytest.mark.parametrize("law", [pytest.param(law, id=f"{law.id}-{law.name}") for law in cases])
    def test(law: Law) -> None:
        with _undisturbed():
            finding = look(law, s)
        if finding.outcome == "does not apply":
            pytest.skip(finding.why)
        if finding.outcome == "excepted":
            pytest.xfail(finding.why)
        if finding.outcome == "fails":
            pytest.fail(f"{s.name} breaks {law}: {finding.text}\n{law.statement}", pytrace=False)

    return test

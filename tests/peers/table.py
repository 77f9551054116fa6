"""What became of the same tests with regard and without: one table, and every test that ends differently."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from xml.etree import ElementTree

WIDTH = 80
WORST = ("passed", "skipped", "failed")


@dataclass(frozen=True)
class Result:
    """How a test ended, and whether regard did some of its work."""

    outcome: str
    through: bool = False


@dataclass(frozen=True)
class Difference:
    """A line of differences.txt: tests that may end worse with regard, and why."""

    suite: str
    test: str
    why: str

    def means(self, suite: str, test: str) -> bool:
        return fnmatchcase(suite, self.suite) and fnmatchcase(test, self.test)


def results(junit: Path) -> dict[str, Result]:
    """By "Class::test" or "module::test"; of tests that report several times, as those with subtests, the worst.

    A file that isn't there, or not whole, holds none: what wrote it has ended early.
    """
    found: dict[str, Result] = {}
    try:
        cases = ElementTree.parse(junit).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return found
    for case in cases:
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        calls = [int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "regard"]
        before = found.get(name, Result("passed"))
        worst = max(outcome, before.outcome, key=WORST.index)
        found[name] = Result(worst, before.through or any(calls))
    return found


def differences(text: str) -> list[Difference]:
    """Lines `suite | test | why`; # begins a comment, and * stands for anything.

    Raises:
        ValueError: a line without a reason.
    """
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            parts = [part.strip() for part in line.split("|", 2)]
            if len(parts) < 3 or not all(parts):
                raise ValueError(f"differences: a line is no `suite | test | why` (got {line!r})")
            found.append(Difference(*parts))
    return found


Runs = Mapping[str, tuple[Mapping[str, Result], Mapping[str, Result]]]
"""By suite, the results with regard and without."""


def report(runs: Runs, known: Sequence[Difference]) -> tuple[str, bool]:
    """The table and what differs, within 80 columns; and whether all is well: every suite has run, and each test that
    passes without regard passes with it, or is named with a reason."""
    lines = [
        f"{'':23}       {'with regard':^21}{'without':^19}",
        f"{'suite':23}{'tests':>6}{'pass':>7}{'fail':>6}{'skip':>6}{'pass':>8}{'fail':>6}{'skip':>6}{'through':>9}",
    ]
    well = True
    for suite, (ours, theirs) in runs.items():
        with_regard, without = ([sum(r.outcome == o for r in side.values()) for o in WORST] for side in (ours, theirs))
        p, s, f = with_regard
        P, S, F = without
        through = sum(r.through for r in ours.values())
        tests = len(ours.keys() | theirs.keys())
        lines.append(f"{suite:23}{tests:6}{p:7}{f:6}{s:6}{P:8}{F:6}{S:6}{through:9}")
        well &= bool(ours) and bool(theirs)
    lines += ["", "through: tests in which regard was called"]
    worse = [(s, t) for s, pair in runs.items() for t in _ends(*pair, better=False)]
    better = [(s, t) for s, pair in runs.items() for t in _ends(*pair, better=True)]
    for entry in known:
        named = [(s, t) for s, t in worse if entry.means(s, t)]
        if named:
            lines += ["", *_wrapped(f"{len(named)} x {entry.test} ({entry.suite}): {entry.why}")]
        elif any(fnmatchcase(suite, entry.suite) for suite in runs):
            lines += ["", *_wrapped(f"named in differences.txt, but ends alike: {entry.test} ({entry.suite})")]
    if better:
        lines += ["", "pass with regard alone:", *(f"  {s} {t}" for s, t in better)]
    unnamed = [(s, t) for s, t in worse if not any(entry.means(s, t) for entry in known)]
    if unnamed:
        lines += ["", "END WORSE WITH REGARD, and differences.txt says no reason:", *(f"  {s} {t}" for s, t in unnamed)]
    for suite, pair in runs.items():
        lines += [f"{suite}: nothing has run {side}" for side, r in zip(("with", "without"), pair) if not r]
    return "\n".join(line[:WIDTH].rstrip() for line in lines), well and not unnamed


def _ends(ours: Mapping[str, Result], theirs: Mapping[str, Result], *, better: bool) -> list[str]:
    """The tests that pass on one side only: with regard, or without."""
    here, there = (ours, theirs) if better else (theirs, ours)
    missing = Result("failed")
    return sorted(
        test for test, r in here.items() if r.outcome == "passed" and there.get(test, missing).outcome != "passed"
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)

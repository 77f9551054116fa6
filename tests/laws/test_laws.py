"""Every law of `regard.laws` over every card: one test a card, and one more for the laws that take their time.

pytest tests/laws --card kerple --law L4        # one law of one card; both options may be repeated
"""

import inspect
import subprocess
import time
from pathlib import Path

import pytest

import regard
from regard.laws import LAWS, Broken, DoesNotApply, Law, Subject, of
from regard.laws.checking import attempt, said


def holds(s: Subject, laws: list[Law], note) -> None:
    """Put it through the laws; all that fail are said at once."""
    failures = []
    for law in laws:
        if law.why_not(s):
            continue
        start, outcome = time.process_time(), "holds"
        error = attempt(law, s)
        if isinstance(error, DoesNotApply):
            continue
        if error is not None:
            outcome = "excepted" if s.reason(law.id, law.name) else "fails"
        if outcome == "fails":
            failures.append((f"{law}: {said(error)}", error))
        note("law", (s.name, law.id, law.name, outcome, round(time.process_time() - start, 4)))
    if failures:
        raise Broken("\n".join(f"{s.name} breaks {text}" for text, _ in failures)) from failures[0][1]


@pytest.mark.parametrize("name", regard.mechanisms())
def test_laws(name: str, laws: list[Law], record_property) -> None:
    holds(of(name), [law for law in laws if law.weight == "light"], record_property)


def first() -> set[str]:
    """The first card of each protocol and family."""
    found: dict[tuple[str, str], str] = {}
    for name in regard.mechanisms():
        found.setdefault((regard.card(name).protocol, regard.card(name).family), name)
    return set(found.values())


def changed() -> set[str]:
    """The cards whose files differ from those of the main branch, or from the last commit; none without git."""
    root = Path(regard.__file__).parent
    for base in ("origin/main...", "HEAD"):
        git = ["git", "-C", str(root), "diff", "--name-only", "--relative", base]
        done = subprocess.run(git, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            files = {(root / line).resolve() for line in done.stdout.splitlines()}
            return {n for n in regard.mechanisms() if Path(inspect.getfile(regard.card(n).builder)).resolve() in files}
    return set()


NOW = first() | changed()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in NOW else pytest.mark.slow) for n in regard.mechanisms()]
)
def test_heavy_laws(name: str, laws: list[Law], record_property) -> None:
    holds(of(name), [law for law in laws if law.weight == "heavy"], record_property)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", regard.mechanisms())
def test_long_laws(name: str, laws: list[Law], record_property) -> None:
    holds(of(name), [law for law in laws if law.weight == "long"], record_property)


def test_every_law_says_what_it_is() -> None:
    assert len({law.name for law in LAWS}) == len(LAWS)
    for law in LAWS:
        assert law.statement, law.name
        assert law.id[0] == "L", law.name
        assert any(not law.why_not(of(name)) for name in regard.mechanisms()), f"{law} is about nothing"

"""What a card claims is shown by a test that exists, and that fails with plain softmax in its place (L57)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from laws import claims
from regard import catalog

CARDS = sorted(catalog.cards())
NOT_TELLING = Path(__file__).parent / "claims_not_telling.txt"
"""Lines "CARD TEST  why": tests that don't fail with plain softmax in the card's place. It may only shrink."""


def not_telling() -> set[tuple[str, str]]:
    lines = (line.split() for line in NOT_TELLING.read_text().splitlines() if not line.startswith("#"))
    return {(words[0], words[1]) for words in lines}


@pytest.mark.parametrize("name", CARDS)
def test_a_claim_names_a_test_and_all_that_it_names_exists(name: str):
    card = regard.card(name)
    assert claims.nodes(card), f"the claim names no test: {card.claim!r}"
    wrong = {named: why for named in claims.nodes(card) + claims.commands(card) if (why := claims.missing(named))}
    assert not wrong


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("tests/laws/test_nothing.py::test_a", "there is no tests/laws/test_nothing.py"),
        ("tests/laws/test_claims.py::test_a", "has no test 'test_a'"),
        ("tests/laws/test_claims.py", "has no test ''"),
        ("python -m benchmarks.nothing", "there is no benchmarks.nothing"),
        ("python examples/nothing.py", "there is no examples/nothing.py"),
        ("regard nothing", "no command 'nothing'"),
        ("make test", "neither a test nor a command"),
    ],
)
def test_what_is_missing_is_told(named: str, why: str):
    assert why in claims.missing(named)


def test_the_list_names_what_cards_name():
    assert not_telling() <= {(name, node) for name in CARDS for node in claims.nodes(regard.card(name))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_claims_fail_with_plain_softmax_in_the_mechanisms_place(tmp_path: Path):
    """All cards in a process of their own, which nothing has been imported into that the switch would miss."""
    paths = os.pathsep.join([str(claims.ROOT / "src"), str(claims.ROOT / "tests"), str(claims.ROOT)])
    command = [sys.executable, "-m", "laws.plain", "--json", str(tmp_path / "verdicts.json")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=claims.ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert verdicts.keys() == set(CARDS)
    silent = {(name, node) for name, found in verdicts.items() for node, verdict in found.items() if verdict != "fails"}
    assert silent - not_telling() == set(), "claims that plain softmax fulfils, too"
    assert not_telling() - silent == set(), "these tell by now; take them from the list"

"""What a card claims is shown by a test that exists (L57)."""

import pytest

import regard
from laws import claims
from regard import catalog

CARDS = sorted(catalog.cards())


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

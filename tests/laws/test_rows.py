"""L48: built as written, through `create`: the committed rows of every card hold (see laws/built.py)."""

import pytest

import regard
from laws import built
from regard.cards import SOURCES, Card
from regard.models.mixer import parse


@pytest.mark.parametrize("name", regard.mechanisms())
def test_rows(name: str) -> None:
    """Defaults, starting values and outputs are the committed ones, and every option has a row that it changes."""
    rows = built.read(built.file(name)).get(name, [])
    anew = f"run `python tools/rows.py {name}`"
    assert rows, f"{name} has no rows: {anew}, and look at what it prints"
    measured = built.shorten(name, [built.measure(parse(row["row"]), row["causal"]) for row in rows])
    wrong = [
        f"{row['row']}, causal={row['causal']}: {what}"
        for row, now in zip(rows, measured, strict=True)
        for what in built.differences(now, row)
    ]
    assert not wrong, "\n".join([f"what {name} builds has changed; if it should, {anew}:", *wrong])
    idle = built.idle(name, rows)
    assert not idle, f"no row of {name} shows what these options do: {idle}; name values in the card's `tries`, {anew}"


def test_no_rows_without_a_card() -> None:
    for path in built.FOLDER.glob("*.json"):
        for name in built.read(path):
            assert name in regard.mechanisms(), f"{name} is gone: run `python tools/rows.py {name}`"
            assert built.file(name) == path


def test_a_difference_is_seen_in_the_fifth_digit() -> None:
    row = {"row": "softmax", "causal": False, "start": ["w 2x2 0.1 1"], "eval": [0.5, 2.0], "train": 0.25}
    assert not built.differences(row | {"eval": [0.50001, 2.0]}, row)
    for key, value in {"start": ["w 2x2 0.1 1.0001"], "eval": [0.5, 2.0001], "train": 0.2501}.items():
        (found,) = built.differences(row | {key: value}, row)
        assert " -> " in found
    assert built.differences(row | {"start": []}, row) == ["w 2x2: 0.1 1 -> none"]


def test_an_option_that_changes_nothing_is_named() -> None:
    """Also one that should change nothing, but does."""
    rows = built.read(built.file("window"))["window"]
    assert not built.idle("window", rows)
    same = [row | {"eval": rows[0]["eval"], "train": rows[0]["train"]} for row in rows]
    assert built.idle("window", same) == ["window"]


def test_defaults_say_where_they_come_from() -> None:
    """All of them, on every card of the catalogue; each source is in use, and no card may name another."""
    options = {
        (name, option): regard.card(name) for name in regard.mechanisms() for option in regard.card(name).options
    }
    silent = [f"{name}: {option}" for (name, option), card in options.items() if option not in card.defaults]
    assert not silent, f"say in Card.defaults where these defaults come from ({', '.join(SOURCES)}): {silent}"
    assert {card.defaults[option].partition(",")[0] for (_, option), card in options.items()} == set(SOURCES)
    papers = regard.card("softmax").papers
    with pytest.raises(
        ValueError, match="from an unknown source 'memory'; expected one of the known: paper, code, ours"
    ):
        Card("wrong", equation="y = x", papers=papers, defaults={"a": "memory"})
    with pytest.raises(ValueError, match="says where the default of an unknown option 'b' comes from"):
        Card("wrong", equation="y = x", papers=papers, defaults={"b": "ours"}).function(lambda x: x)

"""The generated catalogue: it says what the cards say, in order, and is read without torch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard import catalog, index, tasks
from regard.cards import Card, _registry

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("catalogue_tool", ROOT / "tools" / "catalogue.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_catalogue_is_current(tool):
    """Whatever is said on a card, or of a task, stands in the file."""
    old, new = (json.loads(text) for text in (index.FILE.read_text(encoding="utf-8"), tool.text()))
    for part in ("cards", "tasks"):
        was, now = ({entry["name"]: entry for entry in of[part]} for of in (old, new))
        differing = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
        assert not differing, f"{sorted(differing)}: run `python tools/catalogue.py`"
    assert index.FILE.read_text(encoding="utf-8") == tool.text(), "run `python tools/catalogue.py`"


def test_one_line_for_each_card_sorted_by_name():
    lines = [
        line.rstrip(",") for line in index.FILE.read_text(encoding="utf-8").splitlines() if line[:9] == '{"name": '
    ]
    names = [json.loads(line)["name"] for line in lines]
    assert names == [*sorted(catalog.names()), *tasks.names()]


def test_entries_are_the_live_cards_in_their_order():
    assert [entry["name"] for entry in index.entries()] == catalog.names()
    for family in {entry["family"] for entry in index.entries()}:
        assert [entry["name"] for entry in index.entries(family)] == catalog.names(family)
    assert index.find("alibi") == index.data(regard.card("alibi"))
    assert index.find("alibbi") is None
    assert list(index.tasks()) == tasks.names()


def test_an_unknown_family_has_near_ones():
    with pytest.raises(
        ValueError, match=r"family is unknown \(got 'position'\); expected one of .*; did you mean 'positions'"
    ):
        index.entries("position")


def test_cards_of_this_process_are_listed_too():
    card = Card("temporary_live", equation="y = x", papers=regard.card("alibi").papers, gist="Not in the file.")
    card.function(lambda x: x)
    try:
        assert "temporary_live" in [entry["name"] for entry in index.entries()]
        assert index.find("temporary_live") is None
    finally:
        _registry.pop("temporary_live", None)


def test_what_json_lacks_is_written_as_python_writes_it():
    assert [index.literal(value) for value in (1, 0.5, True, None, "a")] == [1, 0.5, True, None, "a"]
    assert [index.literal(value) for value in ((1, 2), float("inf"))] == ["(1, 2)", "inf"]


def test_where_a_mechanism_stands_can_be_imported():
    for entry in index.entries():
        module, _, name = entry["where"].rpartition(".")
        assert regard.card(entry["name"]).builder.__module__ == module, name


CODE = """
import sys
import regard
loaded = set(sys.modules)
from regard import cost, index
names = [entry["name"] for entry in index.entries()]
assert len(names) > 50 and index.tasks() and cost.evaluate("2*T", {"T": 3}) == 6
for name in ("torch", "numpy", "jaxtyping", "einops", "rich", "typer"):
    assert name not in sys.modules, name
assert not {name for name in loaded if name.startswith("regard.")}, "import regard loads nothing of it"
"""


def test_import_and_index_need_no_torch():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_catalogue_is_in_the_package():
    """Everything below src/regard goes into the wheel, unless git ignores it."""
    assert index.FILE.parent == Path(regard.__file__).parent
    ignored = subprocess.run(["git", "check-ignore", "-q", str(index.FILE)], cwd=ROOT, check=False).returncode
    assert ignored != 0, "git ignores it, so the wheel would lack it"

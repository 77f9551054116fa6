"""Every file of golden numbers says which code made it, at which commit and with which edits (L58)."""

import hashlib
import json
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.glob("vectors/*.npz"))
MADE = json.loads((TESTS / "vectors/made_by.json").read_text())
"""File -> who made it, as a list of {code, version, ran, edits}; its inputs; who reads it; its hash.

"unknown" stands where nobody wrote it down: a guess would be worse.
"""
COMMIT_OR_VERSION = re.compile(r"[0-9a-f]{7,40}|\d+(\.\d+)+|unknown")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every test file's text."""
    return {str(path.relative_to(TESTS)): path.read_text() for path in TESTS.rglob("test_*.py")}


def test_every_file_has_an_entry_and_every_entry_a_file():
    assert MADE.keys() == {path.stem for path in FILES}
    assert {path.suffix for path in TESTS.glob("vectors/*")} == {".npz", ".json"}, "a file of another kind has no entry"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_who_made_it(path: Path):
    entry = MADE[path.stem]
    assert entry.keys() == {"made_by", "inputs", "read_by", "sha256"}
    assert entry["inputs"]
    assert entry["made_by"]
    for maker in entry["made_by"]:
        assert maker.keys() == {"code", "version", "ran", "edits"}
        assert all(maker.values())
        assert COMMIT_OR_VERSION.fullmatch(maker["version"]), maker["version"]
        if maker["code"].startswith("github.com/"):
            assert re.fullmatch(r"github\.com/[\w.-]+/[\w.-]+", maker["code"]), maker["code"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_the_file_of_its_entry_and_is_read(path: Path, texts: dict[str, str]):
    entry = MADE[path.stem]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"], "other numbers: say who made them"
    named = re.compile(rf"""["'/]{path.stem}(\.npz)?["']""")
    readers = {name for name, text in texts.items() if named.search(text)}
    assert readers == set(entry["read_by"]) != set()

"""What a card's claim names: the tests and commands that show it."""

import ast
import re
from functools import cache
from pathlib import Path

import regard
from regard.cli import COMMANDS

ROOT = Path(__file__).parents[2]
NODE = re.compile(r"tests/[\w/]+\.py(?:::\w+)?")
COMMAND = re.compile(r"`([^`]+)`")


def nodes(card: regard.Card) -> list[str]:
    """The tests that it names, as pytest's node ids."""
    return NODE.findall(card.claim)


def commands(card: regard.Card) -> list[str]:
    """The commands that it names."""
    return COMMAND.findall(card.claim)


@cache
def tests_of(path: Path) -> frozenset[str]:
    """The functions of a file that pytest runs."""
    found = ast.walk(ast.parse(path.read_text()))
    return frozenset(f.name for f in found if isinstance(f, ast.FunctionDef) and f.name.startswith("test_"))


def missing(name: str) -> str:
    """What is wrong with the node id or command of that name; "" if it exists."""
    if name.startswith("tests/"):
        file, _, test = name.partition("::")
        if not (ROOT / file).is_file():
            return f"there is no {file}"
        return "" if test in tests_of(ROOT / file) else f"{file} has no test {test!r}"
    words = name.split()
    if words[:2] == ["python", "-m"]:
        return "" if (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file() else f"there is no {words[2]}"
    if words[0] == "python":
        return "" if (ROOT / words[1]).is_file() else f"there is no {words[1]}"
    if words[0] == "regard":
        return "" if words[1] in COMMANDS else f"regard has no command {words[1]!r}"
    return "it is neither a test nor a command of this repository"

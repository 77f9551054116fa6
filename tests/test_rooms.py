"""The house: which room may import which, no circles, nothing hidden, and no mechanism known by name elsewhere."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import regard
from regard import catalog
from regard.kernels import KERNELS
from regard.rooms import FAMILIES, ORDER

ROOT = Path(regard.__file__).parent
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in ("__main__.py",) and path.parent != ROOT)
FILES += sorted(path for path in ROOT.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def dotted(path: Path) -> str:
    """'regard.linear.fast' of its file."""
    parts = ("regard", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path, *, everywhere: bool = False) -> Iterator[str]:
    """The modules of regard that this one imports when it is itself imported (or ever, also inside functions)."""

    def walk(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield from ast.walk(node) if everywhere else [node]
            if isinstance(node, ast.If | ast.Try) and not everywhere:
                yield from walk([*node.body, *node.orelse])

    for node in walk(tree(path).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("regard"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "regard":
            assert node.level == 0
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else str(node.module)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_floor() -> None:
    assert {room(dotted(path)) for path in FILES} <= FLOOR.keys()
    assert set(FAMILIES) <= FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: dotted(path).removeprefix("regard."))
def test_imports_point_upwards(path: Path) -> None:
    """From the ground up: a room builds on those before it, and on rooms of its own floor."""
    mine = FLOOR[room(dotted(path))]
    wrong = [name for name in imported(path) if room(name) and FLOOR[room(name)] > mine]
    assert not wrong, f"{dotted(path)} stands on floor {mine} and imports {', '.join(wrong)}"


def test_no_circles() -> None:
    """Between files, counting only what an import runs at once."""
    edges = {dotted(path): set(imported(path)) & NAMES - {dotted(path)} for path in FILES}
    # A package's own files may be imported by its __init__; they must not need it in turn.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle of imports: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("package", ["regard", *sorted(n for n in NAMES if (ROOT / Path(*n.split(".")[1:])).is_dir())])
def test_nothing_hides_a_file(package: str) -> None:
    """What an attribute of a package is called, no file of it is: `regard.linear.performer` is always the file."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        file = importlib.import_module(f"{package}.{info.name}")
        assert getattr(module, info.name) is file, f"{package}.{info.name} hides a file"


def test_lazy_names_are_there() -> None:
    for name in regard.__all__:
        assert getattr(regard, name) is not None
    assert set(regard._FROM) <= set(regard.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = regard.nothing
    assert regard.positions.Kerple(4).num_heads == 4
    assert regard.normalizers.Entmax.__module__ == "regard.normalizers.entmax"
    assert "Kerple" in dir(regard.positions)
    with pytest.raises(AttributeError, match=r"'regard.positions' has no attribute 'Kerpel'"):
        _ = regard.positions.Kerpel


SPEAKING = {"softmax", "score_mod", "efficient"}
"""The baseline, which tasks may name; torch's name for an argument, which those who come from there write; a survey."""


def test_mechanisms_are_named_nowhere_else() -> None:
    """Outside the rooms that hold mechanisms nobody imports a mechanism's file, and nobody writes its name."""
    cards = [catalog.card(name) for name in catalog.names()]
    homes = {card.builder.__module__ for card in cards}
    # Words that mean something else too (a kernel called window, a linear layer, a mask) can't be told from names.
    others = {*SPEAKING, *KERNELS, *regard.masks.__all__}
    names = {card.name for card in cards if "_" in card.name or len(card.name) > 8} - others
    for path in FILES:
        name = dotted(path)
        if name in homes:
            continue
        if room(name) not in FAMILIES or room(name) in ("models", "inspect", "kernels", "masks"):
            known = [n for n in imported(path, everywhere=True) if n in homes and room(n) != room(name)]
            assert not known, f"{name} imports {known}"
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                assert node.value not in names, f"{name}:{node.lineno} names the mechanism {node.value!r}"


def test_a_star_import_brings_what_a_room_defines() -> None:
    names: dict[str, object] = {}
    exec("from regard.normalizers import *", names)
    assert isinstance(names["Entmax"], type)
    assert "opened" not in names


def test_dir_shows_rooms_and_no_machinery() -> None:
    assert {"linear", "vision", "integrations"} <= set(dir(regard))
    assert not {"Any", "find_spec", "import_module", "TYPE_CHECKING"} & set(dir(regard))
    assert inspect.signature(regard.plan).return_annotation is regard.Plan

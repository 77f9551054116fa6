"""One Python file: what its code says, and what it asks for of other files. Nothing runs; its syntax tree is read."""

import ast
import contextlib
import functools
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from regard.spec import parse_stack

TOLD = frozenset(
    {"claim", "cost", "differs", "equation", "example", "exceptions", "gist", "inputs", "papers", "tasks", "traits"}
    | {"tries", "verified"}
)
"""Fields of a Card that are there to be read. No cell depends on them, as it does on all others, presets among them."""
FILE_NAME = re.compile(r"(?!.*\*\*)[\w*][\w*/-]*(\.\w+)+")


@dataclass(frozen=True)
class Source:
    digest: str
    """A hash of the syntax tree, without docstrings, comments and what cards only tell."""
    imports: frozenset[str] = frozenset()
    """Dotted names from the top; 'a.b.*' where all of a.b may be meant."""
    creates: frozenset[str] = frozenset()
    """Mechanisms of the catalogue that it makes by name."""
    files: frozenset[str] = frozenset()
    """What may be the names of files beside it, or patterns of such."""
    defines: frozenset[str] = frozenset()
    """Names that it gives a meaning of its own."""
    hands_on: Mapping[str, frozenset[str]] | None = None
    """Name -> what it may be, for a package's file that does nothing but hand on names; else None."""
    opens: bool = False
    """Whether it hands on whatever the files of its folder define, by `regard.rooms.opened`."""


def state(path: Path) -> tuple[int, int]:
    """What is another when a file has been written to."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def read(path: Path, module: str) -> Source:
    """What is known of the file of this module; read once, unless it is written to."""
    return _read(path, module, state(path))


@functools.cache
def _read(path: Path, module: str, state: tuple[int, int]) -> Source:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError):  # compiled code, or another language: it counts as it is
        return Source(digest(path))
    reader = Reader(module if path.name == "__init__.py" else module.rpartition(".")[0])
    reader.read(tree)
    ours = path.name == "__init__.py" and module.partition(".")[0] == "regard"
    return Source(
        hashlib.sha256(" ".join(reader.said).encode()).hexdigest(),
        frozenset(reader.imports()),
        frozenset(reader.creates),
        frozenset(reader.files),
        frozenset(_defined(tree)),
        _handed_on(tree, reader.names) if ours else None,
        ours and any(isinstance(node, ast.Assign) and _called(node.value) == "opened" for node in tree.body),
    )


def digest(path: Path) -> str:
    """A hash of a file as it is; computed once, unless it is written to."""
    return _digest(path, state(path))


@functools.cache
def _digest(path: Path, state: tuple[int, int]) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Reader:
    """Goes through a syntax tree once, and keeps what the code says and what it asks for."""

    package: str
    """What relative imports start from."""
    said: list[str] = field(default_factory=list)
    creates: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Name in this file -> the dotted names that it is imported as, which may differ between functions."""
    _asked: set[str] = field(default_factory=set)
    """Dotted names that are asked for, whatever is done with them."""
    _used: set[tuple[str, ...]] = field(default_factory=set)
    """Names with the attributes that are asked of them, such as ('masks', 'causal'); ('masks', '*') for all."""
    _within: set[ast.AST] = field(default_factory=set)
    """Parts of what is noted there: `masks` and `masks.causal` of `masks.causal.size`."""

    def imports(self) -> set[str]:
        """All dotted names that are asked for, but those of the standard library and of torch."""
        found = self._asked.union(*self.names.values())
        for name, *attributes in self._used:
            found |= {".".join([dotted, *attributes]) for dotted in self.names.get(name, ())}
        return {dotted for dotted in found if dotted.partition(".")[0] not in {"torch", *sys.stdlib_module_names}}

    def read(self, node: ast.AST) -> None:
        """Note the node and all under it."""
        if _says_nothing(node):
            if isinstance(node, ast.If) and node.orelse:  # what runs where types are not checked
                self.said.append("TYPE_CHECKING")
                for part in node.orelse:
                    self.read(part)
            return
        if (note := self._notes.get(type(node))) is not None:
            note(self, node)
        self.said.append(type(node).__name__)
        for name, value in _fields(node):
            if value is None or value == [] or name == "ctx":
                continue  # empty fields say nothing, and versions of Python differ in them
            self.said.append(name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    self.read(part)
                else:
                    self.said.append(repr(part))
        self.said.append(";")

    def _note_import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._asked.add(alias.name)
            top = alias.name.partition(".")[0]
            self.names[alias.asname or top].add(alias.name if alias.asname else top)

    def _note_import_from(self, node: ast.ImportFrom) -> None:
        base = self._absolute("." * node.level + (node.module or ""))
        self._asked |= {f"{base}.*" for alias in node.names if alias.name == "*"}
        for alias in node.names:
            self.names[alias.asname or alias.name].add(f"{base}.{alias.name}")

    def _note_call(self, node: ast.Call) -> None:
        named = [k.value for k in node.keywords if k.arg == "name"]
        match [*node.args[:1], *named]:
            case [ast.Constant(str(text)), *_] if _called(node) in ("import_module", "__import__"):
                self._asked.add(self._absolute(text))
            case [ast.Constant(str(text)), *_] if _called(node) in ("create", "layers"):
                with contextlib.suppress(ValueError):  # else no mechanism's name
                    self.creates |= set(parse_stack(text).names)

    def _note_use(self, node: ast.expr) -> None:
        if node in self._within:
            return
        attributes: list[str] = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
            self._within.add(node)
        if isinstance(node, ast.Name):
            self._used.add((node.id, *(attributes or ["*"])))

    def _note_text(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and FILE_NAME.fullmatch(node.value):
            self.files.add(node.value)

    def _absolute(self, name: str) -> str:
        """'..masks.algebra', as seen from the package."""
        rest = name.lstrip(".")
        level = len(name) - len(rest)
        if not level:
            return name
        parts = self.package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *filter(None, [rest])])

    _notes: ClassVar[Mapping[type[ast.AST], Callable[..., None]]] = {
        ast.Import: _note_import,
        ast.ImportFrom: _note_import_from,
        ast.Call: _note_call,
        ast.Attribute: _note_use,
        ast.Name: _note_use,
        ast.Constant: _note_text,
    }


def _says_nothing(node: ast.AST) -> bool:
    """Whether a node is a docstring, of whatever stands above it, or there for type checkers alone."""
    match node:
        case ast.Expr(ast.Constant(str())) | ast.If(ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            return True
    return False


def _fields(node: ast.AST) -> Iterable[tuple[str, Any]]:
    """What a node is made of; a card, or a variant of one, without what is there to be read."""
    if isinstance(node, ast.Call) and (_called(node) == "Card" or _is_variant(node)):
        return [
            ("func", node.func),
            ("args", node.args[:1]),
            ("keywords", [k for k in node.keywords if k.arg not in TOLD]),
        ]
    return ast.iter_fields(node)


def _is_variant(node: ast.Call) -> bool:
    """Whether it makes a variant of a card: a method that is told a preset."""
    return (
        isinstance(node.func, ast.Attribute)
        and node.func.attr == "variant"
        and any(keyword.arg == "preset" for keyword in node.keywords)
    )


def _called(node: ast.AST) -> str:
    """The last word of what a call calls; '' for what is no call."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", ""))
    return ""


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        match node:
            case (
                ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name) | ast.AnnAssign(ast.Name(name))
            ):
                yield name
            case ast.Assign(targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def _handed_on(tree: ast.Module, imported: Mapping[str, set[str]]) -> dict[str, frozenset[str]] | None:
    """What the names of a package's file may be; None where the file does more than hand them on."""
    lazily: dict[str, set[str]] = {}
    for node in tree.body:
        match node:
            case ast.Expr(ast.Constant(str())) | ast.Import() | ast.ImportFrom() | ast.If(ast.Name("TYPE_CHECKING")):
                pass
            case ast.FunctionDef("__getattr__" | "__dir__") | ast.Assign([ast.Name("__all__" | "__version__")]):
                pass
            case ast.Assign([ast.Name("_FROM")], mapping):
                lazily = {name: {f"{module}.{name}"} for name, module in ast.literal_eval(mapping).items()}
            case ast.Assign(value=call) if _called(call) == "opened":
                pass
            case _:
                return None
    return {name: frozenset(dotted) for name, dotted in {**imported, **lazily}.items()}

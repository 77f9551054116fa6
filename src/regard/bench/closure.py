"""Which code decides what a cell finds, and a hash of what that code says.

Imports are followed through the syntax trees: those at the head of a file and inside functions, relative ones, and
`import_module` of a name that is written out. What a package of regard only hands on, by importing it, by the map
`_FROM` or by `regard.rooms.opened`, is looked up name by name: what else it could hand on decides nothing. Files that
stand beside a module and are named in it, such as C++ sources, count as they are.

Names that are put together while the code runs are not followed. This is how the walk stops at `regard.catalog`, which
imports every mechanism there is, room by room, to find the one that is asked for; whoever asks for a closure names
that one's module. Nor are the standard library and installed packages followed; torch's version is a setting of a cell.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import chain
from pathlib import Path

from regard.bench.source import Source, digest, read

SILENT = frozenset({"regard.rooms"})
"""What only says where code stands: a new room changes no mechanism."""

ModuleOf = Callable[[str], str | None]
"""The module that holds a mechanism of the catalogue, by the mechanism's name."""


class Closures:
    """The code that is found in some folders, as it stands when this is made: make it anew for another look.

    Args:
        folders: default those of `sys.path`.
        packages: those that are followed even where they are installed.
        module_of: for code that makes mechanisms by name.
    """

    def __init__(
        self,
        folders: Sequence[str | Path] | None = None,
        *,
        packages: Iterable[str] = ("regard",),
        module_of: ModuleOf = lambda name: None,
    ) -> None:
        self._folders = [Path(folder) for folder in (sys.path if folders is None else folders)]
        self._packages, self._module_of = frozenset(packages), module_of
        self._places: dict[str, Path | None] = {}
        self._found: dict[str, Path | None] = {}
        self._needed: dict[str, frozenset[str]] = {}
        self._said: dict[str, dict[str, str]] = {}

    def digest(self, modules: Iterable[str]) -> str:
        """One hash of all the code that these modules need, their own included."""
        said = hashlib.sha256()
        for name, content in sorted(self.closure(modules).items()):
            said.update(f"{name}\0{content}\0".encode())
        return said.hexdigest()

    def closure(self, modules: Iterable[str]) -> dict[str, str]:
        """Every module and file that these modules need, their own included -> a hash of what it says.

        Raises ValueError for a module whose file is not found.
        """
        left = list(modules)
        seen: set[str] = set()
        found: dict[str, str] = {}
        for module in left:
            if self.find(module) is None:
                raise ValueError(f"the source of {module} is not found, so that its edits would go unnoticed")
        while left:
            module = left.pop()
            if module not in seen:
                seen.add(module)
                found |= self._content(module)
                left += self.needs(module)
        return found

    def needs(self, module: str) -> frozenset[str]:
        """The modules that this one imports, and the packages that it stands in."""
        if module not in self._needed:
            source, parts = self._source(module), module.split(".")
            found = {".".join(parts[:n]) for n in range(1, len(parts)) if self._decides(".".join(parts[:n]))}
            found |= {name for dotted in source.imports for name in self._meant(dotted)}
            found |= {made for name in source.creates if (made := self._module_of(name)) is not None}
            self._needed[module] = frozenset(found - SILENT)
        return self._needed[module]

    def find(self, module: str) -> Path | None:
        """The file of a module; None for one that is not there, or is not followed."""
        if module not in self._found:
            self._found[module] = self._look_for(module)
        return self._found[module]

    def _look_for(self, module: str) -> Path | None:
        top, *inner = module.split(".")
        folder = self._folder(top)
        if folder is None or (top not in self._packages and {"site-packages", "dist-packages"} & set(folder.parts)):
            return None
        place = folder.joinpath(top, *inner)
        return next((file for file in _files(place) if file.is_file()), None)

    def _folder(self, top: str) -> Path | None:
        """Where Python finds a name: a folder without `__init__.py` stands behind all that have one."""
        if top in self._places:
            return self._places[top]
        whole = (folder for folder in self._folders if any(file.is_file() for file in _files(folder / top)))
        spaces = (folder for folder in self._folders if (folder / top).is_dir())
        self._places[top] = next(chain(whole, spaces, _loaded_from(top)), None)
        return self._places[top]

    def _file(self, module: str) -> Path:
        path = self.find(module)
        assert path is not None, f"{module} was found before"
        return path

    def _source(self, module: str) -> Source:
        return read(self._file(module), module)

    def _content(self, module: str) -> dict[str, str]:
        """The module and the files that it names -> a hash of each."""
        if module not in self._said:
            beside = {f"{module}/{file.name}": digest(file) for file in self._beside(module)}
            self._said[module] = {module: self._source(module).digest, **beside}
        return self._said[module]

    def _beside(self, module: str) -> Iterator[Path]:
        for name in self._source(module).files:
            yield from (file for file in self._file(module).parent.glob(name) if file.is_file())

    def _decides(self, package: str) -> bool:
        """Whether a package's own file does more than hand on names."""
        return self.find(package) is not None and self._source(package).hands_on is None

    def _meant(self, dotted: str) -> set[str]:
        """The modules that decide what a dotted name is."""
        parts = dotted.split(".")
        heads = (n for n in range(1, len(parts) + 1) if self.find(".".join(parts[:n])) is not None)
        n = next(heads, 0)
        return self._within(".".join(parts[:n]), parts[n:]) if n else set()

    def _within(self, module: str, rest: list[str]) -> set[str]:
        """The modules that decide what a name within this module is."""
        source, inner = self._source(module), ".".join([module, *rest[:1]])
        if source.hands_on is None:
            return {module} | (self._within(inner, rest[1:]) if rest and self.find(inner) else set())
        if not rest:
            return set()  # nothing of it is used
        if rest == ["*"]:
            return set().union(*(self._within(child, ["*"]) for child in self._children(module)))
        if self.find(inner) is not None:
            return self._within(inner, rest[1:])
        if rest[0] in source.hands_on:
            return set().union(*(self._meant(".".join([name, *rest[1:]])) for name in source.hands_on[rest[0]]))
        if source.opens:
            return {child for child in self._children(module) if rest[0] in self._source(child).defines}
        return {module}

    def _children(self, package: str) -> list[str]:
        names = {path.stem for path in self._file(package).parent.iterdir() if not path.name.startswith(("_", "."))}
        return [child for name in sorted(names) if self.find(child := f"{package}.{name}") is not None]


def _loaded_from(top: str) -> Iterator[Path]:
    """The folder of what was found in another way than by the path, as an editable install may be."""
    path = getattr(sys.modules.get(top), "__file__", None)
    if path is None and top not in sys.modules and (spec := importlib.util.find_spec(top)) and spec.has_location:
        path = spec.origin
    if path:
        yield Path(path).parents[1 if Path(path).name == "__init__.py" else 0]


def _files(place: Path) -> list[Path]:
    """What Python looks for, in its order."""
    compiled = [place.with_name(place.name + suffix) for suffix in EXTENSION_SUFFIXES]
    return [place / "__init__.py", *compiled, place.with_name(f"{place.name}.py")]

"""Which edits make a stored cell stale: those of code that decides it, wherever that stands, and no others."""

import importlib
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest

import regard
from regard import catalog, tasks
from regard.bench import cells, source
from regard.bench.closure import Closures
from regard.bench.record import Cell
from regard.bench.train import train
from regard.models.mixer import parse
from regard.tasks.text import NextByte, Text

TASKS = {
    "text": NextByte(text=Text("test", b"x", b"y")),
    "mqar": tasks.make("mqar"),
    "nodes": tasks.make("nodes"),
}
CELLS = {
    "softmax": "mqar",
    "performer": "mqar",
    "kerple": "text",
    "gated+rotary": "mqar",
    "gatv2": "nodes",
    "mine.mixer:Mixer": "mqar",
}
EVERY = set(CELLS)
MINE = {
    "mine/__init__.py": "",
    "mine/mixer.py": '''
"""A mixer of the caller's own, with a mechanism of the catalogue inside it."""
import regard
from torch import nn
from . import parts

class Mixer(nn.Module):
    def __init__(self, *, dim, num_heads, causal):
        super().__init__()
        self.inner = regard.create("alibi", dim=dim, num_heads=num_heads, causal=causal)

    def forward(self, x):
        from helper import scale  # stands beside the package

        return scale(parts.half(self.inner(x)))
''',
    "mine/parts.py": "SOURCES = ('half.cpp',)\n\ndef half(x):\n    return x / 2\n",
    "mine/half.cpp": "float half(float x) { return x / 2; }\n",
    "mine/unused.py": "",
    "helper.py": "def scale(x):\n    return 2 * x\n",
}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """regard's sources and a module of the caller's own, to edit."""
    folder = written(tmp_path_factory.mktemp("sources"), MINE)
    shutil.copytree(Path(regard.__file__).parent, folder / "regard", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    closures = Closures([folder], packages=("regard", "mine"), module_of=cells.module_of)
    return {name: closures.digest(cells.deciding(TASKS[task], parse(name))) for name, task in CELLS.items()}


def stale(folder: Path, file: str, old: str, new: str) -> set[str]:
    """The cells that this edit makes stale; it is taken back afterwards. Without `old`, `new` goes to the end."""
    before, path = hashes(folder), folder / file
    kept = path.read_text() if path.exists() else None
    text = kept or ""
    assert old in text, f"{file} has no {old!r} any more: choose another edit"
    path.write_text(text.replace(old, new, 1) if old else text + new)
    try:
        after = hashes(folder)
    finally:
        path.unlink() if kept is None else path.write_text(kept)
    assert hashes(folder) == before
    return {name for name in CELLS if before[name] != after[name]}


# --- what says nothing

KERPLE = "regard/positions/kerple.py"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (KERPLE, '"""', '"""Other words: '),
        (KERPLE, "", "\n# a comment\n"),
        (KERPLE, "\n", "\n\n\n"),
        (KERPLE, 'claim="', 'claim="Other words: '),
        (KERPLE, 'equation="', 'equation="other = '),
        (KERPLE, 'tasks=("text",)', "tasks=()"),
        ("regard/heads/gated.py", '"Gated attention with one', '"Another gist: gated attention with one'),
        ("regard/bench/train.py", '    """Train and measure', '    """Other words'),
        ("mine/mixer.py", "# stands beside the package", "# elsewhere"),
    ],
)
def test_words_make_nothing_stale(copy: Path, file: str, old: str, new: str) -> None:
    assert stale(copy, file, old, new) == set()


# --- what decides

ON_MQAR = {name for name, task in CELLS.items() if task == "mqar"}
TOKENS = EVERY - {"kerple"}
"""Those whose host is `models/tokens.py`."""

CODE = "\n\ndef new(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        # mechanisms: one's own file, what it imports, and the baseline's, which gives all others their size
        (KERPLE, {"kerple"}),
        ("regard/positions/rotary.py", {"gated+rotary"}),
        ("regard/heads/gated.py", {"gated+rotary"}),
        ("regard/linear/performer.py", {"performer"}),
        ("regard/graph/gatv2.py", {"gatv2"}),
        ("regard/heads/multi_head.py", EVERY - {"gatv2"}),
        ("regard/positions/_shared.py", {"kerple", "gated+rotary", "mine.mixer:Mixer"}),
        ("regard/graph/_edges.py", {"gatv2"}),
        ("regard/pipeline/head_mixer.py", {"performer"}),
        # other mechanisms
        ("regard/positions/cope.py", set()),
        ("regard/linear/lightning.py", set()),
        ("regard/graph/exphormer.py", set()),
        ("regard/positions/brand_new.py", set()),
        # tasks
        ("regard/tasks/mqar.py", ON_MQAR),
        ("regard/tasks/_labelled.py", ON_MQAR),
        ("regard/tasks/text.py", {"kerple"}),
        ("regard/tasks/nodes.py", {"gatv2"}),
        ("regard/tasks/copying.py", set()),
        ("regard/tasks/__init__.py", EVERY),
        # hosts
        ("regard/models/lm.py", EVERY),
        ("regard/models/mixer.py", EVERY),
        ("regard/models/tokens.py", TOKENS),
        ("regard/models/detector.py", set()),
        # the trainer
        ("regard/bench/worker.py", EVERY),
        ("regard/bench/train.py", EVERY),
        ("regard/bench/match.py", EVERY),
        ("regard/bench/auxiliary.py", EVERY),
        # what builds and runs: through the package's map of lazy names, and imports inside functions
        ("regard/catalog.py", EVERY),
        ("regard/pipeline/layer.py", EVERY),
        ("regard/kernels/plan.py", EVERY),
        ("regard/kernels/sdpa.py", EVERY),
        ("regard/kernels/linear_scan.py", {"performer"}),
        ("regard/kernels/triton_scan.py", {"performer"}),
        ("regard/kernels/_triton_scan.py", {"performer"}),
        # what shows, stores and describes
        ("regard/rooms.py", set()),
        ("regard/doctor.py", set()),
        ("regard/cli/list.py", set()),
        ("regard/bench/compare.py", set()),
        ("regard/bench/config.py", set()),
        ("regard/bench/live.py", set()),
        ("regard/bench/store.py", set()),
        ("regard/bench/fitting.py", set()),
        ("regard/bench/report/page.py", set()),
        ("regard/bench/profile.py", set()),
        ("regard/inspect/trace.py", set()),
        # the caller's own, and a mechanism of the catalogue that it makes by name
        ("mine/mixer.py", {"mine.mixer:Mixer"}),
        ("mine/__init__.py", {"mine.mixer:Mixer"}),
        ("mine/parts.py", {"mine.mixer:Mixer"}),
        ("helper.py", {"mine.mixer:Mixer"}),
        ("regard/positions/alibi.py", {"mine.mixer:Mixer"}),
        ("mine/unused.py", set()),
    ],
)
def test_new_code_makes_stale_what_it_decides(copy: Path, file: str, expected: set[str]) -> None:
    assert stale(copy, file, "", CODE) == expected


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("regard/kernels/native/attention.cpp", "", "\n// any byte counts\n", EVERY),
        ("regard/kernels/native/simd.h", "", "\n", EVERY),
        ("regard/kernels/rates.json", "", "\n", EVERY),
        ("mine/half.cpp", "x / 2", "x / 3", {"mine.mixer:Mixer"}),
        ("regard/heads/gated.py", 'preset={"granularity": "headwise"}', "preset={}", {"gated+rotary"}),
        ("regard/__init__.py", '"Attention": ', '"doctor": "regard.doctor",\n    "Attention": ', set()),
        ("regard/__init__.py", '__version__ = "', '__version__ = "1', set()),
        (KERPLE, "    claim=", '    supports={"causal"},\n    claim=', {"kerple"}),
        (KERPLE, "    claim=", '    auxiliary="loss",\n    claim=', {"kerple"}),
    ],
)
def test_edits_of_other_kinds(copy: Path, file: str, old: str, new: str, expected: set[str]) -> None:
    assert stale(copy, file, old, new) == expected


def test_the_command_line_decides_nothing(copy: Path) -> None:
    files = [*copy.glob("regard/cli.py"), *copy.glob("regard/cli/*.py")]
    assert files
    assert all(stale(copy, str(file.relative_to(copy)), "", CODE) == set() for file in files)


def test_an_import_inside_a_function_is_followed(copy: Path) -> None:
    other = "regard/heads/dcmha.py"
    assert stale(copy, other, "", CODE) == set()
    path = copy / KERPLE
    text = path.read_text()
    path.write_text(text + "\n\ndef late():\n    import regard\n\n    return regard.heads.dcmha.ComposeHeads\n")
    assert stale(copy, other, "", CODE) == {"kerple"}
    path.write_text(text)


@pytest.mark.parametrize(
    ("mechanism", "task"),
    [
        ("performer", "mqar"),
        ("gated+rotary", "mqar"),
        ("neighborhood", "digits"),
        ("gatv2", "nodes"),
        ("deformable", "boxes"),
    ],
)
def test_no_code_runs_that_is_not_in_the_closure(mechanism: str, task: str) -> None:
    """The other way round: what a cell calls while it is built, trained and measured."""
    if task in ("digits", "boxes"):
        pytest.importorskip("sklearn" if task == "digits" else "scipy")
    package, ran, made = (
        Path(regard.__file__).parent,
        set(),
        tasks.make(task, {"heldout": 0.02 if task == "digits" else 2}),
    )
    budget = {"steps": 1, "batch": 2, "dim": 24, "depth": 1, "heads": 2, "lr": 1e-3, "match": "params", "device": "cpu"}

    catalog.cards()  # what runs while files are read decides nothing

    def note(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            ran.add(Path(frame.f_code.co_filename))

    sys.setprofile(note)
    try:
        train(Cell(task, mechanism, 0, {**made.settings(), **budget}), made)
    finally:
        sys.setprofile(None)
    inside = (path.relative_to(package.parent).with_suffix("") for path in ran if package in path.parents)
    called = {".".join(path.parts).removesuffix(".__init__") for path in inside} - {"regard"}
    assert len(called) > 12
    assert called <= Closures(module_of=cells.module_of).closure(cells.deciding(made, parse(mechanism))).keys()


def test_options_are_in_the_cells_and_not_in_their_code() -> None:
    plain, other = cells.codes(TASKS["mqar"], ["window", "window(window=8)"]).values()
    assert plain == other


def test_a_file_is_read_once_in_a_process() -> None:
    names = regard.mechanisms()
    first = cells.codes(TASKS["mqar"], names)
    read = source._read.cache_info().misses
    assert cells.codes(TASKS["mqar"], names) == first
    assert source._read.cache_info().misses == read


# --- how names are followed, in a package of a few lines

SMALL = {
    "regard/__init__.py": '_FROM = {"make": "regard.build"}\n\ndef __getattr__(name):\n    ...\n',
    "regard/rooms.py": "def opened(room): ...\n",
    "regard/build.py": "def make(): ...\n",
    "regard/open/__init__.py": "from regard.rooms import opened\n\n__getattr__, __dir__ = opened(__name__)\n",
    "regard/open/first.py": "def one(): ...\n",
    "regard/open/second.py": "TWO = 2\n",
    "regard/listed/__init__.py": "from regard.listed.first import one\nfrom .second import two as zwei\n",
    "regard/listed/first.py": "def one(): ...\n",
    "regard/listed/second.py": "def two(): ...\n",
    "regard/full/__init__.py": "VALUE = 1\n",
    "regard/full/part.py": "def part(): ...\n",
    "regard/full/deep/__init__.py": "",
    "regard/full/deep/inner.py": "from ...build import make\nfrom .. import VALUE\n",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import regard\nregard.make()", {"build"}),
        ("from regard import make", {"build"}),
        ("import regard", set()),
        ("import regard.open\nregard.open.one()", {"open.first"}),
        ("from regard import open as o\nx = o.TWO", {"open.second"}),
        ("from regard.open import TWO", {"open.second"}),
        ("from regard.open import first", {"open.first"}),
        ("from regard import open as o\ngetattr(o, name)", {"open.first", "open.second"}),
        ("from regard.open import *", {"open.first", "open.second"}),
        ("from regard.listed import one", {"listed.first"}),
        ("from regard.listed import zwei", {"listed.second"}),
        ("import regard.listed.second", {"listed.second"}),
        ("from regard import full\nfull.part.part()", {"full", "full.part"}),
        ("import regard.full.part", {"full", "full.part"}),
        ("import regard.full.deep.inner", {"full", "full.deep.inner", "build"}),
        ("def f():\n    from regard.open.first import one", {"open.first"}),
        ("from importlib import import_module\nimport_module('regard.build')", {"build"}),
        ("import importlib\nimportlib.import_module('regard.build')", {"build"}),
        ("import importlib\nimportlib.import_module(f'regard.{name}')", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from regard.build import make", set()),
        ("def f():\n    from regard.open import first as m\n\ndef g():\n    from regard.open import second as m",
         {"open.first", "open.second"}),
        ("import json, torch, numpy", set()),
        ("import space.inner", {"space.inner"}),
        ("def f(:", set()),
    ],
)  # fmt: skip
def test_names_are_followed_to_what_they_are(tmp_path: Path, text: str, expected: set[str]) -> None:
    written(tmp_path, {**SMALL, "own.py": text, "space/inner.py": "", "numpy/readme.txt": ""})
    found = set(Closures([tmp_path], packages=("regard", "own")).closure(["own"])) - {"own"}
    assert {name.removeprefix("regard.") for name in found} == expected


def test_installed_packages_are_followed_only_where_they_are_asked_for(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    written(tmp_path, {"own.py": "import package", "data/package/words.txt": ""})
    written(installed, {"package/__init__.py": "from package.inner import x", "package/inner.py": "x = 1"})
    folders = [tmp_path / "data", tmp_path, installed]
    assert set(Closures(folders, packages=("own",)).closure(["own"])) == {"own"}
    asked = Closures(folders, packages=("package",)).closure(["package.inner"])
    assert set(asked) == {"package", "package.inner"}


@pytest.mark.parametrize("suffix", EXTENSION_SUFFIXES)
def test_compiled_code_counts_as_it_is(tmp_path: Path, suffix: str) -> None:
    """Within a package or not, and before a source of the same name, which Python passes over."""
    texts = {"own/__init__.py": "from own import fast\nimport alone", "own/fast.py": ""}
    written(tmp_path, {**texts, f"own/fast{suffix}": "\0 machine code", f"alone{suffix}": "\0"})
    closures = Closures([tmp_path], packages=("own",))
    assert set(closures.closure(["own"])) == {"own", "own.fast", "alone"}
    seen = {closures.digest(["own"])}
    for file in (f"own/fast{suffix}", f"alone{suffix}"):
        written(tmp_path, {file: "\0 other machine code"})
        seen.add(Closures([tmp_path], packages=("own",)).digest(["own"]))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("if TYPE_CHECKING:\n    import a\nelse:\n    x = 1", "x = 1", "x = 2"),
        ("def variant(a, cost):\n    ...\nvariant(1, cost=2)", "cost=2", "cost=3"),
        ("import a\na.variant(1, 2)", "1, 2", "1, 3"),
    ],
)
def test_what_looks_like_words_may_be_code(tmp_path: Path, text: str, old: str, new: str) -> None:
    written(tmp_path, {"own.py": text})
    before = Closures([tmp_path]).digest(["own"])
    written(tmp_path, {"own.py": text.replace(old, new)})
    assert Closures([tmp_path]).digest(["own"]) != before


@pytest.mark.parametrize(
    "text",
    [
        "if TYPE_CHECKING:\n    pass\nelse:\n    import helper",
        "import importlib\nimportlib.import_module(name='helper')",
    ],
)
def test_imports_in_other_words_are_followed(tmp_path: Path, text: str) -> None:
    written(tmp_path, {"own.py": text, "helper.py": ""})
    assert set(Closures([tmp_path]).closure(["own"])) == {"own", "helper"}


def test_what_was_loaded_from_elsewhere_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {"hooked/__init__.py": "", "hooked/late.py": ""})
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("hooked")
    monkeypatch.setitem(sys.modules, "hooked", sys.modules["hooked"])
    assert set(Closures([], packages=("hooked",)).closure(["hooked.late"])) == {"hooked", "hooked.late"}


def test_a_module_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the source of nowhere is not found"):
        Closures([tmp_path]).closure(["nowhere"])


def test_the_same_code_elsewhere_is_the_same(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy, tmp_path / "moved")
    os.utime(tmp_path / "moved" / "helper.py")
    assert hashes(tmp_path / "moved") == hashes(copy)

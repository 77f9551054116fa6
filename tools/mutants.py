"""Mutants: small faults planted into mechanisms, to count how many the laws notice.

    python tools/mutants.py --seed 1 --count 80             draw 80 mutants, run the laws on each, print who lived
    python tools/mutants.py --seed 1 --count 80 --list      show them without running anything

A mutant is one edit of the file that a card stands in, at a line that runs when the card's rows are measured, so that
it can matter. Its card's rows (L48) are run first, then its light and heavy laws, and with --own-tests the file of
tests of its own; the first that fails has killed it. Everything runs on copies of src/, two at a time.
"""

import argparse
import ast
import difflib
import importlib.util
import inspect
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from rich.console import Console
from rich.progress import track

import regard

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from laws import built
from regard.models.mixer import parse

ROOT = Path(__file__).parent.parent
KINDS = ("formula", "option dropped", "default changed", "starting value", "other variant")
CHECKS = ["whole", "number", "choice", "divides", "refuse", "missing", "checked", "tokens", "fits", "ValueError"]
"""Calls that only look at arguments: what they do to bad ones is tested elsewhere."""
SIZES = [
    "view",
    "reshape",
    "expand",
    "unflatten",
    "flatten",
    "split",
    "new_zeros",
    "new_empty",
    "empty",
    "arange",
    "repeat",
]
"""Calls whose arguments are sizes: a wrong one fails at once, and any test would see it."""
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


def _pairs(words: str) -> dict[str, str]:
    return dict(pair.split() for pair in words.split(", "))


FUNCTIONS = _pairs(
    "sigmoid tanh, tanh sigmoid, relu abs, exp expm1, sum mean, mean sum, sin cos, cos sin, amax amin, amin amax, "
    "softplus relu, silu relu, sqrt square, log log1p, tril triu, minimum maximum, maximum minimum, cumsum cumprod"
)
STARTS = _pairs(
    "zeros ones, ones zeros, zeros_ ones_, ones_ zeros_, zero_ exp_, randn rand, rand randn, eye zeros, "
    "xavier_uniform_ xavier_normal_, xavier_normal_ xavier_uniform_, kaiming_uniform_ xavier_uniform_"
)
DRAWS = ["normal_", "uniform_", "constant_", "fill_", "trunc_normal_", "full", "linspace"]


@dataclass(frozen=True)
class Mutant:
    card: str
    kind: str
    file: Path
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}  {self.card}, {self.kind}"

    def diff(self) -> str:
        lines = difflib.unified_diff(self.file.read_text().splitlines(), self.source.splitlines(), n=0, lineterm="")
        return "\n".join("    " + line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")


# --- where a fault can be planted ---------------------------------------------------------------------------


def executed(name: str, file: Path) -> set[int]:
    """Lines of the file that run while the card's rows are measured."""
    lines: set[int] = set()

    def local(frame, event, _):
        lines.add(frame.f_lineno)
        return local

    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename == str(file) else None)
    try:
        for row in built.read(built.file(name)).get(name, []):
            built.measure(parse(row["row"]), row["causal"])
    finally:
        sys.settrace(None)
    return lines


def mutants(name: str) -> list[Mutant]:
    """Every fault that can be planted into a card."""
    card = regard.card(name)
    file = Path(inspect.getsourcefile(inspect.unwrap(card.builder)) or "")
    text, lines = file.read_text(encoding="utf-8"), executed(name, file)
    found = {}
    for kind, node, new in (*options(card, text), *changes(card, ast.parse(text), lines)):
        source = splice(text, node, new)
        try:
            changed = ast.dump(ast.parse(source)) != ast.dump(ast.parse(text))
        except SyntaxError:
            continue
        if changed:
            found[source] = Mutant(name, kind, file, node.lineno, source)
    return list(found.values())


def splice(text: str, node: ast.AST, new: str) -> str:
    """The text with a node replaced; columns count bytes."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = b"".join(lines)
    return (whole[:start] + new.encode() + whole[end:]).decode()


def options(card: regard.Card, text: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Options whose value the builder ignores, defaults that are other ones, presets likewise."""
    function = next((n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == card.builder.__name__), None)
    if isinstance(function, ast.ClassDef):
        function = next((n for n in function.body if getattr(n, "name", "") == "__init__"), None)
    if isinstance(function, ast.FunctionDef):
        named = {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults)}
        rest = function.args.kwarg.arg if function.args.kwarg else None
        first = function.body[1 if ast.get_docstring(function) else 0]
        given = {"dropout": 0.0, "num_kv_heads": None} if card.is_part or "gqa" in card.supports else {}
        for option, default in {**given, **card.options}.items():
            if option in card.options and built.how(card, option):
                continue
            ignore = f"{option} = {default!r}" if option in named else f"{rest}.pop({option!r}, None)" if rest else ""
            if ignore and (option in named or option in card.options):
                yield "option dropped", first, f"{ignore}; {ast.unparse(first)}"
            if option in card.options and named.get(option) is not None:
                for other in built.choices(card, option) or built.guesses(card, option, default)[:1]:
                    if other != default:
                        yield "default changed", named[option], repr(other)
    for call in ast.walk(ast.parse(text)):
        own = isinstance(call, ast.Call) and call.args and getattr(call.args[0], "value", None) == card.name
        for preset in (k.value for k in call.keywords if k.arg == "preset") if own else ():
            for key, value in zip(preset.keys, preset.values):
                others = built.choices(card, key.value) or built.guesses(card, key.value, card.preset[key.value])[:1]
                yield from (("other variant", value, repr(v)) for v in others if v != card.preset[key.value])


def changes(card: regard.Card, tree: ast.AST, lines: set[int]) -> Iterator[tuple[str, ast.AST, str]]:
    """Faults in the bodies of functions, at lines that run."""
    skipped = {"extra_repr", "step", "init_state", getattr(card.inputs, "__name__", "")}
    how = [option for option in card.options if built.how(card, option)]
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name not in skipped:
            starts = function.name in ("__init__", "reset_parameters")
            for statement in function.body[1:] if ast.get_docstring(function) else function.body:
                for kind, node, new in _within(statement, how):
                    if node.lineno in lines:
                        yield "formula" if kind == "starting value" and not starts else kind, node, new


def _within(node: ast.AST, how: list[str], parent: str = "") -> Iterator[tuple[str, ast.AST, str]]:
    """Faults in a statement or expression; `parent` names the call it is an argument of."""
    call, branch = _called(node), isinstance(node, ast.If | ast.IfExp)
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.FunctionDef) or _checks(node) or call in SIZES:
        return
    if branch and any(f"self.{option}" in ast.unparse(node.test) for option in how):
        return
    if branch and not isinstance(node.test, ast.Compare):
        yield "other variant", node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.Assign | ast.AugAssign) and _again(node):
        yield "other variant", node, "pass"
    if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool):
        yield "other variant", node.value, repr(not node.value.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not isinstance(node.left, ast.List):
        yield "formula", node, f"({ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))})"
        for side in (node.left, node.right):
            if isinstance(side, ast.Constant) and type(side.value) is int:
                yield "formula", side, repr(side.value + 1)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        one = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        yield "formula", node, ast.unparse(one)
    if isinstance(node, ast.Constant) and type(node.value) is float:
        kind = "starting value" if parent in DRAWS else "formula"
        yield kind, node, repr(1.5 * node.value or 0.5)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        for kind, swaps in (("starting value", STARTS), ("formula", FUNCTIONS)):
            if call in swaps:
                owner = f"{ast.unparse(node.func.value)}." if isinstance(node.func, ast.Attribute) else ""
                yield kind, node.func, owner + swaps[call]
        if call in DRAWS and len(node.args) > 1 and not isinstance(node.args[-1], ast.Constant | ast.Starred):
            yield "starting value", node.args[-1], f"1.5 * ({ast.unparse(node.args[-1])})"
        if call == "normal_" and len(node.args) == 1 and not node.keywords:
            yield "starting value", node.args[0], f"{ast.unparse(node.args[0])}, std=1.5"
    for child in ast.iter_child_nodes(node):
        yield from _within(child, how, parent if isinstance(node, ast.keyword) else call or parent)


def _called(node: ast.AST) -> str:
    """The last name of what a call calls."""
    func = node.func if isinstance(node, ast.Call) else None
    return getattr(func, "attr", getattr(func, "id", ""))


def _checks(node: ast.AST) -> bool:
    """Whether a statement only looks at arguments."""
    if isinstance(node, ast.If):
        return _checks(node.body[-1]) and not node.orelse
    name = _called(node.value if isinstance(node, ast.Expr) else node)
    return isinstance(node, ast.Raise) or name in CHECKS or name.startswith("check")


def _again(node: ast.Assign | ast.AugAssign) -> bool:
    """Whether a statement changes what a name already stood for, so that leaving it out still runs."""
    if isinstance(node, ast.AugAssign):
        return True
    names = {ast.unparse(target) for target in node.targets}
    return any(ast.unparse(n) in names for n in ast.walk(node.value) if isinstance(n, ast.Name | ast.Attribute))


def draw(seed: int, count: int) -> list[Mutant]:
    """Mutants of all kinds in turn, few a card, so that `count` of them spread over many cards."""
    dice = random.Random(seed)
    names = dice.sample(regard.mechanisms(), len(regard.mechanisms()))[: max(24, count // 2)]
    pools = {(name, kind): [] for name in names for kind in KINDS}
    for name in names:
        for mutant in dice.sample(found := mutants(name), len(found)):
            pools[name, mutant.kind].append(mutant)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(pools.values()):
        for kind in KINDS:
            used = Counter(mutant.card for mutant in drawn)
            waiting = [name for name in names if pools[name, kind]]
            if waiting and len(drawn) < count:
                drawn.append(pools[min(waiting, key=used.__getitem__), kind].pop())
    return drawn


# --- running them -------------------------------------------------------------------------------------------


class Runner:
    """Copies of src/, one for each process at work; a mutant is written into a free one, run and taken back."""

    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.asked, self.free = asked, SimpleQueue[Path]()
        for n in range(asked.jobs):
            shutil.copytree(ROOT / "src", folder / str(n), ignore=shutil.ignore_patterns("__pycache__"))
            self.free.put(folder / str(n))

    def __call__(self, mutant: Mutant) -> str:
        """Who killed it; '' if nobody did."""
        source = self.free.get()
        file = source / mutant.file.relative_to(ROOT / "src")
        try:
            self._put(file, mutant.source)
            return self.killer(source, mutant.card)
        finally:
            self._put(file, mutant.file.read_text(encoding="utf-8"))
            self.free.put(source)

    @staticmethod
    def _put(file: Path, text: str) -> None:
        file.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)  # as it may be of the same second

    def killer(self, source: Path, card: str) -> str:
        """The first stage whose tests fail, or take too long."""
        stages = {"rows": [f"test_rows.py::test_rows[{card}]"]}
        if not self.asked.rows:  # heavy laws, too, as for every card that has changed
            stages["laws"] = [f"test_laws.py::test_laws[{card}]", f"test_laws.py::test_heavy_laws[{card}]"]
        tests = {f"tests/laws/{test}": stage for stage, tests in stages.items() for test in tests}
        builder = regard.card(card).builder.__module__.split(".")[-1]
        own = Path("tests", regard.card(card).family, f"test_{builder}.py")
        if self.asked.own_tests and (ROOT / own).exists():
            tests[str(own)] = "own tests"
        env = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-vp", "no:cacheprovider", "-m", "slow or not slow", *tests]
        with tempfile.TemporaryFile("w+") as said:
            try:
                code = subprocess.run(command, cwd=ROOT, env=env, stdout=said, stderr=said, timeout=self.asked.limit)
                if code.returncode == 0:
                    return ""
            except subprocess.TimeoutExpired:
                pass
            said.seek(0)
            text = said.read()
        # Each test that has ended is named on a line of its own; the one that stopped the run comes next, or last.
        passed = sum(f"{test} PASSED" in text for test in tests)
        return list(tests.values())[min(passed, len(tests) - 1)]


def main(asked: argparse.Namespace) -> None:
    """Draw, run, count, and list the survivors."""
    torch.set_num_threads(1)
    drawn = draw(asked.seed, asked.count)
    print(f"seed {asked.seed}: {len(drawn)} mutants of {len({mutant.card for mutant in drawn})} cards", flush=True)
    if asked.list:
        print(*(f"{mutant}\n{mutant.diff()}" for mutant in drawn), sep="\n")
        return
    progress = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        run = Runner(Path(folder), asked)
        sound = {mutant.card: mutant for mutant in drawn}
        unchanged = [Mutant(m.card, m.kind, m.file, m.line, m.file.read_text(encoding="utf-8")) for m in sound.values()]
        found = track(pool.map(run, unchanged), "without faults", len(unchanged), console=progress)
        if failing := [m.card for m, killer in zip(unchanged, found) if killer]:
            sys.exit(f"mutants: the tests of {failing} fail without any fault")
        killers = []
        for mutant, killer in zip(drawn, track(pool.map(run, drawn), "mutants", len(drawn), console=progress)):
            killers.append(killer)
            print(f"{'killed by ' + killer if killer else 'lived':20} {mutant}", flush=True)
    stages = ("rows", "laws", "own tests")
    print(
        f"{'kind':16} {'drawn':>6} {'killed':>7}"
        + "".join(f" {'by ' + stage:>13}" for stage in stages)
        + f" {'lived':>6}"
    )
    for kind in (*KINDS, "all"):
        of = Counter(killer for mutant, killer in zip(drawn, killers) if kind in (mutant.kind, "all"))
        each = "".join(f" {of[stage]:13}" for stage in stages)
        print(f"{kind:16} {of.total():6} {of.total() - of['']:7}{each} {of['']:6}")
    for mutant in (mutant for mutant, killer in zip(drawn, killers) if not killer):
        print(f"\nlived: {mutant}\n{mutant.diff()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--rows", action="store_true", help="run the rows alone")
    parser.add_argument("--own-tests", action="store_true", help="run each mechanism's own tests too")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a mutant's tests may take, each stage")
    parser.add_argument("--jobs", type=int, default=2)
    main(parser.parse_args())

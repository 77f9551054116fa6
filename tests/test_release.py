"""What is released: one version, a changelog of it, all that it takes to build, and names that go by the rule."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import regard
from regard.normalizers import Entmax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
RULE = re.compile(r"since (\d+)\.(\d+): use \S.*; gone in (\d+)\.(\d+)")


def test_the_newest_changes_are_those_of_this_version() -> None:
    heading = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert heading[1] == regard.__version__
    assert heading[2] == "Unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", heading[2])


def test_the_version_stands_in_one_place() -> None:
    """hatchling reads it by this pattern, without running the file; asking for it loads no torch."""
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    file = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'(?m)^__version__ = "(.+)"$', file.read_text()) == [regard.__version__]
    code = "import sys, regard; print(regard.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [regard.__version__, "False"]


def test_a_source_distribution_has_all_that_is_tracked() -> None:
    """hatchling adds pyproject.toml and .gitignore; what is listed and missing would be left out in silence."""
    listed = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"])
    assert [name for name in listed if not (ROOT / name).exists()] == []
    if (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "ls-tree", "--name-only", "HEAD"]
        tracked = set(subprocess.run(git, capture_output=True, text=True, check=True).stdout.split())
        assert tracked <= {name.partition("/")[0] for name in listed} | {"pyproject.toml", ".gitignore"}


# --- names that go ------------------------------------------------------------------------------------------------


def words(source: str) -> Iterator[str]:
    """What is said of each name that goes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            said = node.args[0] if node.args else None
            category = "FutureWarning" in ast.unparse(node)
            if name == "deprecated" or (name == "warn" and category):
                yield said.value if isinstance(said, ast.Constant) and category else ast.unparse(node)


def wrong(source: str, version: str) -> list[str]:
    """What does not follow the rule, or is over by this version."""
    found = []
    for said in words(source):
        rule, now = RULE.fullmatch(said), tuple(map(int, version.split(".")[:2]))
        if rule is None:
            found.append(f"{said}: expected {RULE.pattern}")
        elif not (int(rule[1]), int(rule[2])) < (gone := (int(rule[3]), int(rule[4]))) > now:
            found.append(f"{said}: it is {version}")
        elif rule[1] == rule[3] == "0" and gone[1] < int(rule[2]) + 2:
            found.append(f"{said}: it must work through one more minor version")
    return found


def test_names_go_by_the_rule() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        assert not wrong(file.read_text(), regard.__version__), file


def test_the_rule_can_tell() -> None:
    """Of the example in CONTRIBUTING, and of such as break it."""
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S) if "@deprecated" in code]
    assert list(words(example)) == ["since 0.2: use regard.normalizers.Entmax; gone in 0.4"]
    assert wrong(example, "0.2.0") == wrong(example, "0.3.7") == []
    for version, old, new in (
        ("0.4.0", "", ""),
        ("1.0.0", "", ""),
        ("0.2.0", "gone in 0.4", "gone in 0.3"),
        ("0.2.0", "since 0.2: ", ""),
        ("0.2.0", "; gone in 0.4", ""),
        ("0.2.0", ", category=FutureWarning", ""),
    ):
        assert wrong(example.replace(old, new), version), (version, old, new)
    assert wrong("warnings.warn('old is gone soon', FutureWarning, stacklevel=2)", "0.2.0")


def test_a_name_that_goes_works_and_warns_once() -> None:
    """The example in CONTRIBUTING, under the filter that Python has by default."""
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S) if "@deprecated" in code]
    names: dict = {"__name__": "example"}
    exec(example, names)
    x = torch.randn(2, 3, 4, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            old = names["SparseSoftmax"](alpha=1.5)
        assert torch.equal(old(x, None), Entmax(alpha=1.5)(x, None))
    assert [(w.category, str(w.message), w.filename) for w in caught] == [
        (FutureWarning, "since 0.2: use regard.normalizers.Entmax; gone in 0.4", __file__)
    ]
    with pytest.warns(FutureWarning, match="since 0.2"):
        names["SparseSoftmax"](alpha=2.0)

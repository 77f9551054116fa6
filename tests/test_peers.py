"""Of tests/peers, which `make test-peers` runs: adapters import, and the table tells the truth."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from peers.run import SUITES
from peers.table import Difference, Result, differences, report, results

PEERS = Path(__file__).parent / "peers"
PASSED, FAILED, SKIPPED = (Result(outcome) for outcome in ("passed", "failed", "skipped"))


@pytest.mark.parametrize("name", SUITES)
def test_adapters_import(name: str) -> None:
    """They change their packages only when pytest configures them, so this changes nothing."""
    suite = SUITES[name]
    pytest.importorskip(suite.package.replace("-", "_"))
    plugin = import_module(f"peers.{suite.plugin}")
    assert hasattr(plugin, "pytest_configure") or hasattr(plugin, "pytest_collection_modifyitems")
    if "{" not in suite.tests:
        assert import_module(f"peers.{suite.tests.removesuffix('.py')}")


def test_the_entmax_adapter_has_the_packages_signatures() -> None:
    entmax, ours = pytest.importorskip("entmax"), import_module("peers.entmax_replaced")
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ours.entmax_bisect(x, 1.3, 0, 60), entmax.entmax_bisect(x, 1.3, 0, 60))
    torch.testing.assert_close(ours.sparsemax(x, 0, 3), entmax.sparsemax(x, 0, 3))


def test_the_file_of_differences_is_read() -> None:
    known = differences((PEERS / "differences.txt").read_text())
    assert known
    assert {entry.suite for entry in known} <= SUITES.keys()
    with pytest.raises(ValueError, match="is no `suite"):
        differences("entmax | test_a")


def test_results_of_junit(tmp_path: Path) -> None:
    """A test with subtests ends as the worst of them; a file that is cut off has no results."""
    text = """<testsuites><testsuite><testcase classname="a.b.Case" name="one"/>
    <testcase classname="a.b.Case" name="one"><failure>x</failure></testcase>
    <testcase classname="a.b.Case" name="two"><properties><property name="regard" value="3"/></properties></testcase>
    <testcase classname="a.c" name="three"><skipped>y</skipped></testcase></testsuite></testsuites>"""
    path = tmp_path / "results.xml"
    path.write_text(text)
    assert results(path) == {"Case::one": FAILED, "Case::two": Result("passed", True), "c::three": SKIPPED}
    path.write_text(text[:100])
    assert results(path) == {}
    assert results(tmp_path / "nowhere.xml") == {}


def test_the_table_says_what_differs() -> None:
    ours = {"a::x": FAILED, "a::y": Result("passed", True), "a::z": SKIPPED, "a::w": PASSED}
    theirs = {"a::x": PASSED, "a::y": PASSED, "a::z": PASSED, "a::w": FAILED, "a::gone": PASSED}
    text, well = report({"some": (ours, theirs)}, [Difference("some", "*::x", "a long reason " * 9)])
    assert not well
    assert max(map(len, text.splitlines())) <= 80
    assert "some                        5      2     1     1       4     1     0        1" in text
    assert "1 x *::x (some): a long reason" in text
    assert text.split("no reason:\n")[1].split() == ["some", "a::gone", "some", "a::z"]
    assert text.split("alone:\n")[1].split()[:2] == ["some", "a::w"]


def test_all_is_well_where_every_difference_has_a_reason() -> None:
    known = [Difference("*", "a::x", "why"), Difference("*", "a::old", "mended since")]
    text, well = report({"some": ({"a::x": FAILED}, {"a::x": PASSED})}, known)
    assert well
    assert "ends alike: a::old" in text


@pytest.mark.parametrize("runs", [({}, {"a::x": PASSED}), ({"a::x": PASSED}, {})])
def test_a_side_that_did_not_run_is_not_well(runs: tuple) -> None:
    text, well = report({"some": runs}, [Difference("*", "*", "why")])
    assert not well
    assert "some: nothing has run" in text

"""The benchmarks' harness: ratios by round, goals, and the page rendered from JSON."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as page
from benchmarks import harness


def test_ratios_are_of_the_same_round() -> None:
    times = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 40.0, 4.0]}
    assert harness.ratio(times, "ours", "theirs") == (0.25, 0.25, 0.5)
    faster = harness.compared("x", times, "ours", "theirs", goal=3, better="higher")
    assert (faster.value, faster.low, faster.high, faster.met) == (4.0, 2.0, 4.0, True)
    slower = harness.compared("x", times, "ours", "theirs", goal=0.1)
    assert slower.met is False
    assert harness.Figure("x", None, goal=1).met is None


def test_all_run_in_every_round() -> None:
    seen: list[str] = []
    times = harness.race({n: lambda n=n: seen.append(n) for n in "ab"}, repeats=3)
    assert seen == [*"ab", *"ab", *"ba", *"ab"]
    assert {len(t) for t in times.values()} == {3}


def test_nothing_is_timed_that_differs() -> None:
    with pytest.raises(SystemExit, match="results differ by 1, more than"):
        harness.agree(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(SystemExit, match="differ by nan"):
        harness.agree(torch.zeros(1), torch.tensor([float("nan")]))


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = [vars(harness.Figure("attention", 0.5, low=0.4, high=0.6, goal=0.4)) | {"met": False}]
    record = {"name": "a", "about": "About it", "machine": {"device": "a CPU", "torch": "2"}, "figures": figures}
    (tmp_path / "a.json").write_text(json.dumps(record))
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    text = page.rendered()
    assert "## About it" in text
    assert "`python -m benchmarks.a` on a CPU, torch 2." in text
    assert "| attention | 0.5 x | 0.4 - 0.6 | <= 0.4 x | not met |" in text
    assert {"plain", "window", "block_sparse", "bias", "normalizers", "imports"} <= set(page.names())

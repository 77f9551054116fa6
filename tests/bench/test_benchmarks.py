"""The benchmarks: their harness, that each one runs at a tiny size, the verdict on every goal, and the page."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import goals, harness, page
from benchmarks.harness import Figure

import regard

TINY: dict[str, dict[str, Any]] = {
    "bias": {"length": 128, "heads": 2},
    "block_lm": {"lengths": (8,), "batches": (1,), "heads": 1, "new": 5, "widths": (16,), "steps": 2, "seen": 16},
    "block_sparse": {"length": 256, "heads": 2, "block": 64, "densities": (0.25,)},
    "compiled": {"length": 64},
    "decode": {"lengths": (64, 4096), "least": 1, "seed": 0},
    "documents": {"length": 128, "mean": 20, "row": 32},
    "graph": {"sizes": ((20, 50),)},
    "half": {"length": 128, "heads": 2, "window": 16},
    "imports": {},
    "kept": {"length": 64, "number": 2},
    "landmarks": {"lengths": (64,), "landmarks": 16},
    "layers": {"lengths": (32,)},
    "linear": {"lengths": (128, 256), "at": 256},
    "memory": {"length": 256},
    "neighborhood": {"sizes": (14, 14), "heads": 2},
    "normalizers": {"rows": 16, "keys": 32},
    "paged": {"lengths": (64,), "batches": (1, 2)},
    "patterns": {"length": 512, "heads": 4},
    "plain": {"shape": (1, 2, 64, 16), "calls": 2},
    "routing": {"length": 256, "side": 16},
    "prefix_tree": {"cases": ((2, 128, 64),)},
    "recompiles": {"lengths": (128, 200)},
    "score_mod": {"length": 128, "heads": 2},
    "window": {"length": 512, "window": 64, "heads": 2},
}
ABSENT = ("natten", "local_attention", "performer_pytorch", "x_transformers", "nystrom_attention")
"""What only the extra `bench` installs."""


def benchmark(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


# The harness


def test_ratios_are_of_the_same_round() -> None:
    times = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 40.0, 4.0]}
    assert harness.ratio(times, "ours", "theirs") == (0.25, 0.25, 0.5)
    faster = harness.compared("x", times, "ours", "theirs", goal=3, better="higher")
    assert (faster.value, faster.low, faster.high, faster.met) == (4.0, 2.0, 4.0, True)
    slower = harness.compared("x", times, "ours", "theirs", goal=0.1)
    assert slower.met is False
    assert Figure("x", None, goal=1).met is None


def test_all_run_in_every_round() -> None:
    seen: list[str] = []
    times = harness.race({n: lambda n=n: seen.append(n) for n in "ab"}, repeats=3)
    assert seen == [*"ab", *"ab", *"ba", *"ab"]
    assert {len(t) for t in times.values()} == {3}


def test_a_race_ends_in_time_and_counts_single_calls() -> None:
    seen: list[int] = []
    times = harness.race({"a": lambda: seen.append(1)}, repeats=9, warmup=0, number=5, seconds=0)
    assert len(times["a"]) == 2
    assert len(seen) == 10


def test_nothing_is_timed_that_differs() -> None:
    with pytest.raises(SystemExit, match="results differ by 1, more than"):
        harness.agree(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(SystemExit, match="differ by nan"):
        harness.agree(torch.zeros(1), torch.tensor([float("nan")]))


def test_a_peer_that_is_not_there_is_a_figure_with_a_reason() -> None:
    def absent() -> harness.Run:
        raise ModuleNotFoundError("no", name="natten")

    def broken() -> harness.Run:
        return lambda: 1 / 0

    runs, why = harness.able({"absent": absent, "broken": broken, "there": lambda: lambda: 1})
    assert set(runs) == {"there"}
    assert why == {"absent": "the package natten is not installed", "broken": "ZeroDivisionError: division by zero"}
    figure = harness.compared("x", {"ours": [1.0]}, "ours", "absent", why=why, goal=3, share=0.5)
    assert (figure.value, figure.met, figure.share) == (None, None, None)
    assert figure.note == "the package natten is not installed"


def test_growth_is_the_exponent() -> None:
    assert harness.growth({n: 3e-9 * n**1.5 for n in (1000, 2000, 8000)}) == pytest.approx(1.5)


# Each benchmark


def _no_compiler(*_: int) -> None:
    raise RuntimeError("no C++ compiler")


STAND_INS: dict[str, tuple[str, Any]] = {
    "compiled": ("ways", lambda length: {"causal": {"mask": regard.masks.causal()}}),
    "imports": ("seconds", lambda: [2.0, 0.1]),
    "memory": ("alone", lambda *about: benchmark("memory").added(*about)),
    "recompiles": ("layers", lambda: {"causal": regard.Attention(64, 4, causal=True)}),
    "window": ("flex", _no_compiler),
}
"""For what takes a second process, a compiler, or many seconds."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No peers of the extra, no large matrix product."""
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(harness, "_peak", lambda dtype: 1e12)
    for name, stand_in in STAND_INS.items():
        if f"[{name}]" in request.node.name:
            monkeypatch.setattr(benchmark(name), *stand_in)


LONG = {"compiled"}
"""Whose few seconds are torch's compiler's."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in TINY])
def test_runs_and_measures_its_goals(tiny: None, name: str) -> None:
    result = benchmark(name).measure(repeats=1, **TINY[name])
    assert result.name == name
    assert {f.row for f in result.figures} - {""} == {
        row for row, goal in goals.GOALS.items() if goal.benchmark == name
    }
    for figure in result.figures:
        assert (figure.value is None) == ("not installed" in figure.note or "no C++ compiler" in figure.note), figure
    json.dumps(harness.recorded(result))


def test_all_of_them_are_found() -> None:
    assert set(TINY) <= set(command.names())
    assert not {"harness", "goals", "page"} & set(command.names())
    assert {goal.benchmark for goal in goals.GOALS.values()} <= set(TINY)


def test_a_wrong_result_is_not_timed(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("plain")
    right = module.regard.attention
    monkeypatch.setattr(module.regard, "attention", lambda *x, **options: right(*x, **options) + 1e-3)
    with pytest.raises(SystemExit, match="nothing is timed"):
        module.measure(repeats=1, **TINY["plain"])


# Goals and page


def record(name: str, *figures: Figure) -> dict[str, Any]:
    made = harness.Benchmark(name, f"About {name}", list(figures), shape={"T": 16})
    return harness.recorded(made) | {"machine": {"device": "a CPU", "torch": "2"}}


def said(*figures: Figure) -> dict[str, tuple[str, str]]:
    return {v.goal.work: (v.measured, v.said) for v in goals.verdicts([record("a", *figures)])}


def test_verdicts() -> None:
    names = {row: goal.work for row, goal in goals.GOALS.items()}
    found = said(
        Figure("tiny", 30.0, "us", **goals.goal("tiny")),
        Figure("to torch", 1.0, **goals.goal("plain")),
        Figure("Alibi", 1.2, **goals.goal("bias")),
        Figure("Kerple", 2.0, **goals.goal("bias")),
        Figure("Cope", 1.9, **goals.goal("bias")),
        Figure("to natten", None, **goals.goal("neighborhood"), note="natten is not installed"),
        Figure("of 16k", 30.0, **goals.goal("linear")),
        Figure("of 16k too", None, **goals.goal("linear"), note="too slow"),
        Figure("no goal", 1.0),
    )
    assert len(found) == len(goals.GOALS), "two goals have one name"
    assert found[names["tiny"]] == ("30 us", "not met")
    assert found[names["plain"]] == ("1 x", "met")
    assert found[names["bias"]] == ("2 x (Kerple)", "not met (1 of 3 are)")
    assert found[names["neighborhood"]] == ("", "not measured (natten is not installed)")
    assert found[names["linear"]] == ("30 x", "met, 1 not measured")
    assert found[names["entmax"]] == ("", "not measured")


def test_a_limit_that_varies_is_the_figures_own() -> None:
    limit = goals.goal("block sparse") | {"goal": 0.2}
    assert said(Figure("d = 0.1", 0.3, **limit))[goals.GOALS["block sparse"].work] == ("0.3 x", "not met")


def test_the_page() -> None:
    figure = Figure("attention", 0.5, low=0.4, high=0.6, share=0.25, **goals.goal("window") | {"goal": 0.4})
    text = page.rendered([record("a", figure)])
    assert "### About a" in text
    assert "`python -m benchmarks.a` on a CPU, torch 2.\nShapes: T = 16." in text
    assert "| attention | 0.5 x | 0.4 - 0.6 | 25% | <= 0.4 x | not met |" in text
    window, sparse = goals.GOALS["window"], goals.GOALS["block sparse"]
    assert f"| {window.work} | {window.words} | 0.5 x | not met |" in text
    assert f"| {sparse.work} | {sparse.words} |  | not measured |" in text
    assert text.index("## Goals") < text.index("## GPU") < text.index("## CPU") < text.index("### About a")
    assert "## GPU\n\nNot measured.\n" in text
    with_gpu = page.rendered([record("a"), record("gpu", Figure("of flash", 1.5))])
    assert "Not measured." not in with_gpu
    assert with_gpu.index("## GPU") < with_gpu.index("### About gpu") < with_gpu.index("## CPU")


def test_the_page_in_the_repository_is_that_of_the_saved_figures() -> None:
    assert command.PAGE.read_text(encoding="utf-8") == page.rendered(page.records()), "python -m benchmarks --render"


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that fails makes the command fail, the page is written all the same, and the summary ends it."""
    ran: list[list[str]] = []

    def run(line: list[str]) -> Any:
        ran.append(line[2:])
        return type("Ended", (), {"returncode": int("benchmarks.bias" in line)})

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "bias", "plain", "--repeats=3"])
    assert command.main() == 1
    assert ran == [[f"benchmarks.{name}", "--save", "--repeats=3"] for name in ("bias", "plain")]
    out = capsys.readouterr().out
    assert "[2/2] plain" in out
    assert "not measured" in out or "met" in out
    assert out.rstrip().endswith("failed: bias")
    assert max(map(len, out.split("Goals", 1)[1].split("failed")[0].splitlines()[:-1])) <= 100
    assert (tmp_path / "benchmarks.md").read_text().startswith("# Benchmarks")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nonsense"])
    with pytest.raises(SystemExit, match="unknown benchmark nonsense; there are"):
        command.main()


def test_without_a_gpu_its_benchmarks_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(command, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(command, "names", lambda: ["gpu", "gpu_scan", "plain"])
    monkeypatch.setattr(command, "ran", lambda name, *_: asked.append(name) or True)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert command.main() == 0
    assert asked == ["plain"]

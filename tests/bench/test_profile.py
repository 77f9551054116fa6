"""`regard profile`: what a cell measures, growth exponents, limits, and what is refused before anything runs."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from regard.bench import profile, profile_page, profile_worker
from regard.bench.process import Stop
from regard.bench.profile import Measured, Profile, ProfileError


def job(mechanism: str, length: int = 64, **changes: Any) -> dict[str, Any]:
    settings = {"threads": 1, "device": "cpu"}
    whole = {"mechanism": mechanism, "length": length, "dim": 24, "heads": 2, "batch": 2, "causal": True, "limit": 8.0}
    return {**whole, "cell": {"settings": settings}, **changes}


def quadratic(job: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """As if softmax took 2 T^2 and everything else 5 T; beyond 5000 tokens softmax takes too long."""
    n = job["length"]
    if job["mechanism"] == "softmax" and n > 5000:
        return {"failed": "took longer than the limit of 3 seconds"}
    return {"result": {"values": {"forward": 2e-9 * n**2 if job["mechanism"] == "softmax" else 5e-6 * n}}}


def test_lengths_are_read() -> None:
    assert profile.lengths("1k..8k") == (1024, 2048, 4096, 8192)
    assert profile.lengths("100, 300,1k") == (100, 300, 1024)
    assert profile.lengths("100..300") == (100, 200)
    for wrong in ("4k..1k", "many", "1..2..3", ""):
        with pytest.raises(ProfileError, match=r"cannot be read \(got .*\); expected"):
            profile.lengths(wrong)


def test_a_cell(tmp_path: Path) -> None:
    """All quantities of a streaming mechanism; its state is what the cache says it is."""
    values = profile_worker.measure(job("softmax"))["values"]
    assert values.keys() == profile.QUANTITIES.keys()
    assert all(values[name] > 0 for name in ("forward", "training", "step"))
    assert values["state_bytes"] == 2 * 2 * 64 * 24 * 4  # batch, k and v, tokens, width, bytes
    window = profile_worker.measure(job("window(window=8)"))["values"]
    assert window["state_bytes"] == 2 * 2 * 7 * 24 * 4


def test_a_cell_that_does_not_stream() -> None:
    found = profile_worker.measure(job("etc", causal=False))
    assert found["reason"] == "does not stream"
    assert found["values"].keys() == profile.QUANTITIES.keys() - {"step", "state_bytes"}


def test_growth_is_that_of_the_longer_half() -> None:
    cells = [Measured("a", n, {"forward": 1.0 + n**1.5}) for n in (1, 2, 1024, 2048, 4096)]
    assert profile.growth(cells, "a", "forward") == pytest.approx(1.5, abs=1e-3)
    assert profile.growth(cells[:1], "a", "forward") is None
    assert profile.growth(cells, "a", "step") is None
    assert profile.growth(cells, "b", "forward") is None


def test_formulas_grow_as_they_say(tmp_path: Path) -> None:
    import regard

    config = Profile(("softmax",), out=tmp_path)
    assert profile.formula_growth(regard.card("softmax"), {}, config) == pytest.approx(2)
    assert profile.formula_growth(regard.card("window"), {"window": 64}, config) == pytest.approx(1)


def test_what_is_measured_unless_told_otherwise() -> None:
    assert Profile().mechanisms == ("softmax", "window(window=512)", "linear")


def test_a_run(tmp_path: Path) -> None:
    """Every cell is kept at once; a mechanism that ran into the limit is not tried at greater lengths."""
    config = Profile(("softmax", "alibi"), (2048, 8192, 4096, 1024), limit=3, out=tmp_path)
    seen: list[Measured] = []
    cells = profile.run(config, on_cell=seen.append, measure=quadratic)
    assert seen == cells
    assert [(c.mechanism, c.length) for c in cells[:3]] == [("softmax", 1024), ("alibi", 1024), ("softmax", 2048)]
    kept = json.loads((tmp_path / "profile.json").read_text())
    assert [c["length"] for c in kept["cells"]] == [c.length for c in cells]
    reasons = {(c.mechanism, c.length): c.reason for c in cells}
    assert "longer than the limit" in reasons["softmax", 8192]
    assert profile.growth(cells, "softmax", "forward") == pytest.approx(2)
    assert profile.growth(cells, "alibi", "forward") == pytest.approx(1)
    headings, rows = profile_page.table(cells, config, "forward")
    assert headings == ["forward", "1k", "2k", "4k", "8k", "growth", "formula"]
    assert [row[0] for row in rows] == ["softmax", "alibi"]
    assert [row[4:6] for row in rows] == [["too long", "T^2.00"], ["41 ms", "T^1.00"]]
    page = profile_page.write(cells, config, tmp_path / "report.html").read_text()
    assert "softmax at 8192: took longer than the limit" in page
    assert "http" not in page.split("<body>")[1].split("<script")[0]
    assert "softmax" in profile_page.plot(cells)


def test_left_out_after_the_limit(tmp_path: Path) -> None:
    config = Profile(("softmax",), (8192, 16384), limit=3, out=tmp_path)
    cells = profile.run(config, measure=quadratic)
    assert cells[1].reason == "left out: 8192 tokens took too long"


def test_nothing_could_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the file, in which the reasons stand; page and table do without numbers."""
    run = profile.run
    failing = lambda job, **rest: {"failed": "no luck"}  # noqa: E731
    monkeypatch.setattr(profile, "run", lambda config, **rest: run(config, measure=failing, **rest))
    config = Profile(mechanisms=("softmax",), lengths=(8, 16), out=tmp_path)
    with pytest.raises(ProfileError, match=r"profile\.json: no cell could be measured"):
        profile_page.command(config)
    assert "softmax at 8: no luck" in capsys.readouterr().out
    kept = json.loads((tmp_path / "profile.json").read_text())["cells"]
    assert [cell["reason"] for cell in kept] == ["no luck"] * 2
    assert "no luck" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("values", [{}, {"forward": 0.0}, {"forward": float("inf")}, {"training": 1.0}])
def test_a_plot_of_nothing(values: dict[str, float]) -> None:
    assert profile_page.plot([Measured("softmax", 8, values), Measured("softmax", 16, reason="none")]) == ""


def test_a_disk_that_fails_loses_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """profile.json holds the cells of before, whole, when the next can't be written."""
    import os

    config = Profile(mechanisms=("softmax",), lengths=(8,), out=tmp_path)
    profile.save(config, [Measured("softmax", 8, {"forward": 1.0})])
    before = (tmp_path / "profile.json").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"profile\.json"):
        profile.save(config, [Measured("softmax", 8, {"forward": 1.0})] * 99)
    assert (tmp_path / "profile.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_stopped(tmp_path: Path) -> None:
    config = Profile(("softmax",), (1024, 2048), out=tmp_path)
    answers = iter([{"result": {"values": {"forward": 1.0}}}, None])
    assert len(profile.run(config, measure=lambda *a, **k: next(answers))) == 1


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """The real thing, and its limit: both cells end, one with a reason."""
    config = Profile(("softmax",), (32,), dim=16, heads=2, limit=100, out=tmp_path)
    (cell,) = profile.run(config, stop=Stop())
    assert cell.values["forward"] > 0
    began = time.monotonic()
    (late,) = profile.run(Profile(("softmax",), (32,), dim=16, heads=2, limit=0.3, out=tmp_path))
    assert "longer than the limit of 0.3 seconds" in late.reason
    assert time.monotonic() - began < 20


def test_refusals(tmp_path: Path) -> None:
    """Before anything runs."""
    for mechanisms, words in (
        (("gatv2",), "a GraphMixer has no one length"),
        (("etc",), "etc cannot be causal"),
        (("window(size=3)",), r"'window' has no such option \(got 'size'\); expected one of window"),
        (("window(window=3)()",), "cannot be read"),
        (("softmaxx",), r"mechanism is unknown \(got 'softmaxx'\); expected .*; did you mean 'softmax'"),
    ):
        with pytest.raises(ValueError, match=words):
            profile.run(Profile(mechanisms, out=tmp_path), measure=quadratic)
    assert not list(tmp_path.iterdir())
    for wrong in ({"lengths": (8, 8)}, {"dim": 0}, {"limit": 0.0}, {"lengths": ()}, {"threads": -1}):
        with pytest.raises(ProfileError, match="profile: "):
            Profile(**{"mechanisms": ("softmax",), "out": tmp_path, **wrong})


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_table_has_room_for_what_matters_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("softmax", "window(window=64)+rotary(base=500.0, interleaved=True)")
    config = Profile(names, tuple(2**n for n in range(10, 18)), out=tmp_path)
    cells = [Measured(name, n, {"forward": 1e-9 * n**2}) for name in names for n in config.lengths]
    heading, *rows = profile_page.lines(cells, config, "forward")
    assert max(map(len, [heading, *rows])) <= columns
    assert [row[:6] for row in rows[:2]] == ["softma", "window"]
    assert "128k" in heading
    assert (heading.split()[1:] == ["1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "growth", "formula"]) == (
        columns == 200
    )


def test_own_mechanisms_are_found_where_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compare finds them; and one that crashes leaves file, line and traceback in profile.json and on the page."""
    code = """
import torch
class Fine(torch.nn.Module):
    def __init__(self, dim, num_heads, causal): super().__init__(); self.p = torch.nn.Linear(dim, dim)
    def forward(self, x): return self.p(x)
class Broken(Fine):
    def forward(self, x):
        return helper(x)
def helper(x):
    return x @ x
"""
    (tmp_path / "mine_for_profile.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    mine = ("mine_for_profile:Fine", "mine_for_profile:Broken")
    config = Profile(mine, (32,), dim=16, heads=2, limit=100, out=tmp_path / "out")
    fine, broken = profile.run(config, stop=Stop())
    assert fine.values["forward"] > 0
    assert re.fullmatch(r"RuntimeError: .* \(mine_for_profile.py, line 10\)", broken.reason)
    assert "in helper" in broken.traceback
    kept = json.loads((tmp_path / "out" / "profile.json").read_text())["cells"]
    assert kept[1]["traceback"] == broken.traceback
    page = profile_page.write([fine, broken], config, tmp_path / "report.html").read_text()
    assert "<summary>Traceback</summary>" in page
    assert "in helper" in page

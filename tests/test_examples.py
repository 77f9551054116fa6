"""Every example runs as it stands, and what it finds is what it tells of."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inspect.minilm import needs_minilm

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL: dict[str, dict[str, int]] = {
    "swap_window_with_sinks": {"STEPS": 2, "LENGTH": 64, "EAGER": 80, "LONG": 160, "WINDOW": 16},
    "offset_heads_of_a_rotary_model": {"STEPS": 2, "LENGTH": 32},
}
"""Constants at the top of the scripts, so small that one takes a second or two."""


@pytest.fixture
def small(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a script has defined at its end, run here with its constants made small."""
    monkeypatch.chdir(tmp_path)
    name: str = request.param
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for constant, value in SMALL[name].items():
        source, found = re.subn(rf"(?m)^{constant} = .*$", f"{constant} = {value}", source)
        assert found == 1, constant
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, f"{name}.py", "exec"), made)
    return made


@pytest.mark.parametrize("small", ["swap_window_with_sinks"], indirect=True)
def test_the_swap_leaves_the_pairs_out_and_the_model_as_it_was(small: dict[str, Any]) -> None:
    assert torch.equal(small["predicted"](), small["full"])
    allowed = small["window"] | small["sinks"]
    causal = small["masks"].causal()
    share = float((allowed & causal).dense(64).sum()) / float(causal.dense(64).sum())
    rows = small["reports"]["window 16, 4 sinks"].rows
    assert [row.density for row in rows] == pytest.approx([share] * 2)
    assert all(0 < row.kept_mass < 1 for row in rows)
    assert small["costs"].row_count == 5
    assert small["page"].stat().st_size > 50_000


@pytest.mark.parametrize("small", ["offset_heads_of_a_rotary_model"], indirect=True)
def test_every_head_has_its_offset(small: dict[str, Any]) -> None:
    assert small["heads"].share.shape == (2, 4)
    assert (small["heads"].offset[..., 1] <= 0).all()
    assert small["table"].row_count == 8
    assert small["page"].stat().st_size > 50_000


@pytest.mark.slow
@needs_minilm
def test_important_heads_are_the_ones_to_keep(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the real encoder, at every share pruned."""
    made = runpy.run_path(os.fspath(EXAMPLES / "prune_minilm_heads.py"))
    orders = made["orders"]
    assert torch.allclose(orders["embedding"][0], torch.ones(2), atol=1e-5)
    assert (orders["embedding"][1:] > orders["random"][1:] + 0.01).all()
    assert orders["embedding"][4, 0] > 0.95  # a third of the heads gone
    assert "24 of 72" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    command = [sys.executable, os.fspath(EXAMPLES / f"{name}.py")]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert max(map(len, ran.stdout.splitlines())) <= 100
    assert (tmp_path / "runs" / "examples" / f"{name}.html").is_file()

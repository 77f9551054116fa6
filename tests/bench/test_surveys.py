"""`regard survey`: methods found by their papers, and what is measured of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regard import index
from regard.bench import profile, surveying, surveys
from regard.bench.profile import Measured
from regard.bench.surveying import Found, Measuring
from regard.cli import app


def test_what_is_built_is_found_by_its_paper() -> None:
    found = {row.method.name: row.card for row in surveys.rows("practical")}
    assert found["Linformer"] is not None
    assert found["Linformer"]["name"] == "linformer"
    assert found["Feedback"] is None, "nothing of it is built: if it is now, name another here"
    for name, survey in surveys.SURVEYS.items():
        methods = [method for _, method in survey.methods()]
        assert any(method.cards for method in methods), f"{name}: no card cites any of it"
        assert all(method.name and re.fullmatch(r"\d{4}\.\d{5}|[A-Z].*", method.paper) for method in methods)


def test_a_paper_that_a_card_cites_besides_is_not_its_own() -> None:
    """DocMamba's layer cites Mamba, and is not Mamba."""
    (mamba,) = (m for _, m in surveys.survey("llm").methods("decay") if m.name == "Mamba")
    citing = {e["name"] for e in index.entries() if any(p["ref"] == mamba.paper for p in e["papers"])}
    assert {card["name"] for card in mamba.cards} < citing


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"survey is unknown \(got 'lm'\).*did you mean 'llm'"):
        surveys.survey("lm")
    with pytest.raises(ValueError, match=r"survey: only is in no class's name \(got 'rank 5'\)"):
        list(surveys.survey("llm").methods("rank 5"))


def test_the_table_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in surveys.SURVEYS:
        said = CliRunner().invoke(app, ["survey", name])
        assert said.exit_code == 0, said.output
        assert "not built" in said.output
        assert max(map(len, said.output.splitlines())) <= 80
    listed = json.loads(CliRunner().invoke(app, ["survey", "llm", "--only", "eviction", "--json"]).output)
    assert {"method": "H2O", "free": True, "mechanism": "h2o"}.items() <= listed[0].items()


def test_lengths_and_crossing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of softmax 2 n^2, and of linear attention as much at 1k and then n: it is faster from 2k on."""

    def run(config: profile.Profile, **rest: Any) -> list[Measured]:
        seconds = {"softmax": lambda n: 2e-9 * n**2, "linear": lambda n: 2e-6 * n + 1e-9}
        return [Measured(m, n, {"forward": seconds[m](n)}) for m in config.mechanisms for n in config.lengths]

    monkeypatch.setattr(profile, "run", run)
    group = {name: Found(name, True) for name in ("softmax", "linear")}
    surveying._lengths(group, Measuring(lengths=(1000, 2000, 4000), out=tmp_path), lambda words: None)
    assert group["softmax"].time == pytest.approx(2)
    assert group["linear"].time == pytest.approx(1, abs=1e-3)
    assert group["linear"].crossing == 2000
    assert group["softmax"].crossing is None


@pytest.mark.slow
def test_measured(tmp_path: Path) -> None:
    config = Measuring((64, 128), 32, 2, steps=2, seeds=(0,), out=tmp_path)
    found = surveying.measure("efficient", "low rank", config, say=lambda words: None)
    by_name = {one.mechanism: one for one in found if one.mechanism != "softmax"}
    assert by_name["synthesizer_dense"].causal
    assert not by_name["linformer"].causal
    assert all(one.time is not None for one in found if not one.reasons)
    record = json.loads((tmp_path / "survey.json").read_text())
    assert [one["mechanism"] for one in record["found"]] == [one.mechanism for one in found]
    assert "linformer" in "\n".join(surveying.measured(found))

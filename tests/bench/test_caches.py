"""`regard caches`: what a cell measures, that nothing asked is lost, and what stands in tables and on the page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import regard
from regard.bench import caches, caches_page
from regard.bench.caches import FULL, Caches, CachesError, Cell
from regard.bench.process import Stop
from regard.prompts import asking
from regard.prompts.asking import Row, Scores

HOME = Path(__file__).resolve().parents[2] / "models" / "small"
NEEDLE = "needle(form='lines')"


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(HOME).eval(), AutoTokenizer.from_pretrained(HOME)


def config(out: Path, **changes: Any) -> Caches:
    given = {"policies": ("tova",), "tasks": (NEEDLE,), "lengths": (96,), "budget": (0.5,), "samples": 4, "batch": 2}
    return Caches(str(HOME), **{**given, "out": out, **changes})


def faked(monkeypatch: pytest.MonkeyPatch, mark: float = 0.5, fail: str = "") -> list[str]:
    """Questions are not asked; `fail` is a task at which asking fails. Gives what was asked."""
    asked: list[str] = []

    def score(timed: Any, tokenizer: Any, task: str, *, length: int, samples: int, **options: Any) -> Scores:
        asked.append(task)
        if task == fail:
            raise RuntimeError("no luck")
        timed.bytes, timed.rate, timed.prefill = [100.0 if len(asked) == 1 else 25.0], [50.0], [0.01]
        return Scores(task, tuple(Row(length, 0.5, mark, "", ("x",)) for _ in range(samples)))

    monkeypatch.setattr(asking, "score", score)
    return asked


def test_budgets_are_read() -> None:
    assert caches.budgets("10%, 0.25,.5,512") == (0.1, 0.25, 0.5, 512)
    assert [caches.shown(b) for b in (0.1, 0.125, 512, None)] == ["10%", "12.5%", "512", ""]
    for wrong in ("many", "", "-1", "10%%"):
        with pytest.raises(CachesError, match=r"budget cannot be read \(got .*\); expected"):
            caches.budgets(wrong)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policies": ("nope",)}, "policy is unknown|nope"),
        ({"policies": ("softmax",)}, "softmax"),
        ({"policies": ("tova", "tova")}, "policies are missing or come twice"),
        ({"tasks": ("nope",)}, "nope"),
        ({"budget": (1.5,)}, "budget is out of range"),
        ({"budget": (0,)}, "budget"),
        ({"samples": 0}, "samples"),
        ({"held_back": 0}, "held_back"),
    ],
)
def test_what_is_refused_before_anything_runs(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CachesError, match=says):
        config(tmp_path, **changes)


def test_all_policies_and_a_control_are_compared() -> None:
    given = Caches("x").policies
    assert {"snapkv", "h2o", "streaming_llm", "key_norm", "random"} <= set(given)
    assert "paged_attention" not in given


def test_the_small_model(tmp_path: Path, small: tuple[Any, Any]) -> None:
    """A real run: the full cache is what transformers holds, a policy holds about its budget, all is kept."""
    seen: list[Cell] = []
    found = caches.run(config(tmp_path, policies=("tova", "random")), on_cell=seen.append, loaded=small)
    assert found == seen
    assert [cell.status for cell in found] == ["done"] * 3, [cell.reason for cell in found]
    full, tova, chance = (cell.values for cell in found)
    assert full["share"] == 1
    per_token = 3 * 2 * 2 * 32 * 4  # layers, k and v, heads, width, bytes
    assert 80 * per_token <= full["bytes"] <= 96 * per_token
    for values in (tova, chance):
        assert 0.45 <= values["share"] <= 0.65
        assert values["prefill"] > 0
        assert values["tokens_per_second"] > 0
    assert full["accuracy"] >= tova["accuracy"]
    kept = json.loads((tmp_path / "caches.json").read_text())
    assert [Cell(**cell) for cell in kept["cells"]] == found
    assert caches.run(config(tmp_path, policies=("tova", "random")), loaded=(None, None)) == found, "not asked again"


def test_the_whole_budget_answers_as_the_full_cache(small: tuple[Any, Any]) -> None:
    """Reading a prompt in two pieces, padded or not, changes no answer."""
    model, tokenizer = small
    asked = tokenizer(["ab=xy\nqr=lm\ntz=kf\nqr=", "qr=lm\nqr="])["input_ids"]
    most = max(map(len, asked))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in asked])
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    want = model.generate(input_ids=ids, attention_mask=mask, **options)
    for held_back in (1, 3, 100):
        timed = caches.Timed(model, held_back)
        assert torch.equal(timed.generate(ids, mask, **options), want)
        with regard.swap(model, cache=caches.Random(budget=1.0), check=False):
            assert torch.equal(timed.generate(ids, mask, **options), want)
    assert len(timed.bytes) == 4
    assert len(timed.rate) == 2


def test_bytes_of_a_cache_of_transformers(small: tuple[Any, Any]) -> None:
    cache = DynamicCache(config=small[0].config)
    small[0](torch.tensor([[65] * 10]), past_key_values=cache)
    assert caches.nbytes(cache) == 10 * 3 * 2 * 2 * 32 * 4


def test_a_cell_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reason is shown, the others are there, the exit code is 3; the same command tries it alone again."""
    asked = faked(monkeypatch, fail="absence")
    given = config(tmp_path, tasks=(NEEDLE, "absence"))
    monkeypatch.setattr(caches, "load", lambda config: small)
    assert caches_page.command(given) == 3
    shown = capsys.readouterr().out
    assert "2 cells: RuntimeError: no luck" in shown
    assert max(map(len, shown.splitlines())) <= 80
    page = (tmp_path / "report.html").read_text()
    assert "no luck" in page
    assert "Traceback" in page
    assert "http" not in page.split("<body>")[1].split("<script")[0]
    assert asked == [NEEDLE, NEEDLE, "absence", "absence"]
    asked = faked(monkeypatch)
    assert caches_page.command(given) == 0
    assert asked == ["absence", "absence"]


def test_where_the_full_cache_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Any, Any]
) -> None:
    """No policy is asked, and that is no failure."""
    asked = faked(monkeypatch, mark=0.0)
    found = caches.run(config(tmp_path), loaded=small)
    assert [cell.status for cell in found] == ["done", "left out"]
    assert len(asked) == 1
    assert caches_page.reasons(found) == [f"{NEEDLE} at 96 tokens: tova at 50%: the full cache gets nothing right"]


def test_other_settings_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Any, Any]) -> None:
    faked(monkeypatch)
    first = caches.run(config(tmp_path), loaded=small)
    caches.run(config(tmp_path, budget=(0.25,)), loaded=small)
    kept = {Cell(**cell).key for cell in json.loads((tmp_path / "caches.json").read_text())["cells"]}
    assert {cell.key for cell in first} <= kept
    assert len(kept) == 3
    with pytest.raises(CachesError, match="made with another samples; give another --out"):
        caches.run(config(tmp_path, samples=8), loaded=small)
    (tmp_path / "caches.json").write_text("{")
    with pytest.raises(CachesError, match="cannot be read"):
        caches.run(config(tmp_path), loaded=small)


def test_stopping_keeps_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: tuple[Any, Any]) -> None:
    faked(monkeypatch)
    stop = Stop()
    found = caches.run(config(tmp_path), loaded=small, stop=stop, on_cell=lambda cell: setattr(stop, "number", 15))
    assert len(found) == 1
    assert len(json.loads((tmp_path / "caches.json").read_text())["cells"]) == 1


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"accuracy": 0.5, "error": 0.1, "bytes": 2048.0, "share": 0.25, "tokens_per_second": 99.6, "prefill": 0.01}
    given = config(tmp_path, policies=("tova", "snapkv(window=8)"), budget=(0.1, 0.25))
    found = [
        Cell(FULL, None, NEEDLE, 96, values={**values, "share": 1.0, "accuracy": 0.9}),
        Cell("tova", 0.1, NEEDLE, 96, values=values),
        Cell("tova", 0.25, NEEDLE, 96, "failed", reason="no luck"),
        Cell("snapkv(window=8)", 0.1, NEEDLE, 96, values=values),
    ]
    headings, rows = caches_page.table(found, given, NEEDLE, 96)
    assert headings == ["policy", "10%", "25%", "tokens/s", "prefill", "bytes 10%", "bytes 25%"]
    assert rows == [
        ["full", "0.90", "0.90", "100", "10 ms", "100%", "100%"],
        ["tova", "0.50", "failed", "100", "10 ms", "25%", "failed"],
        ["snapkv(window=8)", "0.50", "", "100", "10 ms", "25%", ""],
    ]
    for within in (60, 80):
        monkeypatch.setenv("COLUMNS", str(within))
        assert max(map(len, caches_page.lines(found, given, NEEDLE, 96))) <= within
    assert "tova" in caches_page.plot(found, NEEDLE, 96)
    page = caches_page.write(found, given, tmp_path / "report.html").read_text()
    assert "<td>2 KB</td>" in page
    assert "snapkv(window=8)" in page

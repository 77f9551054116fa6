"""One cell: repeatable to the bit, and its measurements mean what they say."""

import math
from dataclasses import replace

import pytest
import torch

from regard import tasks
from regard.bench import train as module
from regard.bench.decoding import state_bytes
from regard.bench.memory import PeakMemory
from regard.bench.record import Cell
from regard.bench.train import TrainingError, rate, train
from regard.models.checkpoint import load
from regard.pipeline.kv_cache import KVCache
from regard.tasks.text import NextByte, Text

CPU = torch.device("cpu")
BOOK = Text("test", b"the quick brown fox jumps over the lazy dog. " * 40, b"a lazy dog and a quick fox meet. " * 10)
TEXT = NextByte(length=16, text=BOOK)
SETTINGS = {
    "steps": 6,
    "batch": 4,
    "length": 16,
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "lr": 1e-2,
    "match": "params",
    "device": "cpu",
}
CELL = Cell("text", "rotary", 0, SETTINGS)


@pytest.fixture(autouse=True)
def found(monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent)


def test_the_same_cell_gives_the_same_numbers():
    torch.manual_seed(1)
    first = train(CELL, TEXT)
    torch.manual_seed(2)
    again, other = train(CELL, TEXT), train(replace(CELL, seed=1), TEXT)
    assert first.curve == again.curve
    assert first.heldout == again.heldout
    assert first.curve != other.curve


def test_training_learns():
    curve = train(replace(CELL, settings={**SETTINGS, "steps": 60}), TEXT).curve
    assert curve[0] == (1, pytest.approx(8.0, abs=0.2))
    assert curve[-1][0] == 60
    assert curve[-1][1] < 5


def test_a_result_is_complete(tmp_path):
    steps = []
    got = train(CELL, TEXT, progress=lambda *pair: steps.append(pair), checkpoint=tmp_path / "a" / "m.safetensors")
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert set(got.heldout) == {"1x", "2x", "4x"}
    assert got.notes == []
    assert got.mlp_dim == 64
    assert got.parameters == 256 * 16 + 3 * 16 + 4 * 16 * 16 + 2 * 16 * 64
    assert got.state_bytes == 2 * 16 * 16 * 4, "keys and values of 16 tokens in fp32"
    assert min(got.flops_per_token, got.seconds) > 0
    model, config = load(tmp_path / "a" / "m.safetensors")
    assert config.length == 16
    assert TEXT.measure(model, 4, CPU)[0] == got.heldout


def test_a_length_limit_is_a_note_and_no_failure():
    got = train(replace(CELL, mechanism="stubs:Short"), TEXT)
    assert set(got.heldout) == {"1x"}
    assert got.notes == ["no 2x: Short: length 32 exceeds 16", "no 4x: Short: length 64 exceeds 16"]
    assert got.state_bytes == 0


def test_a_loss_that_is_no_number_is_a_failure(monkeypatch):
    with pytest.raises(TrainingError, match="became nan at step 1"):
        train(replace(CELL, mechanism="stubs:Diverges"), TEXT)
    monkeypatch.setattr(NextByte, "measure", lambda *_: ({"1x": math.inf}, []))
    with pytest.raises(TrainingError, match="the held-out bits per byte is inf"):
        train(CELL, TEXT)


TINY = {
    "mqar": {"length": 16, "pairs": (2, 4), "vocab": 16, "heldout": 8},
    "retrieval": {"hops": 2, "chains": 2, "vocab": 12, "heldout": 8},
    "copying": {"symbols": (2, 4), "heldout": 8},
    "selective_copying": {"symbols": (2,), "length": 6, "heldout": 8},
    "imputation": {"length": 12, "heldout": 8},
    "digits": {"heldout": 0.05},
    "nodes": {"nodes": 12, "heldout": 2},
    "boxes": {"size": 16, "heldout": 8},
    "absence": {"elements": 6, "vocab": 12, "heldout": 8},
    "shapes": {"heldout": 15},
    "nearest_point": {"points": 4, "features": 3, "queries": 2, "heldout": 8},
}


def test_every_task_has_a_tiny_form_here():
    assert {"text", *TINY} == set(tasks.names())


@pytest.mark.parametrize("name", TINY)
def test_one_loop_trains_every_task(name):
    """A few steps of each: repeatable to the bit, with numbers for all that its metric promises."""
    if name in ("digits", "boxes"):
        pytest.importorskip("sklearn" if name == "digits" else "scipy")
    task = tasks.make(name, TINY[name])
    settings = {**SETTINGS, **task.settings(), "steps": 3, "batch": 2}
    cell = Cell(name, task.baseline, 0, settings)
    first, again, other = train(cell, task), train(cell, task), train(replace(cell, seed=1), task)
    assert first.curve == again.curve != other.curve
    assert first.heldout == again.heldout
    assert first.metric == task.metric
    labels = [f"{n}" for n in TINY[name].get("pairs") or TINY[name].get("symbols") or range(1, 3)]
    if name == "shapes":
        labels = ["as trained", "turned", "small", "faint", "noisy"]
    expected = {"retrieval": ["1", "2"], "imputation": ["20%", "50%", "80%"], "absence": ["20%", "50%"]}.get(
        name, labels
    )
    assert list(first.heldout) == [
        task.metric.main,
        *(expected if (task.metric.along or name == "shapes") and len(expected) > 1 else []),
    ]
    assert all(math.isfinite(v) and v >= 0 for v in first.heldout.values())
    assert min(first.flops_per_token, first.parameters) > 0
    assert (first.state_bytes > 0) == ("causal" in task.takes.get("TokenMixer", ()))


def test_the_rate_warms_up_and_cools_down():
    rates = [rate(n, 100, 10) for n in range(100)]
    assert rates[0] == 0.1
    assert rates[9:11] == [1.0, 1.0]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_state_is_counted_once_and_a_cache_by_what_it_holds():
    shared = torch.zeros(10)
    assert state_bytes([shared, {"again": shared, "more": (torch.zeros(3, dtype=torch.float64), None, 5)}]) == 64
    cache = KVCache({"k": torch.zeros(1, 2, 100, 4), "v": torch.zeros(1, 2, 100, 4)}, length=7)
    assert state_bytes([cache]) == 2 * 2 * 7 * 4 * 4


def test_peak_memory_is_what_was_added():
    memory = PeakMemory(CPU)
    block = torch.ones(50_000_000)
    del block
    peak = memory.bytes()
    # Linux keeps its counters to about a megabyte.
    assert 195e6 <= peak < 260e6
    assert PeakMemory(CPU).bytes() < 50e6, "an earlier peak is forgotten"


def test_the_curve_holds_means_over_stretches(monkeypatch):
    monkeypatch.setattr(module, "CURVE_POINTS", 2)
    losses = []
    curve = train(CELL, TEXT, progress=lambda step, loss: losses.append(loss)).curve
    assert curve == [(3, math.fsum(losses[:3]) / 3), (6, math.fsum(losses[3:]) / 3)]

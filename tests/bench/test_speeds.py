"""Speeds are measured in turns: a busy minute falls on all alike, and first steps are not counted."""

import statistics
import time

import pytest

from regard import tasks
from regard.bench import speeds
from regard.bench.events import TURNS

SETTINGS = {"dim": 16, "depth": 1, "heads": 2, "batch": 2, "steps": 10, "lr": 1e-3, "match": "params", "device": "cpu"}
FIELDS = {"train_tokens_per_second", "train_spread", "generate_tokens_per_second", "generate_spread"}


@pytest.fixture
def text(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a text that nobody wrote, line by line\n" * 100)
    return tasks.make("text", {"length": 16, "text": [str(book)]})


def test_every_mechanism_has_a_turn_in_every_round(text, monkeypatch):
    turns, train = [], speeds.Runner.train
    monkeypatch.setattr(speeds, "TURN", 0.0)
    monkeypatch.setattr(speeds.Runner, "train", lambda self, steps: turns.append((self, steps)) or train(self, steps))
    rounds = []
    found = speeds.in_turns(text, ["softmax", "alibi"], SETTINGS, lambda *turn: rounds.append(turn))
    assert rounds == [(0, 0), (0, 1), *((turn, place) for turn in range(TURNS) for place in (0, 1)), (TURNS, 0)]
    runners = [runner for runner, _ in turns]
    assert [steps for _, steps in turns] == [speeds.WARM] * 2 + [1] * (2 * TURNS)
    assert runners[2:] == runners[:2] * TURNS
    assert {name: set(its) for name, its in found.items()} == {"softmax": FIELDS, "alibi": FIELDS}
    assert all(its["train_tokens_per_second"] > 0 < its["generate_tokens_per_second"] for its in found.values())


def test_a_busy_while_falls_on_all_alike(text, monkeypatch):
    """Steps that take 1 ms, and twice as long for a while: equals stay equal. Cells in a row would differ by half."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step(*_):
        clock[0] += 0.002 if clock[0] > 0.15 else 0.001
        return 1.0

    monkeypatch.setattr(speeds, "descend", step)
    monkeypatch.setattr(speeds, "generating", lambda *_: step)
    monkeypatch.setattr(speeds, "TURN", 0.01)
    found = speeds.in_turns(text, ["softmax", "alibi"], SETTINGS, lambda turn, place: None)
    one, two = (found[name]["train_tokens_per_second"] for name in ("softmax", "alibi"))
    assert one == pytest.approx(two)
    assert found["softmax"]["train_spread"] > 0


def test_what_generates_nothing_has_no_such_speed():
    task = tasks.make("copying", {"symbols": (2, 4), "heldout": 8})
    (found,) = speeds.in_turns(task, ["softmax"], SETTINGS, lambda turn, place: None).values()
    assert set(found) == {"train_tokens_per_second", "train_spread"}


def test_without_streaming_a_token_is_a_full_pass(text, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    (found,) = speeds.in_turns(text, ["stubs:Short"], SETTINGS, lambda turn, place: None).values()
    assert found["generate_tokens_per_second"] > 0


def test_a_speed_is_the_median_and_its_spread_that_of_the_middle_half():
    seconds = [1.0, 0.5, 0.25, 0.2, 10.0]
    told = speeds._told("train", seconds, 8)
    rates = sorted(8 / one for one in seconds)
    assert told["train_tokens_per_second"] == statistics.median(rates)
    assert told["train_spread"] == pytest.approx((rates[3] - rates[1]) / 2)
    assert speeds._told("generate", [], 1) == {}

"""What holds for every task: it is found by name, says what it takes, and makes the same data from the same seed."""

import itertools
import subprocess
import sys

import pytest
import torch

import regard
from regard import tasks
from regard.bench.fitting import sizes, why_not
from regard.models.mixer import parse
from regard.tasks import Metric, Task, TaskError

NAMES = [name for name in tasks.names() if name != "text"]


def flat(batch):
    return [batch] if isinstance(batch, torch.Tensor) else [t for part in batch for t in flat(part)]


def made(name):
    if name in ("digits", "boxes"):
        pytest.importorskip("sklearn" if name == "digits" else "scipy")
    return tasks.make(name)


def test_text_is_the_first_of_all_tasks():
    assert tasks.names()[0] == "text"
    recall = {"mqar", "retrieval", "copying", "selective_copying"}
    assert {*recall, "absence", "digits", "shapes", "nodes", "imputation", "boxes", "nearest_point"} == set(NAMES)
    for name in tasks.names():
        task = tasks.find(name)
        assert issubclass(task, Task)
        assert task.name == name
        assert 0 < len(task.gist) < 90
        assert task.metric.better in (-1, 1)
        assert 0 < len(task.mechanisms()) < 9
        # Text's host has no positions, so its baseline is compared with rotary ones: softmax with those is `rotary`.
        assert task.mechanisms()[0] == ("rotary" if name == "text" else task.baseline)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_the_data(name):
    first, again, other = (list(itertools.islice(made(name).batches(3, seed), 3)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(flat(first), flat(other), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_settings_tell_all_options_as_json_has_them(name):
    settings = made(name).settings()
    assert isinstance(settings.pop("data"), str)
    settings.pop("fingerprint", None)
    assert not any(isinstance(value, tuple) for value in settings.values())
    assert tasks.make(name, settings).settings() == made(name).settings()


@pytest.mark.parametrize("name", NAMES)
def test_the_model_takes_what_the_task_makes(name):
    task = made(name)
    size = sizes(task)
    model = task.model(parse(task.baseline), size)
    model(*task.example())
    loss = task.loss(model, next(task.batches(2, 0)))
    loss.backward()
    assert loss.shape == ()
    assert all(p.grad is not None for p in model.parameters()), "every parameter is trained"
    assert len(model.mixers) == size.depth


def test_cards_name_tasks_that_there_are_and_options_that_they_have():
    for card in (regard.card(name) for name in regard.mechanisms()):
        for entry in map(parse, card.tasks):
            assert entry.name in {*tasks.names(), "profile"}, card.name
            assert entry.options.keys() <= card.options.keys(), card.name
        inherited = card.base is not None and card.tasks == card.base.tasks != ()
        assert not inherited, f"{card.name} has its tasks from its base; give it tasks=()"
    assert tasks.mechanisms_for("mqar") == [m for m in tasks.find("mqar").mechanisms() if m != "softmax"]
    assert "moba(block=8)" in tasks.mechanisms_for("mqar")
    assert tasks.mechanisms_for("chess") == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_by_default_fits(name):
    task = made(name)
    for mechanism in task.mechanisms():
        assert why_not(task, parse(mechanism), sizes(task)) == [], mechanism


def test_names_of_tasks_are_known_without_torch():
    code = "import sys; from regard import tasks; from regard.bench.config import CompareConfig as C; "
    code += "print('torch' in sys.modules, C().out, len(tasks.names()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "runs/compare", str(len(tasks.names()))]


def test_unknown_names_and_options_are_refused():
    with pytest.raises(TaskError, match=r"task is unknown \(got 'digit'\); expected .*; did you mean 'digits'\?"):
        tasks.find("digit")
    with pytest.raises(TaskError, match=r"task is unknown \(got '_labelled'\); expected one of text, absence, boxes, "):
        tasks.find("_labelled")
    with pytest.raises(
        TaskError, match=r"task 'copying' has no such option \(got 'symbol'\); .*; did you mean 'symbols'\?"
    ):
        tasks.make("copying", {"symbol": 3})
    with pytest.raises(TaskError, match=r"has no such option \(got 'x'\); expected one of "):
        tasks.make("copying", {"x": 3})


# --- what fits


@pytest.mark.parametrize(
    ("name", "mechanism", "reason"),
    [
        ("mqar", "softmax", None),
        ("mqar", "gated+rotary", None),
        ("mqar", "mamba2(expand=2)", None),
        ("mqar", "retnet", None),
        ("mqar", "etc", "cannot be causal"),
        ("mqar", "polarized", "a FeatureMixer; mqar takes TokenMixers"),
        ("mqar", "softmax(head_dim=4096)", "cannot be matched in params"),
        ("mqar", "gatv2", "a GraphMixer; mqar takes TokenMixers"),
        ("digits", "etc", None),
        ("digits", "polarized", None),
        ("digits", "efficient_probing", None),
        ("digits", "moba", "can only be causal"),
        ("digits", "attention_gate", "needs inputs that digits has not: 'g'"),
        ("shapes", "etc", None),
        ("shapes", "swin", None),
        ("shapes", "efficient_probing", None),
        ("shapes", "moba", "can only be causal"),
        ("absence", "mega", None),
        ("absence", "etc", "cannot be causal"),
        ("imputation", "diagonal_masked", None),
        ("nodes", "gatv2", None),
        ("nodes", "softmax", "a TokenMixer; nodes takes GraphMixers"),
        ("nearest_point", "free_rank", None),
        ("nearest_point", "moba", "can only be causal"),
        ("boxes", "deformable", None),
        ("boxes", "gated+rotary", None),
        ("boxes", "fftnet", "takes no other sequence to attend to"),
        ("boxes", "pointer", "a Pointer; boxes takes CrossMixers, TokenMixers"),
    ],
)
def test_what_fits_and_why_not(name, mechanism, reason):
    task = made(name)
    why = why_not(task, parse(mechanism), sizes(task))
    assert why == [] if reason is None else reason in "; ".join(why), why


def test_a_mechanism_that_fails_at_the_tasks_length_does_not_fit(monkeypatch):
    task = tasks.make("imputation")

    def broken(*args):
        raise RuntimeError("not for\n48 tokens")

    monkeypatch.setattr(regard.Attention, "forward", broken)
    assert why_not(task, parse("softmax"), sizes(task)) == ["RuntimeError: not for 48 tokens"]


def test_trying_changes_no_random_numbers():
    task = tasks.make("imputation")
    torch.manual_seed(3)
    why_not(task, parse("softmax"), sizes(task))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


# --- numbers in words


@pytest.mark.parametrize(
    ("metric", "value", "shown", "titles"),
    [
        (Metric(), 1.4204, "1.420", {"1x": "bits/byte 1x", "4x": "4x"}),
        (tasks.ACCURACY, 0.9731, "97.3%", {"accuracy": "accuracy"}),
        (tasks.find("imputation").metric, 0.5, "0.500", {"mean": "error", "20%": "20% missing"}),
    ],
)
def test_metrics_write_their_numbers(metric, value, shown, titles):
    assert metric.write(value) == shown
    assert {label: metric.title(label) for label in titles} == titles

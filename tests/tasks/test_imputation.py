"""Imputation: series with structure across time and channels, and nothing of what is hidden is shown."""

import pytest
import torch

from regard import tasks
from regard.tasks import TaskError
from regard.tasks.imputation import waves


def test_series_are_a_few_waves_in_all_channels():
    series = waves(200, 64, 5, 2, 0.0, torch.Generator().manual_seed(0)).double()
    ranks = torch.linalg.matrix_rank(series[:20], rtol=1e-5)
    assert (ranks == 2).all(), "two waves span all channels"
    assert series.var() == pytest.approx(1.0, abs=0.15)
    noisy = waves(200, 64, 5, 2, 0.3, torch.Generator().manual_seed(0))
    assert (noisy - series).std() == pytest.approx(0.3, abs=0.01)


def test_a_share_of_the_entries_is_hidden():
    task = tasks.make("imputation", {"missing": (10, 60)})
    shares = torch.cat([hidden.double().mean((1, 2)) for (_, hidden), _ in zip(task.batches(64, 0), range(4))])
    assert shares.min() > 0.02
    assert shares.max() < 0.72
    assert shares.mean() == pytest.approx(0.35, abs=0.05)


def test_hidden_values_are_not_shown():
    task = tasks.make("imputation")
    series, hidden = next(task.batches(4, 0))
    shown = task.visible(series, hidden)
    other = task.visible(torch.where(hidden, 99.0, series), hidden)
    assert torch.equal(shown, other)
    assert torch.equal(shown[..., 4:] == 1, ~hidden)
    assert torch.equal(shown[..., :4][~hidden], series[~hidden])


def test_only_hidden_values_count():
    task = tasks.make("imputation", {"heldout": 16})
    series, hidden = next(task.batches(4, 0))

    class Says(torch.nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, x):
            return self.values

    wrong_elsewhere = torch.where(hidden, series, 50.0)
    assert task.loss(Says(wrong_elsewhere), (series, hidden)) == 0
    assert task.loss(Says(series + 2 * hidden), (series, hidden)) == pytest.approx(4.0, rel=1e-5)


def test_errors_are_measured_at_each_share():
    task = tasks.make("imputation", {"heldout": 64, "noise": 0.0})

    class Zero(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x[..., :4])

    found, notes = task.measure(Zero(), 32, torch.device("cpu"))
    assert notes == []
    assert list(found) == ["mean", "20%", "50%", "80%"]
    assert found["mean"] == pytest.approx(sum(found[n] for n in ("20%", "50%", "80%")) / 3)
    assert 0.6 < found["mean"] < 0.9, "the mean of |x| at variance 1"


@pytest.mark.parametrize(
    ("option", "value"), [("missing", (0,)), ("missing", (100,)), ("noise", -1.0), ("waves", 0), ("length", 1)]
)
def test_options_that_cannot_be_are_refused(option, value):
    with pytest.raises(TaskError, match=f"task imputation: {option} .*; expected an? "):
        tasks.make("imputation", {option: value})

"""Losses that mechanisms add to the task's: weighed, seen with what the module was called with, and gone afterwards."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import regard
from regard import tasks
from regard.bench.auxiliary import auxiliary_losses
from regard.bench.record import Cell
from regard.bench.train import train
from regard.cards import Card, _registry

SETTINGS = {"steps": 4, "batch": 4, "dim": 16, "depth": 2, "heads": 2, "lr": 1e-2, "match": "params", "device": "cpu"}
TASK = tasks.make("imputation", {"length": 12, "heldout": 8})


class Scaled(nn.Module):
    """x times a learned number, whose own loss draws it towards 3."""

    def __init__(self, dim: int, *, auxiliary_weight: float = 0.5) -> None:
        super().__init__()
        self.number, self.auxiliary_weight = nn.Parameter(torch.ones(1)), auxiliary_weight

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return x * self.number + shift

    def distance(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return (self(x, shift=shift) - 3 * x - shift).square().mean()


@pytest.fixture
def scaled() -> Iterator[str]:
    name = "temporary_scaled"
    card = Card(
        name, equation="y = a x", papers=regard.card("alibi").papers, auxiliary="distance", supports={"bidirectional"}
    )
    card.module(Scaled)
    yield name
    _registry.pop(name, None)


def curve(mechanism: str, task: tasks.Task = TASK) -> list[tuple[int, float]]:
    return train(Cell(task.name, mechanism, 0, SETTINGS), task).curve


@pytest.mark.usefixtures("scaled")
def test_every_call_since_the_last_question_counts_once() -> None:
    model = nn.Sequential(Scaled(4), nn.Linear(4, 4), Scaled(4, auxiliary_weight=2.0), Scaled(4, auxiliary_weight=0.0))
    x = torch.ones(3, 4)
    with auxiliary_losses(model) as losses:
        assert losses() == []
        inner = model(x)
        first, second = losses()
        assert losses() == []
        model[0](x, shift=1.0)
        model[0](x)
        assert [loss.item() for loss in losses()] == [2.0, 2.0]
    assert first.item() == 0.5 * 4
    assert second.item() == pytest.approx(2 * 4 * model[1](x).square().mean().item())
    assert inner.shape == x.shape
    first.backward()
    assert model[0].number.grad.item() == pytest.approx(0.5 * 2 * (1 - 3))


@pytest.mark.usefixtures("scaled")
def test_nothing_stays_behind() -> None:
    model = Scaled(4)
    with pytest.raises(RuntimeError, match="stop"), auxiliary_losses(model) as losses:
        raise RuntimeError("stop")
    model(torch.ones(1, 4))
    assert losses() == []
    assert not model._forward_pre_hooks


def test_training_lowers_it_and_shows_the_tasks_own_loss(scaled: str) -> None:
    without, little, much = (curve(f"{scaled}(auxiliary_weight={weight})") for weight in (0.0, 1e-9, 10.0))
    assert little == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in without]
    assert much[0] == without[0], "before the first step the task's own loss is the same"
    assert much[1:] != without[1:]


def test_a_card_that_names_none_changes_nothing(scaled: str) -> None:
    weightless = curve(f"{scaled}(auxiliary_weight=0.0)")
    object.__setattr__(_registry[scaled], "auxiliary", "")
    assert curve(scaled) == weightless


def test_supergat_learns_to_tell_edges() -> None:
    card = regard.card("supergat")
    if not card.auxiliary:
        pytest.skip("its card names no auxiliary loss yet")
    task = tasks.make("nodes", {"nodes": 12, "heldout": 2})
    without, much = (curve(f"supergat(auxiliary_weight={weight})", task) for weight in (0.0, 4.0))
    assert without[0] == much[0]
    assert without[1:] != much[1:]

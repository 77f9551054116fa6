"""The nearest point: what is shown, what is asked, and that it is the sphere's geometry that is."""

import pytest
import torch

from regard import tasks
from regard.tasks import TaskError


class Says(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def test_points_ask_for_their_farthest():
    x, target = next(tasks.make("nearest_point", {"points": 6, "features": 3}).batches(4, 0))
    assert x.shape == target.shape == (4, 6, 3)
    for b in range(4):
        for i in range(6):
            distances = [(x[b, i] - x[b, j]).norm().item() for j in range(6)]
            assert torch.equal(target[b, i], x[b, distances.index(max(distances))])


def test_marked_queries_ask_for_their_nearest():
    task = tasks.make("nearest_point", {"points": 6, "queries": 2, "features": 3})
    assert task.tokens == 8
    x, target = next(task.batches(4, 0))
    assert (x.shape, target.shape) == ((4, 8, 4), (4, 2, 3))
    assert x[..., 3].tolist() == 4 * [6 * [0.0] + 2 * [1.0]]
    for b in range(4):
        for i in range(2):
            distances = [(x[b, 6 + i, :3] - x[b, j, :3]).norm().item() for j in range(6)]
            assert torch.equal(target[b, i], x[b, distances.index(min(distances)), :3])


@pytest.mark.parametrize(("variant", "tokens"), [("uniform", 4), ("orthogonal", 4), ("doubled", 8)])
def test_variants(variant, tokens):
    task = tasks.make("nearest_point", {"points": 4, "features": 5, "variant": variant})
    x, target = next(task.batches(3, 0))
    assert x.shape[1] == task.tokens == tokens
    assert variant in task.describe()
    if variant == "doubled":
        assert torch.equal(target, -x)


@pytest.mark.parametrize("queries", [0, 3])
def test_nothing_said_scores_one_and_only_queries_count(queries):
    task = tasks.make("nearest_point", {"points": 5, "queries": queries, "features": 3, "heldout": 16})
    nothing = Says(lambda x: torch.zeros(*x.shape[:2], 3))
    found, notes = task.measure(nothing, 4, torch.device("cpu"))
    assert (list(found), notes) == (["error"], [])
    assert found["error"] == pytest.approx(1)
    x, target = next(task.batches(4, 0))
    assert task.loss(nothing, (x, target)) == pytest.approx(1)
    right = torch.full((4, x.shape[1], 3), 9.0)
    right[:, -target.shape[1] :] = target
    assert task.loss(Says(lambda x: right), (x, target)) == 0


@pytest.mark.parametrize(
    ("option", "value"), [("features", 1), ("points", 1), ("queries", -1), ("heldout", 0), ("variant", "near")]
)
def test_options_that_cannot_be_are_refused(option, value):
    with pytest.raises(TaskError, match=f"task nearest_point: {option} .*; expected "):
        tasks.make("nearest_point", {option: value})


def test_no_more_orthogonal_points_than_dimensions():
    with pytest.raises(TaskError, match=r"points are too many to be orthogonal \(got 9\); expected at most features"):
        tasks.make("nearest_point", {"points": 9, "features": 8, "variant": "orthogonal"})

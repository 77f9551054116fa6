"""Nodes: graphs of the stochastic block model, side by side, that edges help to tell apart."""

import pytest
import torch

from regard import tasks
from regard.models.mixer import parse
from regard.tasks import Size, TaskError
from regard.tasks.nodes import block_model


def graphs(**changes):
    sizes = {"graphs": 30, "nodes": 40, "classes": 3, "near": 0.3, "far": 0.05, "noise": 0.5} | changes
    return block_model(**sizes, generator=torch.Generator().manual_seed(0))


def test_edges_stand_both_ways_and_in_their_own_graph():
    _, edges, _ = graphs()
    pairs = set(map(tuple, edges.T.tolist()))
    assert len(pairs) == edges.shape[1], "no edge twice"
    assert all((b, a) in pairs and a != b and a // 40 == b // 40 for a, b in pairs)


def test_classes_are_joined_as_often_as_said():
    _, (one, other), label = graphs()
    same = label.view(30, 40)[:, :, None] == label.view(30, 40)[:, None]
    alike = (label[one] == label[other]).sum().item()
    assert alike / (same.sum() - 30 * 40) == pytest.approx(0.3, abs=0.01)
    assert (len(one) - alike) / (~same).sum() == pytest.approx(0.05, abs=0.005)


def test_features_are_classes_in_noise():
    features, _, label = graphs()
    noise = features - torch.nn.functional.one_hot(label, 3)
    assert noise.mean().abs() < 0.03
    assert noise.std() == pytest.approx(0.5, abs=0.02)
    exact, _, label = graphs(noise=0)
    assert torch.equal(exact.argmax(1), label)


def test_graphs_of_a_batch_do_not_meet():
    task = tasks.make("nodes", {"nodes": 20})
    model = task.model(parse("gatv2"), Size(16, 2, 2, 16)).eval()
    features, edges, _ = next(task.batches(2, 0))
    alone = edges[:, edges[0] < 20]
    torch.testing.assert_close(model(features, edges)[:20], model(features[:20], alone))


def test_accuracy_is_the_share_of_right_answers():
    task = tasks.make("nodes", {"nodes": 30, "noise": 0.0, "heldout": 4})

    class Reads(torch.nn.Module):
        def forward(self, features, edges):
            return features

    assert task.measure(Reads(), 2, torch.device("cpu")) == ({"accuracy": 1.0}, [])


@pytest.mark.parametrize(
    ("option", "value"), [("near", 1.5), ("far", -0.1), ("noise", "x"), ("classes", 1), ("nodes", 0)]
)
def test_options_that_cannot_be_are_refused(option, value):
    with pytest.raises(TaskError, match=f"task nodes: {option} .*; expected an? "):
        tasks.make("nodes", {option: value})


@pytest.mark.slow
def test_neighbours_help():
    """The same host learns more with its edges than without."""
    task = tasks.make("nodes", {"nodes": 64, "heldout": 16})

    def trained(edges):
        torch.manual_seed(0)
        model = task.model(parse("gatv2"), Size(24, 2, 2, 24))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _, (features, joined, label) in zip(range(80), task.batches(8, 0)):
            loss = task.loss(model, (features, joined if edges else joined[:, :0], label))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        features, joined, label = next(task.batches(64, 1))
        return (model(features, joined if edges else joined[:, :0]).argmax(1) == label).double().mean().item()

    assert trained(edges=True) > trained(edges=False) + 0.05

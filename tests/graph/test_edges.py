"""What every graph mechanism rests on: softmax and sums over the edges into a node."""

import pytest
import torch

from regard.graph._edges import check_edges, edge_mean, edge_softmax, edge_sum, with_loops
from regard.laws.agreement import close


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [(), (3,), (2, 3)])
def test_softmax_and_sum_equal_a_loop_over_nodes(width: tuple[int, ...]) -> None:
    target = torch.tensor([3, 0, 3, 1, 3, 0, 5])  # nobody points at 2 and 4
    keep = torch.tensor([True, False, True, True, True, True, False])
    scores = normal(1, 7, *width)
    weights = edge_softmax(scores, target, 6, keep)
    want = torch.zeros_like(scores)
    for i in range(6):
        into = [e for e in range(7) if target[e] == i and keep[e]]
        if into:
            want[into] = scores[into].softmax(0)
    close(weights, want)
    close(
        edge_sum(weights, target, 6),
        torch.tensor([1.0, 1, 0, 1, 0, 0]).double().view(6, *(1,) * len(width)).expand(6, *width),
    )


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_softmax_stays_in_range(shift: float) -> None:
    target = torch.tensor([0, 0, 1])
    scores = normal(1, 3)
    close(edge_softmax(scores + shift * torch.tensor([1, 1, -1]), target, 2), edge_softmax(scores, target, 2))
    assert edge_softmax(scores.bfloat16(), target, 2).dtype == torch.float32


def test_softmax_derivatives() -> None:
    target, keep = torch.tensor([2, 0, 2, 2, 1, 0]), torch.tensor([True, True, True, False, False, True])
    scores = normal(1, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: edge_softmax(s, target, 3, keep), (scores,))
    assert torch.autograd.gradgradcheck(lambda s: edge_softmax(s, target, 3, keep), (scores,))


def test_nan_stays_with_its_node() -> None:
    scores = torch.tensor([float("nan"), 1.0, 2.0, 3.0])
    weights = edge_softmax(scores, torch.tensor([0, 0, 1, 1]), 2)
    assert weights.isnan().tolist() == [True, True, False, False]


def test_loops_take_the_place_of_those_there() -> None:
    edges, keep = with_loops(torch.tensor([[0, 1, 1, 2], [1, 1, 0, 2]]), 3)
    assert edges[:, keep].tolist() == [[0, 1, 0, 1, 2], [1, 0, 0, 1, 2]]
    mean = edge_mean(torch.tensor([[1.0], [7.0], [3.0], [9.0]]), edges[1, :4], 3, keep[:4])
    assert mean.tolist() == [[3.0], [1.0], [0.0]]


def test_empty() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert edge_softmax(torch.zeros(0, 2), none[1], 3).shape == (0, 2)
    assert not edge_sum(torch.zeros(0, 2), none[1], 3).any()
    check_edges("here", none, 0, 0)


def test_bad_edges() -> None:
    for edges, error, words in (
        ([[0], [1]], TypeError, r"edge_index has the wrong type \(got list\); expected a Tensor \(2, E\)"),
        (torch.zeros(2, 3), TypeError, r"edge_index has the wrong dtype \(got torch.float32\); expected torch.int32"),
        (torch.zeros(2, 3, dtype=torch.uint8), TypeError, r"edge_index has the wrong dtype \(got torch.uint8\)"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, r"edge_index has the wrong shape \(got \(3, 2\)\)"),
        (torch.tensor([[0], [3]]), ValueError, r"names unknown nodes \(got .*targets 3 to 3\); expected 0 to 2"),
        (torch.tensor([[-1], [0]]), ValueError, r"names unknown nodes \(got sources -1 to -1"),
    ):
        with pytest.raises(error, match=words):
            check_edges("here", edges, 3, 3)

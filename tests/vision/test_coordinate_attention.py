"""Coordinate attention against loops over strips, and the numbers of the authors' code and of timm (A100)."""

import pytest
import torch

from regard.laws.agreement import close
from regard.vision import CoordinateAttention
from vision.gates import equals_the_loops, gives_the_numbers, moved_by, statistics
from vision.naive_coordinate_attention import coordinate_attention, reduced_width
from vision.shared import filled, leaves, normal


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 3), (2, 3, 2)])
def test_equals_the_loops(sizes: tuple[int, ...], training: bool) -> None:
    layer = filled(CoordinateAttention(4, inner_dim=3, axes=len(sizes))).train(training)
    (x,) = leaves(normal(1, 2, 4, *sizes))
    weights, biases = [up.weight for up in layer.up], [up.bias for up in layer.up]
    first = (layer.down.weight, layer.down.bias, statistics(layer.norm))
    want = coordinate_attention(x, *first, weights, biases, training=training)
    equals_the_loops(layer, layer(x), want, x)


@pytest.mark.parametrize("case", ["offeval", "offtrain", "timm"])
def test_gives_the_authors_and_timms_numbers(case: str) -> None:
    layer = CoordinateAttention(10, inner_dim=3, bias=False) if case == "timm" else CoordinateAttention(10, reduction=4)
    names = {"conv1": "down", "bn1": "norm", "conv_h": "up.0", "conv_w": "up.1"}
    gives_the_numbers(layer, "A100", case, names, training=case == "offtrain")


def test_the_width_is_the_authors() -> None:
    for dim in (8, 10, 64, 300, 512):
        assert CoordinateAttention(dim).inner_dim == reduced_width(dim)


def test_knows_rows_and_columns_but_no_neighbours() -> None:
    layer = filled(CoordinateAttention(6))
    for what in ("rows", "columns"):
        assert moved_by(layer, what) < 1e-12
    assert moved_by(layer, "pixels") > 0.05


def test_gates_of_a_channel_have_rank_1() -> None:
    layer, x = filled(CoordinateAttention(4)), normal(1, 2, 4, 5, 3)
    gate = layer.gate(x)
    close(x * gate, layer(x))
    assert (torch.linalg.matrix_rank(gate, rtol=1e-10) == 1).all()
    rows, columns = layer.gates(x)
    close(rows[..., None] * columns[:, :, None], gate)
    assert (torch.linalg.matrix_rank(layer(x) / x, rtol=1e-8) == 1).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"axes is unknown \(got 1\)"):
        CoordinateAttention(8, axes=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inner_dim is too small \(got 0\)"):
        CoordinateAttention(8, inner_dim=0)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, Z, Y, X\)"):
        CoordinateAttention(8, axes=3)(torch.zeros(2, 8, 3, 3))

"""CBAM against loops over pixels, and timm's numbers (B199)."""

import pytest
import torch

from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import CBAM, ChannelGate, SpatialGate
from vision.gates import equals_the_loops, gives_the_numbers, moved_by, statistics
from vision.naive_gates import cbam, cbam_channel, cbam_spatial
from vision.shared import filled, leaves, normal


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4), (1, 5), (2, 1)])
def test_equals_the_loops(sizes: tuple[int, int], training: bool) -> None:
    layer = filled(CBAM(4, inner_dim=2, kernel=3)).train(training)
    (x,) = leaves(normal(1, 2, 4, *sizes))
    mlp, spatial = layer.channel.mlp, layer.spatial
    p = (mlp.down.weight, mlp.up.weight, spatial.conv.weight, statistics(spatial.norm))
    want = cbam(x, *p, training=training)
    equals_the_loops(layer, layer(x), want, x)


def test_parts_equal_the_loops() -> None:
    x = normal(2, 2, 4, 3, 5)
    channel, spatial = filled(ChannelGate(4, 2)), filled(SpatialGate(5))
    close(channel(x), cbam_channel(x, channel.mlp.down.weight, channel.mlp.up.weight))
    close(spatial(x), cbam_spatial(x, spatial.conv.weight, statistics(spatial.norm)))


NAMES = {"channel__fc1": "channel.mlp.down", "channel__fc2": "channel.mlp.up"}
NAMES |= {"spatial__conv__conv": "spatial.conv", "spatial__conv__bn": "spatial.norm"}


@pytest.mark.parametrize(("case", "kernel"), [("cbam", 3), ("cbamtrain", 7)])
def test_gives_timms_numbers(case: str, kernel: int) -> None:
    gives_the_numbers(CBAM(12, inner_dim=3, kernel=kernel), "B199", case, NAMES, training=case == "cbamtrain")


def test_with_biases_as_the_authors() -> None:
    """Both pooled vectors pass the same bottleneck, so that the last bias counts twice."""
    layer = filled(CBAM(4, inner_dim=2, bias=True))
    mlp, x = layer.channel.mlp, normal(1, 2, 4, 3, 5)
    pooled = (x.mean((2, 3)), x.amax((2, 3)))
    score = sum((z @ mlp.down.weight.T + mlp.down.bias).relu() @ mlp.up.weight.T for z in pooled) + 2 * mlp.up.bias
    close(layer.channel.gate(x), score.sigmoid()[..., None, None])


def test_gates_are_what_the_map_is_multiplied_by() -> None:
    layer, x = filled(CBAM(4, inner_dim=2)), normal(1, 2, 4, 3, 5)
    gate = layer.gate(x)
    close(x * gate, layer(x))
    assert gate.min() > 0
    assert gate.max() < 1


def test_knows_neighbours() -> None:
    """Its channels' gate alone commutes with any shuffle."""
    layer = filled(CBAM(6, inner_dim=3))
    for what in ("pixels", "rows", "columns"):
        assert moved_by(layer, what) > 0.05
        assert moved_by(layer.channel, what) < 1e-12


def test_costs_little() -> None:
    """Behind the pooling the channels' gate costs the same on any map."""
    layer = filled(CBAM(32))
    one, two, three = (flops(lambda n=n: layer(normal(0, 1, 32, 8, n))) for n in (8, 16, 24))
    assert three - two == two - one == 2 * 8 * 8 * 2 * 49
    assert sum(p.numel() for p in layer.parameters()) == 2 * 32 * 2 + 2 * 49 + 2


def test_an_empty_map_stays_one() -> None:
    layer = filled(CBAM(4))
    assert layer(normal(0, 0, 4, 2, 3)).shape == (0, 4, 2, 3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kernel is even \(got 4\); expected an odd one"):
        CBAM(8, kernel=4)
    with pytest.raises(ValueError, match=r"inner_dim is too small \(got 0\)"):
        CBAM(8, inner_dim=0)
    with pytest.raises(ValueError, match=r"reduction is out of range \(got 0\)"):
        CBAM(8, reduction=0)
    with pytest.raises(ValueError, match=r"momentum is out of range \(got 2\)"):
        SpatialGate(momentum=2)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, Y, X\)"):
        CBAM(8)(torch.zeros(2, 4, 3, 3))

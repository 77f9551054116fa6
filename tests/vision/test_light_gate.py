"""The light gate against loops over channels and places, and what is measured of placements."""

from functools import partial

import pytest
import torch
from torch import nn

from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import LightGate, placements
from vision.naive_light_gate import light_gate, parameter_count
from vision.shared import filled, gradients, leaves, normal


@pytest.mark.parametrize("axes", ["channel", "space", "both"])
@pytest.mark.parametrize("reduction", [2, 16])
def test_equals_the_loops(axes: str, reduction: int) -> None:
    layer = filled(LightGate(4, reduction=reduction, over=axes))
    (x,) = leaves(normal(1, 2, 4, 3, 2))
    channel = None if axes == "space" else (layer.down.weight, layer.down.bias, layer.up.weight, layer.up.bias)
    space = None if axes == "channel" else (layer.place.weight, layer.place.bias)
    got, want = layer(x), light_gate(x, channel, space, axes=axes)
    close(got, want)
    inputs = [x, *layer.parameters()]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)
    assert sum(p.numel() for p in layer.parameters()) == parameter_count(4, reduction, axes)


def test_starts_nearly_open() -> None:
    torch.manual_seed(0)
    x = normal(1, 4, 32, 5, 5)
    gate = LightGate(32).double()(x) / x
    assert gate.min() > 0.85
    assert gate.max() < 1


@torch.no_grad()
def test_work_grows_with_places_not_with_their_pairs() -> None:
    """Products counted; and what is gated at one place does not depend on the others, the channels' mean apart."""
    layer = filled(LightGate(8))
    one, two, three = (flops(partial(layer, normal(0, 1, 8, 8, width))) for width in (8, 16, 24))
    assert three - two == two - one > 0
    assert one < 8 * 8 * 8 * 8, "less than one product of pairs of places"


def test_placements_are_tried_one_by_one() -> None:
    stages = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)]
    widths, seen = (4, 5, 6), []

    def score(network: nn.Module) -> float:
        kinds = [type(part) for part in network]
        seen.append([int(kinds[: n + 1].count(nn.Conv2d)) - 1 for n, kind in enumerate(kinds) if kind is LightGate])
        return float(len(kinds))

    found = placements(stages, lambda n: LightGate(widths[n]), torch.randn(1, 3, 9, 9), score, repeats=1)
    assert [p.places for p in found] == [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    assert [tuple(places) for places in seen] == [p.places for p in found]
    assert [p.score for p in found] == [3.0, 4.0, 4.0, 4.0, 5.0, 5.0, 5.0]
    for p in found:
        assert p.seconds > 0
        assert p.parameters - found[0].parameters == sum(parameter_count(widths[n]) for n in p.places)


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"over is unknown \(got 'time'\)"):
        LightGate(4, over="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"placements: stages are none"):
        placements([], lambda n: LightGate(4), torch.zeros(1, 4, 2, 2), lambda network: 0.0)
    for shape in ((0, 4, 2, 2),):
        assert LightGate(4)(torch.zeros(shape)).shape == shape

"""Efficient local attention against loops over channels and places."""

import pytest
import torch

from regard.laws.agreement import close
from regard.vision import EfficientLocalAttention
from regard.vision.ela import VERSIONS
from vision.naive_ela import efficient_local_attention, parameter_count
from vision.shared import filled, gradients, leaves, normal


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"norm_groups": 2}, (3, 2)),
        ({"norm_groups": 4, "kernel_size": 3, "group_width": 2}, (2, 4)),
        ({"norm_groups": 1, "kernel_size": 5, "group_width": 4, "shared": False}, (2, 2)),
        ({"norm_groups": 4, "shared": False}, (1, 3)),
    ],
)
def test_equals_the_loops(options: dict, sizes: tuple[int, int]) -> None:
    layer = filled(EfficientLocalAttention(4, **options))
    (x,) = leaves(normal(1, 2, 4, *sizes))
    rows, columns = layer.rows, layer.columns
    other = {}
    if columns is not None:
        other = {
            "conv_weight_x": columns.conv.weight,
            "gn_weight_x": columns.norm.weight,
            "gn_bias_x": columns.norm.bias,
        }
    got = layer(x)
    want = efficient_local_attention(
        x,
        rows.conv.weight,
        rows.norm.weight,
        rows.norm.bias,
        groups=4 // options.get("group_width", 1),
        norm_groups=options["norm_groups"],
        **other,
    )
    close(got, want)
    inputs = [x, *layer.parameters()]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


@torch.no_grad()
def test_the_gates_locate_a_row_and_a_column() -> None:
    """What stands out at one place opens its row and its column, all other rows and columns alike are shut more."""
    layer = filled(EfficientLocalAttention(4, norm_groups=4))
    for part in (layer.rows.conv.weight, layer.rows.norm.bias):
        part.zero_()
    layer.rows.conv.weight[:, :, 3] = 1.0  # the convolution's centre alone
    layer.rows.norm.weight.fill_(2.0)
    x = torch.ones(1, 4, 6, 8, dtype=torch.float64)
    x[:, :, 2, 5] = 9.0
    gate = layer(x) / x
    for axis, place, size in ((2, 2, 6), (3, 5, 8)):
        along = gate.mean(5 - axis)
        assert (along.argmax(2) == place).all()
        rest = along[..., [n for n in range(size) if n != place]]
        close(rest, rest[..., :1].expand_as(rest))
        assert (along[..., place] > 1.5 * rest.amax(-1)).all()


def test_shared_gates_turn_with_the_map_and_do_not_see_its_scale() -> None:
    shared, apart = (filled(EfficientLocalAttention(4, norm_groups=2, shared=s)) for s in (True, False))
    x = normal(1, 2, 4, 5, 3)
    close(shared(x.mT), shared(x).mT)
    assert (apart(x.mT) - apart(x).mT).abs().max() > 1e-3
    for one, other in zip(shared.gates(x), shared.gates(1000 * x), strict=True):
        assert (one - other).abs().max() < 1e-2


def test_parameters_of_the_versions() -> None:
    for name, version in VERSIONS.items():
        layer = EfficientLocalAttention(256, **version)
        groups = 256 // version["group_width"]
        assert sum(p.numel() for p in layer.parameters()) == parameter_count(256, version["kernel_size"], groups), name
    light = EfficientLocalAttention(256, **VERSIONS["T"])
    assert sum(p.numel() for p in light.parameters()) < 2 * 256**2 / 16, "fewer than squeeze and excitation has"


def test_a_strip_of_one_place_has_the_gate_of_its_bias() -> None:
    layer = filled(EfficientLocalAttention(4, norm_groups=4))
    a, _ = layer.gates(normal(1, 1, 4, 1, 6))
    close(a, layer.rows.norm.bias.sigmoid()[None, :, None])


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is even \(got 4\); expected an odd one"):
        EfficientLocalAttention(16, kernel_size=4)
    with pytest.raises(ValueError, match=r"dim is no multiple of norm_groups = 16 \(got 24\)"):
        EfficientLocalAttention(24)
    with pytest.raises(ValueError, match=r"dim is no multiple of group_width = 5 \(got 16\)"):
        EfficientLocalAttention(16, group_width=5)
    layer = EfficientLocalAttention(16)
    for shape in ((0, 16, 3, 3),):
        assert layer(torch.zeros(shape)).shape == shape

"""DAS against loops, whose author saw an account of the paper alone, neither code nor test."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.kernels.flops import FlopCounter
from regard.laws.agreement import close
from regard.vision.deformable_gate import DeformableGate, deformable_conv
from vision import naive_deformable_gate as naive
from vision.shared import filled, gradients, leaves, normal


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("far", [0.3, 1.0, 4.0])
def test_the_convolution_is_its_definition(k: int, far: float) -> None:
    x, offsets = normal(1, 2, 3, 4, 5), far * normal(2, 2, 2 * k * k, 4, 5)
    given = leaves(x, offsets, normal(3, 4, 3, k, k), normal(4, 4))
    got, want = deformable_conv(*given), naive.deformable_conv(*given)
    close(got, want)
    for a, b in zip(gradients(got, given), gradients(want, given), strict=True):
        close(a, b)


def test_offsets_of_whole_pixels() -> None:
    """Of 0, a convolution; of 1, that of the map that has moved. The slope at a whole place is that of the cell behind
    it, as torch's grid_sample has it."""
    x, weight, bias = normal(1, 2, 3, 4, 5), normal(3, 4, 3, 3, 3), normal(4, 4)
    (offsets,) = leaves(torch.zeros(2, 18, 4, 5, dtype=torch.float64))
    out = deformable_conv(x, offsets, weight, bias)
    close(out, F.conv2d(x, weight, bias, padding=1))
    want = naive.deformable_conv(x, offsets, weight, bias)
    close(gradients(out, [offsets])[0], gradients(want, [offsets])[0])
    moved = torch.zeros(2, 18, 4, 5, dtype=torch.float64)
    moved[:, 1::2] = 1
    close(deformable_conv(x, moved, weight, bias), F.conv2d(F.pad(x, (0, 2, 1, 1)), weight, bias))
    close(deformable_conv(x, moved + 50, weight, bias), bias[:, None, None].expand(2, 4, 4, 5))
    close(deformable_conv(x, moved - 1e12, weight), torch.zeros(2, 4, 4, 5).double())
    moved[0, 0, 1, 2] = float("nan")
    lost = deformable_conv(x, moved, weight).isnan()
    assert lost[0, :, 1, 2].all()
    assert lost.sum() == 4


def weights(layer: DeformableGate) -> dict[str, Tensor]:
    return {
        "depth_weight": layer.depth.weight,
        "point_weight": layer.point.weight,
        "offset_weight": layer.offset.weight,
        "offset_bias": layer.offset.bias,
        "deform_weight": layer.look.weight,
        "deform_bias": layer.look.bias,
        "ln_weight": layer.weight,
        "ln_bias": layer.bias,
        "axes": "all" if layer.norm == "map" else "channels",
    }


@pytest.mark.parametrize("options", [{}, {"norm": "map", "ratio": 0.5}, {"kernel": 5, "ratio": 0.4}])
def test_is_the_definition(options: dict) -> None:
    layer = filled(DeformableGate(6, **options))
    (x,) = leaves(normal(5, 2, 6, 3, 4))
    got, want = layer(x), naive.deformable_gate(x, **weights(layer))
    close(got, want)
    of = [x, *layer.parameters()]
    for a, b in zip(gradients(got, of), gradients(want, of), strict=True):
        close(a, b)
    close(layer.gate(x), naive.gate(x, **weights(layer)))
    z = naive.reduced(x, layer.depth.weight, layer.point.weight)
    close(layer.offsets(x), naive.offsets(z, layer.offset.weight, layer.offset.bias))


def test_looks_where_its_offsets_say() -> None:
    """Four columns to the right, outside of every kernel: the gate of a pixel is the one that stood there."""
    layer = filled(regard.create("deformable_gate", dim=6, num_heads=1))
    x = normal(6, 1, 6, 5, 12)
    nn.init.zeros_(layer.offset.weight)
    gates = []
    for columns in (0.0, 4.0):
        with torch.no_grad():
            layer.offset.bias.zero_()
            layer.offset.bias[1::2] = columns
        assert torch.equal(layer.offsets(x)[:, 1::2], torch.full((1, 9, 5, 12), columns).double())
        gates.append(layer(x) / x)
    plain, far = gates
    close(far[..., 1:7], plain[..., 5:11])
    assert (far[..., 1:7] - plain[..., 1:7]).abs().max() > 0.1
    assert far.min() > 0
    assert far.max() < 1


def test_learns_how_far_to_look() -> None:
    """The target is what stands 2 columns to the right, and so the offset comes to about 2."""
    row, column = torch.arange(12.0)[:, None], torch.arange(40.0)
    x = ((row / 4).cos() + (column / 4).sin()).expand(4, 1, 12, 40)
    want, offsets = x.roll(-2, 3), torch.zeros(1, 2, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([offsets], 0.2)
    for _ in range(80):
        out = deformable_conv(x, offsets.expand(4, 2, *x.shape[2:]), torch.ones(1, 1, 1, 1))
        loss = (out - want)[..., 4:-4].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(offsets[0, 1].item() - 2) < 0.1
    assert abs(offsets[0, 0].item()) < 0.1


def test_cost_is_linear_in_pixels() -> None:
    layer = regard.create("deformable_gate", dim=20, num_heads=1)
    counts = []
    for side in (8, 16):
        with FlopCounter() as counter:
            layer(torch.randn(1, 20, side, side))
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


@pytest.mark.parametrize("dim", [64, 256])
def test_parameters(dim: int) -> None:
    layer = DeformableGate(dim)
    assert sum(p.numel() for p in layer.parameters()) == naive.parameter_count(dim)
    assert not layer.offset.weight.any()
    assert not layer.offset.bias.any()


def test_what_is_refused() -> None:
    layer = DeformableGate(6)
    assert layer(torch.zeros(0, 6, 3, 3)).shape == (0, 6, 3, 3)
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(1, 6, 0, 3\)\)"):
        layer(torch.zeros(1, 6, 0, 3))
    with pytest.raises(ValueError, match=r"x is one pixel, which has no statistics \(got \(1, 6, 1, 1\)\)"):
        layer(torch.zeros(1, 6, 1, 1))
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(1, 5, 3, 3\)\)"):
        layer(torch.zeros(1, 5, 3, 3))
    with pytest.raises(ValueError, match=r"kernel is even \(got 4\)"):
        DeformableGate(6, kernel=4)
    with pytest.raises(ValueError, match=r"ratio is out of range \(got 0\)"):
        DeformableGate(6, ratio=0)
    with pytest.raises(ValueError, match=r"norm is unknown \(got 'group'\)"):
        DeformableGate(6, norm="group")
    x = normal(1, 1, 2, 3, 3)
    with pytest.raises(
        ValueError, match=r"deformable_conv: offsets are not of these taps \(got 8\); expected 2 k k = 18"
    ):
        deformable_conv(x, normal(2, 1, 8, 3, 3), normal(3, 2, 2, 3, 3))
    with pytest.raises(ValueError, match=r"weight has no tap in its middle"):
        deformable_conv(x, normal(2, 1, 8, 3, 3), normal(3, 2, 2, 2, 2))

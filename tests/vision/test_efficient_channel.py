"""ECA against loops over channels, and timm's numbers (B199)."""

import pytest
import torch

from regard.vision import EfficientChannelAttention
from regard.vision.efficient_channel import kernel_size
from vision.gates import equals_the_loops, gives_the_numbers, moved_by
from vision.naive_gates import eca_kernel_size, efficient_channel_attention
from vision.shared import filled, leaves, normal


@pytest.mark.parametrize("border", ["zeros", "circular"])
@pytest.mark.parametrize(("dim", "kernel"), [(6, 3), (5, 5), (2, 5)])
def test_equals_the_loops(dim: int, kernel: int, border: str) -> None:
    layer = filled(EfficientChannelAttention(dim, kernel=kernel, border=border))
    (x,) = leaves(normal(1, 2, dim, 3, 2))
    want = efficient_channel_attention(x, layer.conv.weight, circular=border == "circular")
    equals_the_loops(layer, layer(x), want, x)


@pytest.mark.parametrize(("case", "border"), [("eca", "zeros"), ("ceca", "circular")])
def test_gives_timms_numbers(case: str, border: str) -> None:
    gives_the_numbers(EfficientChannelAttention(12, kernel=5, border=border), "B199", case, {"conv": "conv"})


def test_the_kernels_size_follows_the_channels() -> None:
    assert [kernel_size(dim) for dim in (16, 64, 128, 256, 1024)] == [3, 3, 5, 5, 5]
    assert all(kernel_size(dim) == eca_kernel_size(dim) for dim in range(1, 3000, 7))


@pytest.mark.parametrize("border", ["zeros", "circular"])
def test_a_gate_reads_k_channels(border: str) -> None:
    """Those beside its own, so that the channels' order counts, and that of pixels does not."""
    layer = filled(EfficientChannelAttention(8, kernel=3, border=border))
    assert sum(p.numel() for p in layer.parameters()) == 3
    x = normal(2, 1, 8, 2, 3)
    slopes = torch.autograd.functional.jacobian(lambda z: layer(z) / z, x)
    slopes = slopes.abs().amax((0, 2, 3, 4, 6, 7))
    apart = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    apart = torch.minimum(apart, 8 - apart) if border == "circular" else apart
    assert torch.equal(slopes > 1e-9, apart <= 1)
    assert moved_by(layer, "pixels") < 1e-12


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kernel is even \(got 4\); expected an odd one"):
        EfficientChannelAttention(8, kernel=4)
    with pytest.raises(ValueError, match=r"kernel goes round more than once \(got 7\); expected at most 5"):
        EfficientChannelAttention(2, kernel=7, border="circular")
    with pytest.raises(ValueError, match=r"border is unknown \(got 'wrap'\)"):
        EfficientChannelAttention(8, border="wrap")  # type: ignore[arg-type]

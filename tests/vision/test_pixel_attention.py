"""Pixel attention and PAN against loops, whose author saw only the paper's account, and the authors' numbers."""

import re

import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import flops
from regard.laws.agreement import close
from regard.vision.pixel_attention import (
    PixelAttention,
    SelfCalibratedPixelAttention,
    UpsamplingPixelAttention,
    pan,
    pixel_gate,
)
from vision import naive_pixel_attention as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def made(name: str, dim: int, seed: int = 0, **options) -> nn.Module:
    return filled(regard.create(name, dim=dim, num_heads=1, causal=False, **options), seed)


def agree(got: Tensor, want: Tensor, wanted: list[Tensor]) -> None:
    close(got, want)
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


def both(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    return conv.weight, conv.bias


def block_weights(block: SelfCalibratedPixelAttention) -> list[Tensor]:
    inner = block.gated
    first = [block.plain_in.weight, block.gated_in.weight, block.plain.weight]
    return [*first, *both(inner.gate_proj), inner.inner.weight, inner.outer.weight, block.join.weight]


def stage_weights(stage: UpsamplingPixelAttention) -> list[list[Tensor]]:
    gates = [one.gate_proj for one in stage.attention]
    return [[*both(a), *both(g), *both(b)] for a, g, b in zip(stage.up, gates, stage.after, strict=True)]


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 1, 1, 2)])
def test_the_gate_equals_the_loops(shape: tuple[int, ...]) -> None:
    layer, (x,) = made("pixel_attention", shape[1]), leaves(normal(1, *shape))
    agree(layer(x), naive.pixel_attention(x, *both(layer.gate_proj)), [x, *layer.parameters()])
    close(layer.gate(x), naive.pixel_gate(x, *both(layer.gate_proj)))
    wide = normal(3, 2, shape[1], 1, 1)  # a gate for maps of another width
    close(pixel_gate(x, wide, None), naive.pixel_gate(x, wide, torch.zeros(2, dtype=x.dtype)))


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"slope": 0.0}])
def test_the_block_equals_the_loops(options: dict[str, float]) -> None:
    layer, (x,) = made("scpa", 4, **options), leaves(normal(1, 2, 4, 4, 3))
    want = naive.self_calibrated_pixel_attention(x, *block_weights(layer), **options)
    agree(layer(x), want, [x, *layer.parameters()])


def test_a_wider_join_reads_both_branches_at_every_reduction() -> None:
    layer, (x,) = made("scpa", 6, reduction=3), leaves(normal(1, 1, 6, 3, 3))
    agree(layer(x), naive.self_calibrated_pixel_attention(x, *block_weights(layer)), [x, *layer.parameters()])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_network_equals_the_loops(scale: int) -> None:
    net = filled(pan(dim=4, up_dim=3, blocks=2, scale=scale, channels=2))
    (image,) = leaves(normal(1, 1, 2, 2, 3))
    stages, last = stage_weights(net.upsampler[0]), both(net.upsampler[1])
    blocks = [block_weights(b) for b in net.body]
    want = naive.pan(image, scale, *both(net.first), blocks, *both(net.trunk), stages, *last)
    agree(net(image), want, [image, *net.parameters()])


NAMES = (
    (r"PAConv\.k2", "gated.gate_proj"),
    (r"PAConv\.k3", "gated.inner"),
    (r"PAConv\.k4", "gated.outer"),
    (r"conv1_a", "plain_in"),
    (r"conv1_b", "gated_in"),
    (r"k1\.0", "plain"),
    (r"conv3", "join"),
    (r"conv_first", "first"),
    (r"SCPA_trunk", "body"),
    (r"trunk_conv", "trunk"),
    (r"upconv1", "upsampler.0.up.0"),
    (r"upconv2", "upsampler.0.up.1"),
    (r"att1\.conv", "upsampler.0.attention.0.gate_proj"),
    (r"att2\.conv", "upsampler.0.attention.1.gate_proj"),
    (r"HRconv1", "upsampler.0.after.0"),
    (r"HRconv2", "upsampler.0.after.1"),
    (r"conv_last", "upsampler.1"),
    (r"^conv\.", "gate_proj."),
)


def ours(name: str) -> str:
    for pattern, replaced in NAMES:
        name = re.sub(pattern, replaced, name)
    return name


@pytest.mark.parametrize("case", ["pa", "scpa", "scpad", "pan2", "pan3", "pan4"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("A064", case)
    if case.startswith("pan"):
        layer = pan(dim=4, up_dim=3, blocks=2, scale=int(case[-1]))
    else:
        dim = z["x"].shape[1]
        layer = (
            PixelAttention(dim) if case == "pa" else SelfCalibratedPixelAttention(dim, dilation=1 + (case[-1] == "d"))
        )
    layer = layer.double()
    layer.load_state_dict({ours(n.removeprefix("p_")): p for n, p in z.items() if n.startswith("p_")})
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    theirs = {ours(n.removeprefix("g_")): g for n, g in z.items() if n.startswith("g_")}
    assert theirs.keys() == dict(layer.named_parameters()).keys()
    for name, p in layer.named_parameters():
        close(p.grad, theirs[name])


def test_a_pixel_answers_to_itself_alone() -> None:
    layer, (x,) = made("pixel_attention", 4), leaves(normal(1, 1, 4, 5, 6))
    changed = torch.autograd.grad(layer(x)[0, :, 2, 3].sum(), x)[0].ne(0).any(1)[0]
    assert changed.nonzero().tolist() == [[2, 3]]
    slope = torch.autograd.functional.jacobian(lambda z: layer.gate(z)[0, :, 2, 3], x.detach())[..., 2, 3][:, 0]
    assert (slope != 0).all(), "a gate hears all channels"
    gates = layer.gate(x)
    assert gates.shape == x.shape
    assert ((gates > 0) & (gates < 1)).all()


def test_without_weights_it_halves() -> None:
    layer, x = made("pixel_attention", 5), normal(1, 2, 5, 3, 4)
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    close(layer(x), x / 2)
    assert sum(p.numel() for p in layer.parameters()) == 5 * 5 + 5


def test_the_network_has_the_abstracts_parameters() -> None:
    counts = {s: sum(p.numel() for p in pan(scale=s).parameters()) for s in (2, 3, 4)}
    assert round(counts[4], -3) == 272_000
    assert counts == {s: naive.parameter_counts(scale=s) for s in (2, 3, 4)}


def test_the_block_sees_a_few_pixels_around() -> None:
    """Two 3 x 3 convolutions in a row, and the gate within them."""
    for dilation, reach in ((1, 2), (3, 3)):
        layer, (x,) = made("scpa", 4, dilation=dilation), leaves(normal(1, 1, 4, 11, 11))
        seen = torch.autograd.grad(layer(x)[0, :, 5, 5].sum(), x)[0].ne(0).any(1)[0]
        assert (seen.nonzero() - 5).abs().max() == reach
        C = 4 // 2
        assert sum(p.numel() for p in layer.parameters()) == 4 * 4 * C + 28 * C**2 + C


def test_cost_is_linear_in_pixels() -> None:
    for name in ("pixel_attention", "scpa"):
        layer = made(name, 8)
        small, large = normal(0, 1, 8, 8, 8), normal(0, 1, 8, 16, 32)
        assert flops(lambda layer=layer, x=large: layer(x)) == 8 * flops(lambda layer=layer, x=small: layer(x)) > 0


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"dim is no multiple of reduction = 2 \(got 5\)"):
        SelfCalibratedPixelAttention(5)
    with pytest.raises(ValueError, match=r"dilation is too small \(got 0\)"):
        SelfCalibratedPixelAttention(4, dilation=0)
    with pytest.raises(ValueError, match=r"slope is out of range \(got -1\)"):
        SelfCalibratedPixelAttention(4, slope=-1)
    with pytest.raises(ValueError, match=r"scale is unknown \(got 5\); expected one of 2, 3, 4"):
        UpsamplingPixelAttention(4, 4, 5)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 4, Y, X\)"):
        PixelAttention(4)(torch.zeros(2, 3, 5, 3))
    for layer in (PixelAttention(4), SelfCalibratedPixelAttention(4)):
        assert layer(torch.zeros(0, 4, 5, 3)).shape == (0, 4, 5, 3)
    for layer in (PixelAttention(4), SelfCalibratedPixelAttention(4), UpsamplingPixelAttention(4, 4, 2)):
        with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 4, 0, 3\)\); expected a pixel at least"):
            layer(torch.zeros(2, 4, 0, 3))
    with pytest.raises(ValueError, match=r"SuperResolution: image has no pixels \(got \(2, 3, 0, 4\)\)"):
        pan(dim=4, up_dim=4, blocks=1)(torch.zeros(2, 3, 0, 4))

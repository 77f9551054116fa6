"""Multimodal rotary positions: which coordinate turns which pair. transformers' layers: test_like_transformers.py."""

import pytest
import torch

import regard
from positions.naive import close
from positions.test_rotary import plain
from regard.positions import DynamicNTK, MRope, Rotary, YaRN, grid
from regard.positions.mrope import axis_of_pairs


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_axes_of_pairs():
    assert axis_of_pairs((1, 2, 3), "chunks") == (0, 1, 1, 2, 2, 2)
    assert axis_of_pairs((4, 2, 2), "interleaved") == (0, 1, 2, 0, 1, 2, 0, 0)
    assert axis_of_pairs((2, 2, 2), "alternating") == (1, 2, 1, 2, 0, 0)
    assert axis_of_pairs((1, 3, 1), "alternating") == (1, 2, 1, 1, 0)
    assert MRope(128).mrope_section == (16, 24, 24)  # Qwen2-VL's


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("order", ["chunks", "interleaved", "alternating"])
def test_matches_the_definition(order, interleaved):
    """Pair by pair: each turns as the plain rotary part would turn it at its own coordinate."""
    part = MRope(12, mrope_section=(2, 2, 2), order=order, base=100.0, interleaved=interleaved)
    axes = {"chunks": "001122", "interleaved": "012012", "alternating": "121200"}[order]
    z, at = normal(2, 3, 7, 12), torch.randint(0, 50, (2, 7, 3), generator=torch.Generator().manual_seed(0))
    got = part.rotate(z, at)
    for pair, (axis, w) in enumerate(zip(map(int, axes), plain(12, 100.0))):
        low, high = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 6)
        angle = at[:, None, :, axis].double() * w
        close(got[..., low], z[..., low] * angle.cos() - z[..., high] * angle.sin())
        close(got[..., high], z[..., low] * angle.sin() + z[..., high] * angle.cos())


@torch.no_grad()
def test_text_turns_as_ever_and_pictures_along_each_axis():
    layer = regard.create("mrope", dim=48, num_heads=3, mrope_section=(2, 3, 3), base=100.0).double()
    plainly = regard.create("rotary", dim=48, num_heads=3, base=100.0).double()
    plainly.load_state_dict(layer.state_dict())
    x, text, picture = normal(2, 6, 48), torch.arange(6), grid(1, 2, 3)
    close(layer(x), plainly(x), atol=1e-12)
    close(layer(x, positions=text[None, :, None].expand(1, 6, 3)), plainly(x), atol=1e-12)
    seen = layer(x, positions=picture)
    close(layer(x, positions=picture + torch.tensor([9, 4, 7])), seen)
    assert (seen - layer(x)).abs().max() > 1e-3
    assert (layer(x, positions=picture * torch.tensor([1, 1, 2])) - seen).abs().max() > 1e-3


@torch.no_grad()
def test_streams_beside_a_mix_that_asks_earlier_queries_again():
    """Multi-token attention keeps queries and where they stood; coordinates are the rotary part's alone."""
    layer = regard.create("mrope+mta", dim=48, num_heads=4, causal=True).double()
    for p in layer.score_mix.parameters():
        p.add_(normal(*p.shape) / 4)
    x, at = normal(2, 8, 48), torch.cat((grid(1, 2, 3), torch.tensor([[[3, 3, 3], [4, 4, 4]]])), 1)
    want, state, outs = layer(x, positions=at), layer.init_state(2, 8), []
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        y, state = layer.step(x[:, part], state, positions=at[:, part])
        outs.append(y)
    close(torch.cat(outs, 1), want)
    assert (layer(x) - want).abs().max() > 1e-3


@pytest.mark.parametrize("scaling", [YaRN(4.0, 32), DynamicNTK(4.0, 16)])
def test_scalings_come_before_the_axes_are_dealt(scaling):
    """A length-dependent one counts the largest coordinate of any axis."""
    part = MRope(16, mrope_section=(2, 3, 3), base=100.0, scaling=scaling)
    z, text = normal(1, 2, 5, 16), torch.tensor([[0, 3, 9, 20, 40]])
    want = Rotary(16, base=100.0, scaling=scaling).rotate(z, text)
    close(part.rotate(z, text[..., None].expand(1, 5, 3)), want, atol=1e-12)
    assert part.streams != scaling.follows_length


def test_refusals():
    with pytest.raises(ValueError, match=r"MRope: mrope_section doesn't deal out the pairs \(got \(1, 1, 1\)\).*sum 4"):
        MRope(8, mrope_section=(1, 1, 1))
    with pytest.raises(ValueError, match=r"MRope: mrope_section can't be interleaved \(got \(1, 2, 1\)\)"):
        MRope(8, mrope_section=(1, 2, 1), order="interleaved")
    with pytest.raises(TypeError, match=r"MRope: mrope_section has the wrong type \(got 1.5\)"):
        MRope(8, mrope_section=(1.5, 1.5, 1))
    with pytest.raises(ValueError, match=r"MRope: order is unknown \(got 'chunk'\); .* did you mean 'chunks'"):
        MRope(8, order="chunk")
    with pytest.raises(ValueError, match=r"MRope: positions has the wrong shape \(got \(1, 5, 2\)\)"):
        MRope(8).rotate(torch.zeros(1, 2, 5, 8), torch.zeros(1, 5, 2, dtype=torch.long))

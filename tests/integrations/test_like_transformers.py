"""`regard.Attention` with rotary and norm parts is the layer of transformers' models, with their weights."""

import pytest
import torch

pytest.importorskip("transformers")

from integrations.like_transformers import LIKES, B, D, M, T, build
from regard import masks
from regard.positions import MRope, Rotary


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, T, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LIKES)
def test_the_layer_and_its_gradient(name: str) -> None:
    layer, theirs, at = build(name)
    x, direction = tokens().requires_grad_(), tokens(1)
    got, want = layer(x, positions=at), theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # their angles, norms and softmax are fp32
    assert want.abs().max() > 0.1
    here, there = (torch.autograd.grad((out * direction).sum(), x)[0] for out in (got, want))
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LIKES)
def test_positions_and_norms_matter_to_it(name: str) -> None:
    """What the test above would not see: without the parts the layer is another one."""
    layer, theirs, at = build(name)
    want = theirs(tokens())
    assert (layer(tokens(), positions=2 * at) - want).abs().max() > 1e-2
    if layer.heads is not None:
        layer.heads = None
        assert (layer(tokens(), positions=at) - want).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", LIKES)
def test_streams_and_left_padding(name: str) -> None:
    layer, _, at = build(name)
    x = tokens()
    want = layer(x, positions=at)
    state, outs = layer.init_state(B, T), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 10), slice(10, T)):
        y, state = layer.step(x[:, part], state, positions=at[:, part])
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-12)
    padded = torch.cat((tokens(2)[:, :3], x), 1)
    kept = torch.ones(B, T + 3, dtype=torch.bool)
    kept[:, :3] = False
    where = torch.cat((torch.zeros_like(at[:, :3]), at), 1)
    got = layer(padded, positions=where, mask=masks.padding(kept))
    torch.testing.assert_close(got[:, 3:], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, like in LIKES.items() if like.pictures])
def test_text_alone_turns_as_plain_rotary(name: str) -> None:
    part = build(name)[0].position
    assert isinstance(part, MRope)
    plain = Rotary(D, base=part.base, interleaved=part.interleaved, partial_rotary_factor=part.rotary_dim / D)
    z, at = torch.randn(B, 3, T, D, dtype=torch.float64), torch.arange(T) + torch.tensor([[0], [100]])
    want = plain.rotate(z, at)
    assert torch.equal(part.rotate(z, at), want)
    assert torch.equal(part.rotate(z, at[..., None].expand(B, T, 3)), want)

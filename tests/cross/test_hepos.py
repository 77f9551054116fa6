"""Hepos against loops, whose author has read neither code nor test, and what is true of it alone."""

import itertools

import pytest
import torch
from torch import Tensor

import regard
from cross import naive_hepos as naive
from regard import masks
from regard.cross.hepos import Hepos
from regard.laws.agreement import close


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options: object) -> Hepos:
    torch.manual_seed(0)
    return regard.create("hepos", dim=8, num_heads=4, **options).double()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{"stride": 1}, {"stride": 2}, {}, {"num_kv_heads": 2}, {"bias": False}], ids=str)
def test_is_the_definition(options: dict, padded: bool) -> None:
    """The last head of the second sequence sees nothing where that is padded."""
    layer, x, context = built(**options), normal(1, 2, 3, 8).requires_grad_(), normal(2, 2, 11, 8).requires_grad_()
    keep = torch.arange(11) < torch.tensor([[11], [3]]) if padded else None
    parts = [(p.weight, p.bias) for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]
    given = [torch.zeros(len(w)).double() if b is None else b for pair in parts for w, b in [pair]]
    weights = itertools.chain.from_iterable((w, b) for (w, _), b in zip(parts, given, strict=True))
    shape = {"heads": 4, "stride": layer.stride, "key_heads": layer.num_kv_heads}
    want = naive.hepos(x, context, *weights, **shape, padding=None if keep is None else ~keep)
    got = layer(x, context, mask=keep)
    close(got, want, "out")
    of = [x, context, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), of) for y in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("S", [8, 11, 1])
def test_is_cross_attention_under_a_mask(S: int) -> None:
    layer, full = built(), regard.Attention(8, 4, bias=True).double()
    full.load_state_dict(layer.state_dict())
    strides = masks.predicate(lambda b, h, i, j: (j - h) % 4 == 0, heads=4)
    x, context = normal(1, 2, 3, 8), normal(2, 2, S, 8)
    close(layer(x, context), full(x, context, mask=strides))
    close(built(stride=1)(x, context), full(x, context))


def test_a_source_token_reaches_the_heads_of_its_residue() -> None:
    layer, x, context = built(stride=2), normal(1, 1, 3, 8), normal(2, 1, 7, 8)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(8))
    for j in range(7):
        other = context.clone()
        other[:, j] += 1
        changed = (layer(x, other) - layer(x, context)).abs().unflatten(-1, (4, 2)).amax((0, 1, 3)) > 1e-9
        assert changed.tolist() == [h % 2 == j % 2 for h in range(4)]


def test_a_source_is_held_once() -> None:
    """Of each token a stride-th of the heads; steps then give the full pass."""
    layer, x, context = built(), normal(1, 2, 5, 8), normal(2, 2, 12, 8)
    held = layer.hold(context)
    assert held.keep is None
    assert held.k.numel() == 2 * 12 * 8 // 4
    close(torch.cat([layer.read(x[:, t : t + 1], held) for t in range(5)], 1), layer(x, context))


def test_hidden_source_tokens() -> None:
    layer, x, context = built(), normal(1, 2, 3, 8), normal(2, 2, 9, 8)
    keep = torch.arange(9) < torch.tensor([[9], [6]])
    hidden = context.masked_fill(~keep[..., None], float("nan"))
    close(layer(x, hidden, mask=masks.padding(keep)), layer(x, context, mask=keep))
    close(layer(x[1:], context[1:, :6]), layer(x, context, mask=keep)[1:])
    assert layer(x, hidden)[1].isnan().all()


def test_dropout_is_of_the_weights() -> None:
    layer, x, context = built(dropout=1.0), normal(1, 2, 3, 8), normal(2, 2, 9, 8)
    close(layer(x, context), layer.o_proj.bias.expand(2, 3, 8))
    assert not torch.equal(layer.eval()(x, context), layer.train()(x, context))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Hepos: num_heads is no multiple of stride = 4 \(got 6\)"):
        regard.create("hepos", dim=24, num_heads=6)
    with pytest.raises(ValueError, match="hepos: context has another batch than x"):
        built()(torch.zeros(2, 3, 8).double(), torch.zeros(1, 3, 8).double())
    with pytest.raises(ValueError, match="hepos: context has the wrong shape"):
        built(context_dim=5)(torch.zeros(2, 3, 8).double(), torch.zeros(2, 3, 8).double())
    with pytest.raises(ValueError, match="hepos: dropout is out of range"):
        built(dropout=2.0)

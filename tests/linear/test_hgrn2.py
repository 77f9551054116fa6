"""HGRN2 against loops, whose author has read neither code nor test."""

import pytest
import torch
from torch import Tensor

import regard
from linear.naive_hgrn import bounds, hgrn2
from regard.laws.agreement import close
from regard.linear import HGRN2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> HGRN2:
    layer = regard.create("hgrn2", dim=6, num_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"layers": 4, "layer": 2, "state_dim": 5}, {"layers": 3, "layer": 2, "eps": 0.2}]
)
def test_equals_the_loops(options: dict) -> None:
    layer, x = filled(1, **options), normal(1, 2, 6, 6).requires_grad_()
    direction = normal(2, 2, 6, 6)
    wq, wf, wi = layer.in_proj.weight.split(layer.inputs)
    gamma = None if layer.bounds is None else bounds(layer.bounds.table)[layer.layer]
    given = {"heads": 2, "gamma": gamma, "eps": layer.eps}
    want, last = hgrn2(x, wq, wf, wi, layer.o_proj.weight, layer.norm_weight, **given)
    got = layer(x)
    close(got.detach(), want.detach())
    close(layer.step(x, layer.init_state(2, 9, dtype=torch.float64))[1].s.detach(), last.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_forgetting_is_writing() -> None:
    """The last channel says how much a token forgets: all, and it is read alone; nothing, and it is never read."""
    layer = filled(2)
    _, forgets, _ = layer.inputs
    with torch.no_grad():
        layer.in_proj.weight[forgets : 2 * forgets] = 0
        layer.in_proj.weight[forgets : 2 * forgets, 5] = -1600.0
    x = normal(3, 2, 8, 6)
    x[..., 5] = 0.0
    x[:, 4, 5] = 0.5
    close(layer(x)[:, 4:].detach(), layer(x[:, 4:]).detach())
    x[:, 4, 5] = -0.5
    assert (layer(x)[:, 5:] - layer(x[:, 4:])[:, 1:]).abs().max() > 1e-3, "then what came before is seen"
    close(layer(x)[:, 5:].detach(), layer(torch.cat([x[:, :4], x[:, 5:]], 1))[:, 4:].detach())


def test_layers_share_their_bounds() -> None:
    layers = [filled(n, layers=3, layer=n) for n in range(3)]
    regard.share(*layers)
    assert layers[1].bounds.table is layers[2].bounds.table


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6, conv_size=3), normal(6, 3, 7, 6), normal(7, 3, 4, 6)
    lengths = (7, 4, 1)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(3, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="layer"):
        HGRN2(6, 2, layers=3, layer=3)
    with pytest.raises(ValueError, match="num_heads"):
        HGRN2(6, 4)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the HGRN2State"):
        filled(1).step(normal(1, 3, 1, 6), None)

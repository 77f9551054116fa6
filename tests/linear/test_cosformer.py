"""cosFormer against loops, whose author has read neither code nor test, and the authors' numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_features import cosformer
from regard.laws.agreement import close, same
from regard.linear import Cosformer, cosformer_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "cosformer_authors.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("case", "abc")
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    x, context = z["x"].requires_grad_(), z["c"].requires_grad_() if "c" in z else None
    longest = max(x.shape[1], 0 if context is None else context.shape[1])
    layer = Cosformer(8, 2, causal=case == "c", bias=True, max_length=longest).double()
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(z["p." + name.replace("o_proj", "out_proj")])
    out = layer(x, context)
    close(out.detach(), z["y"])
    leaves = [x, *([] if context is None else [context]), *own.values()]
    names = ["x", *([] if context is None else ["c"]), *(f".{n.replace('o_proj', 'out_proj')}" for n in own)]
    for g, name in zip(torch.autograd.grad((out * z["w"]).sum(), leaves), names, strict=True):
        close(g, z["g" + name])


@pytest.mark.parametrize(("causal", "S"), [(False, 5), (False, 8), (True, 5)])
def test_equals_the_loops(causal: bool, S: int) -> None:
    """One feature of queries and keys is above 0, so that no sum of weights is 0."""
    given = [normal(1, 2, 2, 5, 3), normal(2, 2, 2, S, 3), normal(3, 2, 2, S, 4)]
    with torch.no_grad():
        for z in given[:2]:
            z[..., 0] = z[..., 0].abs() + 0.1
    want = cosformer(*given, length=9, causal=causal)
    got = cosformer_attention(*given, 9, causal=causal).out
    close(got.detach(), want.detach())
    direction = normal(4, *want.shape)
    for g, w in zip(*(torch.autograd.grad((z * direction).sum(), given) for z in (got, want)), strict=True):
        close(g, w)


@torch.no_grad()
def test_weights_fall_with_the_cosine_of_the_distance() -> None:
    layer, T = regard.create("cosformer", dim=8, num_heads=2, max_length=12, dtype=torch.float64), 12
    same_ones = torch.ones(1, 2, T, 4).double()
    weights = layer.mix(same_ones, same_ones, torch.eye(T).double().expand(1, 2, -1, -1), None)
    ages = torch.arange(T).double()[:, None] - torch.arange(T)
    want = (math.pi / 2 * ages / T).cos()
    close(weights[0, 0], want / want.sum(-1, keepdim=True))
    assert (weights[0, 0, 0].diff() < 0).all()


@torch.no_grad()
def test_places_go_on_in_steps_up_to_the_last() -> None:
    layer = regard.create("cosformer", dim=8, num_heads=2, causal=True, max_length=9, dtype=torch.float64)
    x, state, outs = normal(1, 2, 9, 8), layer.init_state(2, 9), []
    for part in x.split([4, 1, 0, 4], 1):
        out, state = layer.step(part, state)
        outs.append(out)
    close(torch.cat(outs, 1), layer(x))
    assert state.length == 9
    with pytest.raises(ValueError, match=r"q is too long \(got 10 tokens\); expected at most max_length = 9"):
        layer.step(x[:, :1], state)
    with pytest.raises(ValueError, match=r"is too long"):
        layer(torch.cat([x, x], 1))


@torch.no_grad()
def test_what_sees_nothing_gives_zero() -> None:
    q, k, v = (normal(n, 1, 1, 4, 3).detach() for n in (1, 2, 3))
    same(cosformer_attention(-q.abs(), k, v, 4).out, torch.zeros(1, 1, 4, 3).double())
    same(cosformer_attention(q, k, v, 4, keep=torch.zeros(1, 4).bool()).out, torch.zeros(1, 1, 4, 3).double())
    assert cosformer_attention(q[:0], k[:0], v[:0], 4).out.shape == (0, 1, 4, 3)


def test_refusals() -> None:
    for wrong in ({"max_length": 0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=rf"Cosformer: {next(iter(wrong))} .* \(got .*\); expected "):
            Cosformer(8, 2, **wrong)
    with pytest.raises(ValueError, match="cosformer_attention: k is too long"):
        cosformer_attention(torch.zeros(1, 1, 2, 3), *torch.zeros(2, 1, 1, 5, 3), 4)

"""Triadic modulation against loops, whose author has read neither code nor test, and the authors' numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_triadic as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.triadic import TriadicModulation, cooperate, triadic_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B135.npz"


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(dim: int = 5, **options) -> TriadicModulation:
    layer = regard.create("triadic", dim=dim, num_heads=1, **{"keep": 3, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(*p.shape, seed=100 + n))
    return layer


def maps(layer: TriadicModulation) -> tuple[Tensor, Tensor]:
    """One map for all three, as the authors have it."""
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    weight, bias = (torch.cat([getattr(p, kind) for p in projections]) for kind in ("weight", "bias"))
    return weight, bias


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loops(padded: bool):
    layer, x, g = filled(), normal(2, 8, 5).requires_grad_(), normal(2, 8, 5, seed=2)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 3], real[0, 6:], real[1, 1:3] = False, False, False
    real = real if padded else None
    got, (want, places) = layer(x, mask=real), naive.mixer(x, *maps(layer), 3, real)
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((y * g).sum(), leaves) for y in (got, want)), strict=True):
        close(mine, theirs)
    q, k, v = (p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert torch.equal(triadic_attention(q, k, v, keep=3, real=real)[1] - 1, places)


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_the_authors_numbers(case: str):
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    layer, x = filled(z["x"].shape[2], keep=int(z["k"])), z["x"].requires_grad_()
    with torch.no_grad():
        for p, w, b in zip(
            (layer.q_proj, layer.k_proj, layer.v_proj), z["qkv_weight"].chunk(3), z["qkv_bias"].chunk(3)
        ):
            p.weight.copy_(w)
            p.bias.copy_(b)
    out = layer(x)
    assert (out - z["y"]).abs().max() < 1e-10
    leaves = [x, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]
    gx, *gw = torch.autograd.grad((out * z["w"]).sum(), leaves)
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (torch.cat(gw) - z["g_qkv_weight"]).abs().max() < 1e-10
    places = triadic_attention(
        *(x @ w.mT + b for w, b in zip(z["qkv_weight"].chunk(3), z["qkv_bias"].chunk(3))), keep=layer.keep
    )[1]
    assert torch.equal(places - 1, z["indices"])


@pytest.mark.parametrize("law", ["m2", "m3", "m4", "cooperation", "cooperation6"])
def test_laws_of_cooperation(law: str):
    r, c = normal(3, 4), normal(3, 4, seed=2)
    close(cooperate(r, c, law), naive.cooperate(r, c, law))
    g = normal(4, seed=3)
    if law == "cooperation":
        close(cooperate(r, c, law, gain=g), r**2 + 2 * r + c * (1 + g.abs()))
    if law == "m4":
        close(cooperate(r, c, law, gain=g), r * 2 ** (g * c))


@torch.no_grad()
def test_a_token_without_a_largest_feature_is_heard_by_nobody():
    """Queries, keys and values are the tokens themselves, all above 0: small ones are never among the largest."""
    layer, x = filled(), normal(2, 8, 5).abs() + 1
    for proj in (layer.q_proj, layer.k_proj, layer.v_proj):
        proj.weight.copy_(torch.eye(5))
        proj.bias.zero_()
    x[:, 5] = 0.1
    before = layer(x)
    x[:, 5] = 0.3
    changed = (layer(x) - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [n == 5 for n in range(8)]
    close(layer(x)[:, 5], x[:, 5] ** 2 + 2 * x[:, 5] + x[:, 0] ** 2 * (1 + x[:, 0])), "its own value, modulated"
    x[:, 5] = 9.0
    assert (layer(x) - before).abs().amax((0, 2))[0] > 1e-3, "a large one is"


@torch.no_grad()
def test_attention_is_of_few():
    """No more than keep + 1 take part, however many tokens there are; nothing has T x T numbers."""
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    layer, x = regard.create("triadic", dim=8, num_heads=1), torch.randn(1, T, 8)
    with Watch():
        layer(x)
    assert max(sizes) <= 8 * T


@torch.no_grad()
def test_without_a_latent_it_is_a_power_of_values():
    """Where q_0 = k_0 = 0: v^2 + 2 v, and attention among the largest; the others may stand in any order."""
    layer, x = filled(), normal(2, 8, 5)
    for proj in (layer.q_proj, layer.k_proj):
        proj.bias.zero_()
    x[:, 0] = 0
    out, v = layer(x), layer.v_proj(x)
    plain = (v**2 + 2 * v)[:, 1:]
    largest = plain.topk(3, dim=1).values
    close((out[:, 1:] - plain).sum(1), triadic_sum(layer, x, largest))
    order = torch.tensor([0, *(1 + torch.randperm(7, generator=torch.Generator().manual_seed(1)))])
    close(layer(x[:, order]), out[:, order])


def triadic_sum(layer: TriadicModulation, x: Tensor, largest: Tensor) -> Tensor:
    """What attention adds to all tokens together, by torch's own softmax."""
    q, k = (p(x)[:, 1:].topk(3, dim=1).values for p in (layer.q_proj, layer.k_proj))
    q, k = (torch.cat([torch.zeros_like(z[:, :1]), z], 1) for z in (q, k))
    v = torch.cat([layer.v_proj(x)[:, :1], largest], 1)
    return ((q @ k.mT / math.sqrt(5)).softmax(-1) @ v)[:, 1:].sum(1)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_hidden_tokens_are_not_there(n: int):
    """On whichever side, also where fewer are left than are kept: the latent is the first that is left."""
    layer, x = filled(), normal(1, 7, 5)
    for real in (slice(0, n), slice(7 - n, 7)):
        mask = torch.zeros(1, 7, dtype=torch.bool)
        mask[:, real] = True
        out = layer(torch.where(mask[..., None], x, torch.nan), mask=masks.padding(mask))
        close(out[:, real], layer(x[:, real]))
    assert not layer(x, mask=torch.zeros(1, 7, dtype=torch.bool)).any()


@torch.no_grad()
def test_few_tokens():
    """All of them are kept; a latent alone is its own value."""
    layer, x = filled(), normal(2, 3, 5)
    close(layer(x), filled(keep=2)(x))
    close(layer(x[:, :1]), layer.v_proj(x[:, :1]))
    assert layer(x[:, :0]).shape == (2, 0, 5)
    assert layer(x[:0]).shape == (0, 3, 5)


def test_starts_as_the_authors_code():
    """One linear map of torch's for all three, which has the bounds of three."""
    torch.manual_seed(0)
    layer = regard.create("triadic", dim=64, num_heads=4)
    assert layer.keep == 12
    assert [name for name, _ in layer.named_children()] == ["q_proj", "k_proj", "v_proj"]
    for p in layer.parameters():
        assert 0.1 < float(p.detach().abs().max()) <= 1 / 8
    assert regard.create("triadic", dim=8, num_heads=1, bias=False).q_proj.bias is None


def test_dropout():
    """Of the weights: the modulated values stay."""
    layer, x = filled(dropout=1.0), normal(2, 8, 5)
    assert (layer.eval()(x) - filled().eval()(x)).abs().max() == 0
    v = layer.v_proj(x)
    out = layer.train()(x)
    assert not out[:, 0].any()
    q0, k0 = layer.q_proj(x)[:, :1], layer.k_proj(x)[:, :1]
    close(out[:, 1:].detach(), (v**2 + 2 * v + q0 * k0 * (1 + v[:, :1].abs()))[:, 1:].detach())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"keep": 0}, "keep is too small"),
        ({"keep": 2.0}, "keep has the wrong type"),
        ({"dropout": 1.5}, "dropout is out of range"),
        ({"bias": 1}, "bias has the wrong type"),
    ],
)
def test_refuses(wrong: dict, told: str):
    with pytest.raises((ValueError, TypeError), match=told):
        TriadicModulation(8, **wrong)


def test_refuses_tensors_that_do_not_fit():
    x = normal(2, 5, 4)
    with pytest.raises(ValueError, match="triadic_attention: k has the wrong shape"):
        triadic_attention(x, x[:, :4], x)
    with pytest.raises(ValueError, match=r"cooperate: law is unknown \(got 'm5'\)"):
        cooperate(x, x, "m5")
    with pytest.raises(ValueError, match=r"triadic: x has the wrong shape \(got \(2, 5, 4\)\)"):
        filled()(x)
    with pytest.raises(ValueError, match="causal"):
        regard.create("triadic", dim=8, num_heads=1, causal=True)

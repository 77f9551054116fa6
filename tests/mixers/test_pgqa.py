"""Perturbed grouped-query attention against loops (naive_kdgqa.py) and the authors' numbers (A051.npz)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_kdgqa as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.pgqa import PerturbedAttention, fixed_noise, moments, perturbed

VECTORS = Path(__file__).parents[1] / "vectors" / "A051.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, groups: int, **options) -> PerturbedAttention:
    layer = PerturbedAttention(dim, heads, num_kv_heads=groups, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.5 * normal(n, *p.shape))
    return layer


def given(layer: PerturbedAttention) -> tuple[list[Tensor], dict]:
    own = dict(layer.named_parameters())
    sizes = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    return [own[f"{n}_proj.weight"] for n in "qkvo"], {**sizes, **{f"b{n}": own.get(f"{n}_proj.bias") for n in "qkvo"}}


def test_gives_the_authors_numbers(monkeypatch) -> None:
    with np.load(VECTORS) as file:
        n = {k.removeprefix("pg_"): torch.from_numpy(file[k]) for k in file if k.startswith("pg_")}
    layer = regard.create("pgqa", dim=12, num_heads=4, num_kv_heads=2, causal=False, bias=True).double()
    weights = {f"{name}_proj.weight": n[f"W{name}"] for name in "qkvo"}
    layer.load_state_dict(weights | {f"{name}_proj.bias": n[f"b{name}"] for name in "qkvo"})
    monkeypatch.setattr(layer, "uniform", lambda q: n["uniform"].unflatten(-1, (3, 3)))
    close(layer(n["x"]), n["out"])


@pytest.mark.parametrize(("heads", "groups", "bias"), [(4, 2, True), (6, 2, False), (3, 3, False), (4, 1, True)])
@pytest.mark.parametrize("training", [False, True])
def test_is_the_definition(heads: int, groups: int, bias: bool, training: bool, monkeypatch) -> None:
    layer = filled(10, heads, groups, head_dim=3, bias=bias).train(training)
    x = normal(1, 2, 4, 10).requires_grad_()
    weights, rest = given(layer)
    u = layer.uniform(layer.split(x, x)[0])
    assert u.shape == (groups, heads // groups, 4, 3)
    assert 0 <= u.min() < 0.2 < 0.8 < u.max() < 1
    monkeypatch.setattr(layer, "uniform", lambda q: u)
    want = naive.pgqa(x, *weights, u.double().flatten(2), **rest)
    got = layer(x)
    close(got, want, "out")
    g, of = normal(99, *got.shape), [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_padding_counts_in_nothing_wherever_it_stands() -> None:
    layer, x = filled(10, 4, 2, head_dim=3), normal(1, 1, 4, 10)
    for keep in ([0, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]):
        kept = torch.tensor([keep], dtype=torch.bool)
        padded = torch.full((1, 7, 10), math.nan, dtype=x.dtype)
        padded[kept] = x[0]
        close(layer(padded, mask=masks.padding(kept))[kept], layer(x)[0])


def test_heads_of_a_group_that_ask_alike_answer_apart() -> None:
    """What is taken away has each head's own mean and spread."""
    layer, x = filled(16, 4, 2), normal(1, 2, 6, 16)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(16))
        layer.q_proj.weight[4:8] = layer.q_proj.weight[:4]
        y = layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
        assert (y[:, 0] - y[:, 1]).abs().max() > 0.1
        q, k, v = layer.split(x, x)
        plain = (q @ k.repeat_interleave(2, 1).mT / 2).softmax(-1) @ v.repeat_interleave(2, 1)
        close(plain[:, 0], plain[:, 1])
        for got, want in zip(moments(plain - y, None), moments(plain, None), strict=True):
            close(got, want)


def test_noise_in_evaluation_is_the_same_in_every_call_or_drawn() -> None:
    x = normal(1, 2, 4, 10)
    fixed, other, drawn = (filled(10, 4, 2, head_dim=3, **o) for o in ({}, {"seed": 1}, {"noise": "drawn"}))
    assert torch.equal(fixed(x), fixed(x))
    assert not torch.allclose(fixed(x), other(x))
    assert not torch.allclose(drawn(x), drawn(x))
    fixed.train()
    assert not torch.allclose(fixed(x), fixed(x))


def test_fixed_noise_is_even_and_goes_by_its_place_alone() -> None:
    u = fixed_noise(8, 50, 40, 3, torch.device("cpu"))
    assert torch.equal(u[:5, :20, :10], fixed_noise(5, 20, 10, 3, torch.device("cpu")))
    assert (u.mean() - 0.5).abs() < 0.01
    assert (u.var() - 1 / 12).abs() < 0.002
    assert (torch.histc(u, 10, 0, 1) / u.numel() - 0.1).abs().max() < 0.01
    flat = u.flatten(1) - 0.5
    assert (flat @ flat.mT / flat.shape[1] * 12 - torch.eye(8)).abs().max() < 0.1, "heads are independent"
    for a, b in ((u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1])):
        assert (((a - 0.5) * (b - 0.5)).mean() * 12).abs() < 0.05, "and so are neighbours"


def test_moments_are_of_real_tokens_and_unbiased() -> None:
    z = normal(1, 2, 3, 5, 4)
    keep = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    for kept in (None, keep):
        mean, var = moments(z, kept)
        for b, row in enumerate(z):
            real = (row if kept is None else row[:, kept[b]]).flatten(1)
            close(mean[b].flatten(), real.mean(1))
            close(var[b].flatten(), real.var(1))


def test_one_number_everywhere_loses_it_and_has_gradients() -> None:
    y = torch.full((1, 2, 3, 2), 5.0, dtype=torch.float64, requires_grad=True)
    out = perturbed(y, torch.rand(1, 2, 3, 2, dtype=torch.float64))
    close(out, torch.zeros_like(out))
    assert torch.autograd.grad((out * normal(1, *out.shape)).sum(), y)[0].isfinite().all()


def test_later_tokens_reach_earlier_outputs() -> None:
    """What has no causal form, even where every query saw its own past alone: statistics are of all tokens."""
    y = normal(1, 1, 2, 5, 3)
    changed = y.clone()
    changed[:, :, -1] *= 10
    u = torch.rand(1, 2, 5, 3, dtype=torch.float64)
    assert (perturbed(changed, u) - perturbed(y, u))[:, :, :-1].abs().amin(-1).min() > 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="noise is unknown"):
        PerturbedAttention(8, 4, noise="gaussian")
    with pytest.raises(ValueError, match="seed is too small"):
        PerturbedAttention(8, 4, seed=-1)
    with pytest.raises(ValueError, match="dropout is out of range"):
        PerturbedAttention(8, 4, dropout=-0.1)

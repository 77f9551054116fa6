"""FLARE against loops, whose author has read neither code nor test, and the authors' numbers; rank and cost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_flare import flare
from linear.naive_flare import flare_attention as naive_attention
from regard.laws.agreement import close, same
from regard.linear import FLARE, flare_attention
from regard.masks import padding

VECTORS = Path(__file__).parents[1] / "vectors" / "flare_authors.npz"
OPTIONS = {
    "a": {"num_latents": 5},
    "b": {"num_latents": 3, "key_layers": -1, "value_layers": 0, "scale": 0.5, "qk_norm": True},
    "c": {"num_latents": 4, "key_layers": 1, "value_layers": 2, "key_ratio": 1.5, "value_ratio": 0.5},
}
HEADS = {"a": 3, "b": 2, "c": 4}
KEEP = torch.tensor([[True] * 7, [False, True, True, True, True, False, True]])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def renamed(name: str, layer: FLARE) -> str:
    """The authors' names of our parameters."""
    first, *rest = name.split(".")
    if first == "latents":
        return "latent_q"
    if first in ("k_proj", "v_proj"):
        place, last = int(rest[1]), len(getattr(layer, first).linears) - 1
        called = "fc" if last == 0 else {0: "fc1", last: "fc2"}.get(place, f"fcs.{place - 1}")
        return f"{first}.{called}.{rest[2]}"
    return name.replace("o_proj", "out_proj")


@pytest.mark.parametrize("case", "abc")
def test_gives_the_authors_numbers(case: str) -> None:
    """Their latents are (M, L) in memory, read as (H, L, D)."""
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    x = z["x"].requires_grad_()
    layer = FLARE(x.shape[2], HEADS[case], **OPTIONS[case]).double()
    own = dict(layer.named_parameters())
    assert {renamed(n, layer) for n in own} == {k[2:] for k in z if k.startswith("p.")}
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(z["p." + renamed(name, layer)].view(p.shape))
    out = layer(x)
    close(out.detach(), z["y"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, *own.values()])
    close(grads[0], z["gx"])
    for name, g in zip(own, grads[1:], strict=True):
        close(g, z["g." + renamed(name, layer)].view(g.shape))


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("layers", [-1, 2])
def test_equals_the_loops(layers: int, hidden: bool) -> None:
    layer = FLARE(6, 2, num_latents=3, scale=0.7, key_layers=layers, value_layers=layers, qk_norm=True).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    x, keep = normal(99, 2, 7, 6), KEEP if hidden else None
    mlps = [[(m.weight, m.bias) for m in proj.linears] for proj in (layer.k_proj, layer.v_proj)]
    norms = {f"{n}_norm": (getattr(layer, f"{n}_norm").weight, getattr(layer, f"{n}_norm").bias) for n in "qk"}
    want, _ = flare(x, layer.latents, *mlps, layer.o_proj.weight, layer.o_proj.bias, scale=0.7, keep=keep, **norms)
    got = layer(x, mask=None if keep is None else padding(keep))
    close(got.detach(), want.detach())
    leaves, direction = [x, *layer.parameters()], normal(98, *want.shape)
    for g, w in zip(*(torch.autograd.grad((z * direction).sum(), leaves) for z in (got, want)), strict=True):
        close(g, w)


def test_weights_are_stochastic_and_of_the_rank_of_the_latents() -> None:
    with torch.no_grad():
        layer = FLARE(14, 2, num_latents=3, key_layers=0).double()
        layer.latents.normal_()
        q, k, _ = layer.split(x := normal(1, 2, 7, 14), x)
        weights = layer.mix(q, k, torch.eye(7).double().expand(2, 2, 7, 7), None)
    close(weights.sum(-1), torch.ones(2, 2, 7).double())
    assert (weights > 0).all()
    assert (torch.linalg.matrix_rank(weights) == 3).all()
    close(weights, naive_attention(layer.latents.detach(), k, k)[1])
    unit = torch.nn.functional.normalize(weights.flatten(2), dim=-1)
    assert (unit[:, 0] * unit[:, 1]).sum(-1).max() < 0.999, "each head has latents of its own"


@torch.no_grad()
def test_one_latent_gives_all_the_same() -> None:
    layer = regard.create("flare", dim=8, num_heads=2, num_latents=1, dtype=torch.float64)
    layer.latents.normal_()
    out = layer(normal(1, 2, 5, 8))
    close(out, out[:, :1].expand_as(out))
    assert (out[0] - out[1]).abs().max() > 1e-6


@torch.no_grad()
def test_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    layer = FLARE(64, 8)
    assert layer.latents.shape == (8, 64, 8)
    assert layer.latents.std() == pytest.approx(0.1, rel=0.05)
    assert [len(p.linears) for p in (layer.k_proj, layer.v_proj)] == [5, 5]
    for linear in (*layer.k_proj.linears, *layer.v_proj.linears, layer.o_proj):
        assert linear.weight.std() == pytest.approx(0.02, rel=0.05)
        assert (linear.bias == 0).all()


@torch.no_grad()
def test_hidden_tokens_get_the_bias_alone() -> None:
    layer, x = FLARE(6, 2, num_latents=3).double(), normal(1, 2, 7, 6)
    layer.o_proj.bias.normal_()
    out = layer(x, mask=KEEP)
    same(out[1, [0, 5]], layer.o_proj.bias.expand(2, -1))
    close(out[1, KEEP[1]], layer(x[1:, KEEP[1]])[0])
    assert layer(x[:0]).shape == (0, 7, 6)
    assert layer(x[:, :0]).shape == (2, 0, 6)


def test_no_square_matrix() -> None:
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    layer = FLARE(8, 2, num_latents=8)
    with Watch():
        layer(torch.randn(1, T, 8), mask=torch.arange(T)[None] < 500)
    assert max(sizes) <= 2 * 8 * T


def test_dropout_is_of_weights_in_training() -> None:
    layer, x = FLARE(8, 2, num_latents=4, dropout=0.5), torch.randn(1, 6, 8)
    same(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="causal"):
        regard.create("flare", dim=8, num_heads=2, causal=True)
    for wrong in ({"num_latents": 0}, {"scale": 0.0}, {"key_layers": -2}, {"value_layers": 1.0}, {"key_ratio": 0.0},
                  {"value_ratio": -1.0}, {"qk_norm": 1}, {"dropout": 2.0}):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=rf"FLARE: {next(iter(wrong))} .* \(got .*\); expected "):
            FLARE(8, 2, **wrong)
    with pytest.raises(ValueError, match=r"FLARE: int\(key_ratio M\) is too small \(got 0\)"):
        FLARE(8, 2, key_ratio=0.1)
    with pytest.raises(ValueError, match=r"latents has the wrong shape \(got \(1, 3, 2, 4\)\); expected "):
        flare_attention(torch.zeros(3, 2, 4), *(torch.zeros(1, 2, 5, 4) for _ in "kv"))


@pytest.mark.parametrize("options", [{"key_layers": -1}, {"value_layers": -1}, {"qk_norm": True, "value_ratio": 0.5}])
def test_autocast_may_widen_either_of_keys_and_values(options: dict) -> None:
    layer, x = FLARE(12, 2, **{"key_ratio": 0.5, "value_ratio": 0.5, **options}), normal(0, 2, 5, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    torch.testing.assert_close(got.float(), layer(x), atol=0.05, rtol=0.05)

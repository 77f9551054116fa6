"""Feature maps against loops, whose author has read neither code nor test, and third-party numbers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from linear import naive_features as naive
from regard.laws.agreement import close
from regard.linear import LinearAttention, linear_attention
from regard.linear.features import DPFP, MAPS, T2R, FeatureMap, Hedgehog, dpfp, feature_map

FOLDER = Path(__file__).parents[1] / "vectors"
ONCE, AGAIN = FOLDER / "S-featuremaps.npz", FOLDER / "fla_feature_maps.npz"
"""The first has outputs alone; in the second DPFP is as in the paper, with relu(-x)."""
THEIRS = {"linear": "layer", "one": "layer1", "other": "layer2", "norm.weight": "gamma", "norm.bias": "beta"}


def vectors(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def renamed(name: str) -> str:
    first, _, rest = name.partition(".")
    return THEIRS.get(name) or f"{THEIRS[first]}.{rest}"


def told(name: str) -> Callable[[int], FeatureMap]:
    return {"t2r": partial(T2R, features=6), "dpfp": partial(DPFP, nu=3)}.get(name, MAPS[name])


@pytest.mark.parametrize("name", [name for name in MAPS if name != "elu"])
def test_gives_third_party_numbers_and_gradients(name: str) -> None:
    z, phi = vectors(AGAIN), told(name)(4).double()
    own = dict(phi.named_parameters())
    with torch.no_grad():
        for n, p in own.items():
            p.copy_(z[f"{name}_p.{renamed(n)}"])
    x = z["x"].requires_grad_()
    out = phi(x)
    assert out.shape[-1] == phi.features
    close(out.detach(), z[f"{name}_y"])
    grads = torch.autograd.grad((out * z[f"{name}_w"]).sum(), [x, *own.values()])
    for g, n in zip(grads, ["x", *(f".{renamed(n)}" for n in own)], strict=True):
        close(g, z[f"{name}_g{n}"])


@pytest.mark.parametrize("name", [name for name in MAPS if name not in ("elu", "dpfp")])
def test_gives_the_numbers_of_another_run(name: str) -> None:
    z = vectors(ONCE)
    width = {"t2r": z["t2r"].shape[-1]}.get(name)
    phi = (T2R(4, width) if width else MAPS[name](4)).double()
    with torch.no_grad():
        for n, p in phi.named_parameters():
            p.copy_(z[f"{name}_{renamed(n)}"])
        close(phi(z["x"]), z[name])


def test_dpfp_is_the_papers_and_not_that_of_one_commit() -> None:
    """That has -relu(x) for the second half, and products that are negative."""
    z = vectors(ONCE)
    close(naive.every(naive.dpfp, z["x"], 3, True), z["dpfp"])
    close(dpfp(z["x"], 3), naive.every(naive.dpfp, z["x"], 3))
    assert (z["dpfp"] < 0).any()
    assert (dpfp(z["x"], 3) >= 0).all()


def by_loops(name: str, phi: FeatureMap, x: Tensor) -> Tensor:
    rows = [p for _, p in sorted(phi.named_parameters())]
    if name == "hedgehog":
        return naive.every(naive.hedgehog, x, phi.linear.weight, phi.linear.bias)
    if name == "t2r":
        return naive.every(naive.t2r, x, *rows)
    if name == "hadamard":
        return naive.every(naive.hadamard, x, phi.one.weight, phi.one.bias, phi.other.weight, phi.other.bias)
    if name == "rebased":
        return naive.every(naive.rebased, x, phi.norm.weight, phi.norm.bias)
    return naive.every(naive.taylor, x) if name == "taylor" else naive.every(naive.dpfp, x, phi.nu)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in MAPS if name != "elu"])
def test_the_layer_equals_the_loops(name: str, causal: bool) -> None:
    """Through `create`: sum_j w_ij v_j, over their sum where the map's products are never negative."""
    torch.manual_seed(0)
    layer = regard.create("linear", dim=12, num_heads=3, causal=causal, feature=told(name), dtype=torch.float64)
    for p in (*layer.q_map.parameters(), *layer.k_map.parameters()):
        nn.init.normal_(p)
    q, k, v = (normal(n, 1, 3, 5, 4) for n in (1, 2, 3))
    w = by_loops(name, layer.q_map, q) @ by_loops(name, layer.k_map, k).mT
    w = w.tril() if causal else w
    total = w.sum(-1, keepdim=True)
    want = w @ v / torch.where(total == 0, 1.0, total) if layer.normalise else w @ v
    got = layer.mix(q, k, v, None)
    close(got.detach(), want.detach())
    leaves, direction = [q, k, v, *layer.q_map.parameters(), *layer.k_map.parameters()], normal(4, *want.shape)
    for g, h in zip(*(torch.autograd.grad((z * direction).sum(), leaves) for z in (got, want)), strict=True):
        close(g, h)


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
def test_step_by_step_with_every_map(name: str) -> None:
    torch.manual_seed(0)
    layer = regard.create("linear", dim=12, num_heads=3, num_kv_heads=1, causal=True, feature=name, dtype=torch.float64)
    assert layer.normalise == (name != "hadamard")
    x, state = normal(1, 2, 7, 12), layer.init_state(2, 7)
    outs = []
    for part in x.split([1, 4, 2], 1):
        out, state = layer.step(part, state)
        outs.append(out)
    close(torch.cat(outs, 1), layer(x))
    assert state.sums.shape == (2, 3, layer.k_map.features, 4 + layer.normalise)
    keep = torch.tensor([[True, False, True, True, True, False, True]] * 2)
    shown = torch.where(keep[..., None], x, 1e6)
    close(layer(shown, mask=keep)[keep], layer(x, mask=keep)[keep])


@torch.no_grad()
def test_identities_of_products() -> None:
    a, b = normal(1, 5, 4), normal(2, 5, 4)
    s = (a * b).sum(-1)
    taylor, rebased = MAPS["taylor"](4).double(), MAPS["rebased"](4).double()
    close((taylor(a) * taylor(b)).sum(-1), 1 + s / 2 + s**2 / 8)
    u = [torch.nn.functional.layer_norm(z, (4,)) for z in (a, b)]
    close((rebased(a) * rebased(b)).sum(-1), (u[0] * u[1]).sum(-1) ** 2 / 4)


def test_hedgehog_starts_as_the_identity() -> None:
    x = normal(1, 1, 1, 3, 4).detach()
    close(Hedgehog(4).double()(x), torch.cat([2 * x, -2 * x], -1).softmax(-1))


def test_maps_of_ones_own_and_parameters_in_half_precision() -> None:
    class Relu(FeatureMap):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    layer = LinearAttention(8, 2, feature=Relu).double()
    q, k, v = (normal(n, 1, 2, 5, 4).detach().abs() for n in (1, 2, 3))
    close(layer.mix(q, k, v, None), (w := q @ k.mT) / w.sum(-1, keepdim=True) @ v)
    plain = linear_attention(q, k, v, phi_q=Tensor.relu, phi_k=Tensor.relu, normalise=False)
    close(plain.out, w @ v)
    assert plain.state.shape == (1, 2, 4, 4)
    for name in MAPS:
        half = LinearAttention(8, 2, feature=name).to(torch.bfloat16)
        assert half(torch.randn(1, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"LinearAttention: feature is unknown .*hedgehog"):
        LinearAttention(8, 2, feature="hedgehogs")
    for wrong in (3, nn.Identity, lambda width: None):
        with pytest.raises(TypeError, match=r"LinearAttention: feature makes no feature map .*; expected a name"):
            LinearAttention(8, 2, feature=wrong)
    with pytest.raises(ValueError, match=r"normalise divides by sums that may be 0 \(got True\)"):
        LinearAttention(8, 2, feature="hadamard", normalise=True)
    with pytest.raises(ValueError, match="DPFP: nu is too large"):
        DPFP(4, 9)
    with pytest.raises(ValueError, match="T2R: features is too small"):
        T2R(4, 0)
    with pytest.raises(ValueError, match="Hedgehog: factor is out of range"):
        Hedgehog(4, 0.0)
    with pytest.raises(ValueError, match="somebody: feature"):
        feature_map("somebody", "none", 4)

"""Softplus attention against the formula in Python floats, written from the equations alone, and independent code's
numbers (A147)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.normalizers.lssa import LengthScaledSoftplus, UnitScore

VECTORS = Path(__file__).parents[1] / "vectors" / "A147.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def oracle(q: Tensor, k: Tensor, allowed: Tensor, power: int | None, eps: float = 1e-8) -> Tensor:
    """Weights (B, H, T, S) of queries (B, H, T, D) and keys (B, H, S, D), row by row."""
    (B, H, T, D), S = q.shape, k.shape[2]
    allowed = allowed.expand(B, H, T, S)
    out = torch.zeros(B, H, T, S, dtype=torch.float64)
    for b, h, t in np.ndindex(B, H, T):
        keys = [s for s in range(S) if allowed[b, h, t, s]]
        n, a = len(keys), {}
        for s in keys:
            length = [max(math.sqrt(sum(float(e) ** 2 for e in z)), 1e-12) for z in (q[b, h, t], k[b, h, s])]
            cosine = sum(float(x) * float(y) for x, y in zip(q[b, h, t], k[b, h, s], strict=True))
            a[s] = math.log1p(math.exp(math.log(D) * math.log(n) * cosine / length[0] / length[1]))
        total = sum(a.values()) + eps
        weights = {s: x / total for s, x in a.items()}
        if power is not None:
            r = {s: max(n * w - (0 if n <= 3 else 1), 0.0) ** power for s, w in weights.items()}
            total = sum(r.values()) + eps
            weights = {s: x / total for s, x in r.items()}
        for s, w in weights.items():
            out[b, h, t, s] = w
    return out


def parts(D: int, power: int | None) -> dict[str, torch.nn.Module]:
    return {"score": UnitScore(), "normalizer": LengthScaledSoftplus(D, power=power)}


@pytest.mark.parametrize(("case", "power"), [("lssa_", None), ("r3_", 3), ("r15_", 15)])
def test_gives_independent_codes_numbers(case: str, power: int | None) -> None:
    z = vectors(case)
    T, D = z["q"].shape[2:]
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    close(oracle(z["q"], z["k"], allowed, power), z["weights"])
    q, k, v = (z[n].clone().requires_grad_() for n in "qkv")
    out = regard.attention(q, k, v, mask=regard.masks.causal(), **parts(D, power))
    (out * z["w"]).sum().backward()
    close(out.detach(), z["out"])
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        close(tensor.grad, z["grad_" + name])


def random_mask(seed: int, B: int, H: int, T: int, S: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    return (
        torch.ones(1, 1, T, S, dtype=torch.bool),
        causal,
        causal & (torch.rand(B, 1, 1, S, generator=g) < 0.7),
        torch.rand(B, H, T, S, generator=g) < 0.6,
    )[seed % 4]


@pytest.mark.parametrize("power", [None, 1, 3, 15])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_formula(seed: int, power: int | None) -> None:
    B, H, T, D = 1 + seed % 2, 1 + seed % 3, 1 + seed % 5, 1 + seed % 4
    S = T + seed % 3 + 2
    q, k, v = normal(seed, B, H, T, D), normal(seed + 1, B, H, S, D), normal(seed + 2, B, H, S, 3)
    allowed = random_mask(seed, B, H, T, S)
    want = oracle(q, k, allowed, power) @ v
    for kernel in ("auto", "eager", "chunked"):
        close(regard.attention(q, k, v, mask=allowed, kernel=kernel, **parts(D, power)), want)


@pytest.mark.parametrize(("name", "power"), [("lssa", None), ("lssar", 15)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_puts_it_in_the_place_of_softmax(name: str, power: int | None, causal: bool) -> None:
    layer = regard.create(name, dim=12, num_heads=4, num_kv_heads=2, causal=causal).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    x = normal(9, 2, 7, 12)
    q, k, v = (
        proj(x).detach().unflatten(-1, (-1, 3)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    allowed = torch.ones(7, 7, dtype=torch.bool)
    weights = oracle(q, k, allowed.tril() if causal else allowed, power)
    close(layer(x).detach(), layer.o_proj((weights @ v).transpose(1, 2).flatten(2)).detach())


def test_length_of_queries_is_nothing_to_it_and_weights_below_average_go() -> None:
    """Queries 10^4 times as long give the same output; re-weighted, exactly the keys above a row's average remain."""
    x = normal(0, 1, 24, 16)
    plain, sharp = (regard.create(name, dim=16, num_heads=1, causal=True).double() for name in ("lssa", "lssar"))
    for layer in (plain, sharp):
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.eye(16))
        before = layer(x).detach()
        with torch.no_grad():
            layer.q_proj.weight.mul_(1e4)
        close(layer(x).detach(), before, 1e-9)
    allowed, q, eye = torch.ones(24, 24, dtype=torch.bool).tril(), x[:, None], torch.eye(24).double()[None, None]
    first, then = (regard.attention(q, q, eye, mask=regard.masks.causal(), **parts(16, p)) for p in (None, 15))
    above = first[0, 0] * allowed.sum(-1, keepdim=True) > 1
    above[:3] = allowed[:3]
    assert torch.equal(then[0, 0] > 0, above)
    close(first.sum(-1), torch.ones(1, 1, 24).double(), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_key_of_very_many_overflows_nothing(dtype: torch.dtype) -> None:
    """n^15 would, from n = 400 on."""
    scores = torch.full((1, 1, 1, 20_000), -1.0, dtype=dtype)
    scores[..., 7] = 1.0
    scores.requires_grad_()
    weights = LengthScaledSoftplus(64, power=15)(scores, None)
    weights[..., 7].sum().backward()
    assert abs(float(weights.detach()[..., 7]) - 1) < 1e-6
    assert torch.isfinite(scores.grad).all()


def test_keys_all_alike_get_nothing() -> None:
    scores = torch.full((1, 1, 2, 6), 0.5, dtype=torch.float64).requires_grad_()
    weights = LengthScaledSoftplus(4, power=3)(scores, None)
    weights.sum().backward()
    assert weights.abs().max() < 1e-6
    assert torch.isfinite(scores.grad).all()


def test_masked_keys_are_exact_zeros_and_cannot_poison() -> None:
    scores = normal(5, 2, 2, 3, 6).tanh()
    allowed = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    allowed[..., 4:] = False
    allowed[1, :, 2] = False
    for power in (None, 3):
        part = LengthScaledSoftplus(4, power=power)
        poisoned = scores.masked_fill(~allowed, float("nan")).requires_grad_()
        weights = part(poisoned, allowed)
        assert torch.equal(weights, part(scores, allowed))
        assert not weights.masked_select(~allowed).any()
        (weights * scores).sum().backward()
        assert torch.isfinite(poisoned.grad).all()
        assert not poisoned.grad.masked_select(~allowed).any()


@pytest.mark.parametrize("power", [None, 3])
def test_gradcheck(power: int | None) -> None:
    part, scores = LengthScaledSoftplus(4, power=power), normal(8, 1, 2, 3, 5).tanh()
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    assert torch.autograd.gradcheck(lambda z: part(z, allowed), (scores.requires_grad_(),))


@pytest.mark.parametrize(("wrong", "told"), [({"power": 0}, "power"), ({"eps": 0.0}, "eps")])
def test_refuses(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regard.create("lssar", dim=8, num_heads=2, **wrong)

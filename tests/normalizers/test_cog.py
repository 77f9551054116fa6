"""Cog attention against its definition in Python floats and the authors' numbers (A020)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.normalizers import Cog

VECTORS = Path(__file__).parents[1] / "vectors" / "A020.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def oracle(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """sign(P) exp(|P| - m) / sum exp(|P| - m), m the largest |P| of the row, over allowed keys."""
    keep = torch.ones(scores.shape, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    weights = torch.zeros_like(scores)
    for row in np.ndindex(*scores.shape[:-1]):
        size = {s: abs(float(scores[row][s])) for s in range(scores.shape[-1]) if keep[row][s]}
        if not size:
            continue
        largest = max(size.values())
        total = sum(math.exp(p - largest) for p in size.values())
        for s, p in size.items():
            value = float(scores[row][s])
            sign = (value > 0) - (value < 0)
            weights[row][s] = sign * math.exp(p - largest) / total
    return weights


def turn(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary on adjacent channels of z (B, T, H, D), with the table of the authors' code, (T, D/2)."""
    turned = torch.stack(
        [
            part
            for a in range(cos.shape[1])
            for part in (
                z[..., 2 * a] * cos[:, None, a] - z[..., 2 * a + 1] * sin[:, None, a],
                z[..., 2 * a] * sin[:, None, a] + z[..., 2 * a + 1] * cos[:, None, a],
            )
        ],
        dim=-1,
    )
    return turned


@pytest.mark.parametrize("case", ["c1_", "c2_"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    close(oracle(z["scores"], z["mask"]), z["weights"])
    x, wq = z["x"].clone().requires_grad_(), z["Wq"].clone().requires_grad_()
    heads = (3, z["Wq"].shape[1] // 3)
    q, k, v = (torch.unflatten(x @ w, -1, heads) for w in (wq, z["Wk"], z["Wv"]))
    q, k = (turn(part, z["freqs_cos"], z["freqs_sin"]) for part in (q, k))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(heads[1])
    close(scores.detach(), z["scores"])
    weights = Cog()(scores, z["mask"])
    out = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ z["Wo"]
    (out * z["w"]).sum().backward()
    close(weights.detach(), z["weights"])
    close(out.detach(), z["out"])
    close(x.grad, z["grad_x"])
    close(wq.grad, z["grad_Wq"])


@pytest.mark.parametrize("seed", range(24))
def test_equals_the_definition(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, H, T, S = (int(torch.randint(1, n, (), generator=g)) for n in (3, 4, 6, 9))
    scores = torch.randn(B, H, T, S, generator=g, dtype=torch.float64) * (0.3, 1.0, 30.0)[seed % 3]
    allowed = (
        None,
        torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None],
        torch.rand(B, H, T, S, generator=g) < 0.6,
        torch.rand(B, 1, 1, S, generator=g).expand(B, 1, T, S) < 0.7,
    )[seed % 4]
    scores[..., ::4] *= float(seed % 5 != 0)  # some scores exactly 0
    close(Cog()(scores, allowed), oracle(scores, allowed))


def test_absolute_weights_sum_to_one_and_both_signs_occur() -> None:
    scores = torch.randn(2, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = Cog()(scores, None)
    close(weights.abs().sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))
    assert (weights < 0).any()
    assert (weights > 0).any()
    assert torch.equal(weights.sign(), scores.sign())


def test_copies_one_token_and_deletes_another_at_once() -> None:
    scores = torch.tensor([0.0, 9.0, 0.0, -9.0], dtype=torch.float64)[None, None, None]
    out = Cog()(scores, None) @ torch.eye(4, dtype=torch.float64)
    assert out[..., 1] > 0.49
    assert out[..., 3] < -0.49


def test_a_score_of_zero_has_no_weight_and_no_gradient() -> None:
    scores = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)[None, None, None].requires_grad_()
    weights = Cog()(scores, None)
    (weights * torch.tensor([5.0, 1.0, 2.0])).sum().backward()
    assert weights[0, 0, 0, 0] == 0
    assert scores.grad[0, 0, 0, 0] == 0
    assert scores.grad[0, 0, 0, 1] != 0


def test_masked_keys_are_exact_zeros_and_cannot_poison() -> None:
    scores = torch.randn(2, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    allowed = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    allowed[..., 4:] = False
    allowed[1, :, 2] = False
    poisoned = scores.masked_fill(~allowed, float("nan")).requires_grad_()
    weights = Cog()(poisoned, allowed)
    assert torch.equal(weights, Cog()(scores, allowed))
    assert not weights.masked_select(~allowed).any()
    (weights * scores).sum().backward()
    assert torch.isfinite(poisoned.grad).all()
    assert not poisoned.grad.masked_select(~allowed).any()


def test_gradcheck() -> None:
    scores = torch.randn(1, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    allowed = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    assert torch.autograd.gradcheck(lambda z: Cog()(z, allowed), (scores.requires_grad_(),))


@pytest.mark.parametrize("name", ["cog"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_puts_it_in_the_place_of_softmax(name: str, causal: bool) -> None:
    M, H, G, D = 12, 4, 2, 3
    layer = regard.create(name, dim=M, num_heads=H, num_kv_heads=G, causal=causal).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    p = {key: value.detach() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 5, M, dtype=torch.float64, generator=g)
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    allowed = torch.ones(5, 5, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    weights = oracle(q @ k.transpose(-1, -2) / math.sqrt(D), allowed)
    close(layer(x).detach(), (weights @ v).transpose(1, 2).flatten(2) @ p["o_proj.weight"].T)

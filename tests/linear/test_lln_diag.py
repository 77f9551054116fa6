"""LLN+Diag against loops and the authors' numbers (B037)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_lln as naive
from regard.laws.agreement import close
from regard.linear import LLNDiag
from regard.linear.lln import matched

VECTORS = Path(__file__).parents[1] / "vectors" / "B037.npz"


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(**options) -> LLNDiag:
    torch.manual_seed(3)
    layer = regard.create("lln_diag", dim=8, num_heads=2, dtype=torch.float64, **options)
    for p in (layer.r, layer.p):
        if p is not None:
            assert p.shape == (1, 2, 1, 4)
            assert (p == 0.5).all()
            torch.nn.init.normal_(p)
    return layer


@pytest.mark.parametrize("mixing", ["average", "learnable_scale", "learnable_ratio"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loops(mixing: str, causal: bool):
    """Their author has read neither code nor test."""
    layer, x = built(mixing=mixing, causal=causal, eps=0.0, sigma=0.8), normal(2, 11, 8).requires_grad_()
    q, k, v = layer.split(x, x)
    alpha, beta = (float((0.8**4 - naive.B) / (2 * naive.A)) ** 0.5 / 0.8,) * 2
    for sigma in (layer.sigma_q, layer.sigma_k):
        assert float(sigma) == pytest.approx(0.8), "as the option says"
        sigma.fill_(0.8)
    out = naive.lln_diag(q, k, v, mix=mixing, r=layer.r, p=layer.p, causal=causal, eps=0.0, alpha=alpha, beta=beta)
    want, got = layer.merge(out), layer(x)
    close(got.detach(), want.detach())
    leaves = [x, *(p for p in (layer.r, layer.p) if p is not None)]
    for g, w in zip(*(torch.autograd.grad(z, leaves, normal(2, 11, 8, seed=7)) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize(("case", "mixing"), [("c", "average"), ("e", "learnable_scale")])
def test_authors_numbers(case: str, mixing: str):
    z = vectors()
    layer = built(mixing=mixing, statistics="batch", eps=1e-5)
    leaves = [z[n].requires_grad_() for n in ("q", "b_k", "c_v")]
    names = [f"{case}_g{n}" for n in "qkv"]
    if case == "e":
        layer.r, layer.p = (torch.nn.Parameter(z[f"e_{n}"]) for n in "rp")
        leaves += [layer.r, layer.p]
        names += ["e_gr", "e_gp"]
    out = layer.mixed(*leaves[:3], None, alone=True)
    close(out.detach(), z[f"{case}_y"])
    for g, name in zip(torch.autograd.grad(out, leaves, z["c_w"]), names, strict=True):
        close(g, z[name])


def test_authors_causal_numbers():
    """The far part is the loops', with the authors' maximum of all keys; the near part and what joins them are ours."""
    z = vectors()
    layer = built(mixing="learnable_ratio", causal=True)
    layer.r = torch.nn.Parameter(z["d_r"])
    leaves = [z[n].requires_grad_() for n in ("q", "b_k", "c_v")]
    out = layer.put_together(naive.lln(*leaves, causal=True, eps=1e-5), layer.near(*leaves, None))
    close(out.detach(), z["d_y"])
    for g, n in zip(torch.autograd.grad(out, [*leaves, layer.r], z["c_w"]), "qkvr", strict=True):
        close(g, z[f"d_g{n}"])


@torch.no_grad()
def test_only_the_block_is_read_sharply():
    """The claim: a query finds the key of its block that points its way, and of one outside reads little."""
    layer = regard.create("lln_diag", dim=8, num_heads=1, block=4, dtype=torch.float64)
    q, k = torch.zeros(1, 1, 8, 8).double(), 0.1 * normal(1, 1, 8, 8)
    q[..., 0] = 20
    k[:, :, 2, 0] = k[:, :, 6, 0] = 6
    weights = layer.mixed(q, k, torch.eye(8).double()[None, None], None, alone=True)
    assert weights[0, 0, 0, 2] > 0.5
    assert weights[0, 0, 5, 6] > 0.5
    assert weights[0, 0, 0, 6] < 0.5 * weights[0, 0, 0, 2]
    alpha, beta = matched(layer.sigma_q, layer.sigma_k)
    far = naive.lln(q, k, torch.eye(8).double()[None, None], alpha=alpha, beta=beta)
    close(weights[..., :4, 4:], far[..., :4, 4:] / 2)
    assert weights[..., :4, 4:].sum() > 0.1, "far tokens are read, too"


def test_refusals():
    for options, words in (
        ({"block": 0}, r"block is too small \(got 0\)"),
        ({"block": 10**9}, r"block is too large \(got 1000000000\); expected an int from 1 to 4096"),
        ({"mixing": "sum"}, r"mixing is unknown \(got 'sum'\)"),
        ({"statistics": "batch", "causal": True}, "statistics shows later tokens to earlier ones"),
    ):
        with pytest.raises(ValueError, match=words):
            LLNDiag(8, 2, **options)
    with pytest.raises(ValueError, match="context is not taken"):
        built()(normal(1, 2, 8), normal(1, 2, 8))

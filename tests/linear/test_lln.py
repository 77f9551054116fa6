"""Linear log-normal attention against loops, the authors' numbers (B037), and what it promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_lln as naive
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close
from regard.linear import LLN, concentration, lln_attention
from regard.linear.lln import matched, spread

VECTORS = Path(__file__).parents[1] / "vectors" / "B037.npz"


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_agree(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got.detach(), want.detach())
    along = normal(*got.shape, seed=9)
    for g, w in zip(*(torch.autograd.grad(z, leaves, along) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 5, 7, 3, 4), (1, 1, 1, 1, 2, 1)], ids=str)
def test_equals_the_loops(causal: bool, sizes: tuple[int, ...]):
    """Their author has read neither code nor test. Without eps a running maximum cancels."""
    B, H, T, S, D, V = sizes
    S = T if causal else S
    leaves = [normal(B, H, n, w, seed=i).requires_grad_() for i, (n, w) in enumerate(((T, D), (S, D), (S, V)))]
    scales = {"alpha": 1.3, "beta": 0.7}
    for eps in (0.0,) if causal else (0.0, 1e-2):
        got, _ = lln_attention(*leaves, **scales, causal=causal, eps=eps)
        gradients_agree(got, naive.lln(*leaves, **scales, causal=causal, eps=eps), leaves)


def test_matches_moments_as_the_loops():
    q, k = 2 * normal(2, 2, 5, 3) + 1, normal(2, 2, 7, 3, seed=2)
    got = matched(spread(q), spread(k))
    close(torch.stack(got), torch.tensor(naive.matched(q, k), dtype=torch.float64))
    keep = torch.tensor([[True, False, True, True, False]] * 2)
    close(spread(q, keep), spread(q[:, :, keep[0]]))
    assert spread(torch.ones(1, 1, 3, 2)) == 1


def test_authors_numbers():
    z = vectors()
    leaves = [z[n].requires_grad_() for n in "qkv"]
    out, _ = lln_attention(*leaves, *matched(spread(z["q"]), spread(z["k"])))
    close(out.detach(), z["a_y"])
    for g, n in zip(torch.autograd.grad(out, leaves, z["w"]), "qkv", strict=True):
        close(g, z[f"a_g{n}"])


def test_authors_causal_numbers():
    """Their maximum of keys is that of all, which counts beside eps."""
    z = vectors()
    leaves = q, k, v = [z[n].requires_grad_() for n in ("q", "b_k", "b_v")]
    alpha, beta = matched(spread(q), spread(k))
    phi_q = (alpha * q - (alpha * q).amax(-1, keepdim=True)).exp()
    phi_k = (beta * k - (beta * k).amax((2, 3), keepdim=True)).exp()
    mixed, _ = linear_scan(phi_q, phi_k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    out = mixed[..., :-1] / (mixed[..., -1:] + 1e-8)
    close(out.detach(), z["b_y"])
    for g, n in zip(torch.autograd.grad(out, leaves, z["w"]), "qkv", strict=True):
        close(g, z[f"b_g{n}"])
    ours, _ = lln_attention(*leaves, alpha, beta, causal=True)
    assert float((ours - out).detach().abs().max()) < 1e-4


@torch.no_grad()
def test_weights_are_spread_as_softmax_s():
    """The claim: the variance of log-weights is near softmax's, and far from it without moment matching."""
    layer = regard.create("lln", dim=64, num_heads=1, dtype=torch.float64)
    T = 256
    for sigma in (1.0, 1.2, 1.5):
        q, k = (sigma * normal(1, 1, T, 64, seed=s) for s in (1, 2))
        layer.sigma_q.fill_(sigma)
        layer.sigma_k.fill_(sigma)
        eye = torch.eye(T, dtype=torch.float64)[None, None]
        soft = ((q @ k.mT) / 8).softmax(-1).log().var()
        ours = layer.mix(q, k, eye, None).log().var()
        plain = lln_attention(q, k, eye, 1.0, 1.0)[0].log().var()
        assert 0.7 < ours / soft < 1.3
        assert abs(ours / soft - 1) > 1e-6
        assert plain < 0.1 * soft


@torch.no_grad()
def test_statistics_of_a_batch_and_of_a_calibrated_layer():
    x, keep = 3 * normal(2, 6, 8), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    layer = regard.create("lln", dim=8, num_heads=2, statistics="batch", dtype=torch.float64)
    q, k, v = layer.split(x, x)
    close(layer(x), layer.merge(naive.lln(q, k, v)))
    fixed = regard.create("lln", dim=8, num_heads=2, dtype=torch.float64)
    fixed.load_state_dict(layer.state_dict())
    assert (fixed(x) - layer(x)).abs().max() > 1e-3
    fixed.calibrate(x, mask=keep)
    close(fixed(x, mask=keep), layer(x, mask=keep))


def test_concentration():
    """Even weights have full entropy and a gap of 1; two sets of tokens that see only themselves have none."""
    even, apart = torch.full((2, 4, 4), 0.25), torch.block_diag(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5))
    found = concentration(even.double())
    close(found.entropy, torch.full((2, 4), 4.0).double().log())
    close(found.spectral_gap, torch.ones(2).double())
    close(concentration(apart.double()).spectral_gap, torch.zeros(()).double())
    close(
        concentration(torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)).spectral_gap,
        torch.tensor(0.3, dtype=torch.float64),
    )
    scores = normal(1, 1, 40, 40)
    wide, sharp = (concentration((t * scores).softmax(-1)) for t in (1.0, 4.0))
    assert wide.entropy.mean() > sharp.entropy.mean()
    assert wide.spectral_gap > sharp.spectral_gap
    with pytest.raises(ValueError, match="weights has the wrong shape"):
        concentration(torch.ones(2, 3))


def test_refusals():
    for options, words in (
        ({"sigma": 0.0}, "sigma is out of range"),
        ({"eps": -1.0}, "eps is out of range"),
        ({"statistics": "row"}, r"statistics is unknown \(got 'row'\); expected one of 'fixed', 'batch'"),
        ({"statistics": "batch", "causal": True}, "statistics shows later tokens to earlier ones"),
    ):
        with pytest.raises(ValueError, match=words):
            LLN(8, 2, **options)

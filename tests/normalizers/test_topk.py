"""Top-k softmax against loops, at ties, under masks, and what it is for."""

import math

import pytest
import torch
from tests.normalizers.naive_topk import naive_gradient, naive_topk
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.normalizers import Softmax, TopK
from regard.normalizers.topk import topk

INF, NAN = float("inf"), float("nan")


def random_case(seed: int) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, T, S) of many sizes, every third with ties, and a mask: none, causal or random."""
    g = torch.Generator().manual_seed(seed)
    B, H, T, S = (int(torch.randint(1, n, (), generator=g)) for n in (3, 4, 6, 12))
    scores = torch.randn(B, H, T, S, generator=g, dtype=torch.float64) * 3
    if seed % 3 == 0:
        scores = scores.round()
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    drawn = torch.rand(B, 1, T, S, generator=g) < 0.6
    return scores, (None, causal, drawn)[seed % 4 % 3]


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition(seed: int, k: int) -> None:
    scores, allowed = random_case(seed)
    z = scores.clone().requires_grad_()
    p = TopK(k=k)(z, allowed)
    close(p.detach(), naive_topk(scores, k, allowed))
    dp = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed))
    (got,) = torch.autograd.grad(p, z, dp)
    close(got, naive_gradient(p.detach(), dp))


def test_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3), -1.0, 0.5 - 0.5]], dtype=torch.float64)
    close(topk(scores, 1), torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64))
    tied = torch.tensor([[0.2, 0.6, 0.0, 0.2]], dtype=torch.float64)
    close(topk(scores, 2), tied)  # what equals the second greatest stays
    close(topk(scores, 3), tied)
    close(topk(scores, 4), scores.softmax(-1))
    close(topk(scores, 99), scores.softmax(-1))


def test_second_derivatives() -> None:
    scores = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: topk(z, 3), scores)
    assert torch.autograd.gradgradcheck(lambda z: topk(z, 3), scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_keys_are_exact_zeros_and_cannot_poison(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 2, 3, 6, dtype=dtype, generator=torch.Generator().manual_seed(5))
    allowed = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    allowed[..., 3:] = False
    allowed[1, :, 2] = False  # an empty row
    p = {}
    for poison in (0.0, 1e30, INF, -INF, NAN):
        z = scores.masked_fill(~allowed, poison).requires_grad_()
        p[poison] = TopK(k=2)(z, allowed)
        (p[poison] * scores).sum().backward()
        assert torch.equal(p[poison], p[0.0])
        assert z.grad.isfinite().all()
        assert not z.grad.masked_select(~allowed).any()
    assert not p[0.0].masked_select(~allowed).any()
    assert ((p[0.0] > 0).sum(-1) == 2 * allowed.any(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_has_no_softmax_stays_nan(dtype: torch.dtype, bad: float) -> None:
    scores = torch.zeros(3, 40, dtype=dtype)
    scores[1, 7] = bad
    scores[2, 3:] = -INF
    p = topk(scores, 5)
    assert p[1].isnan().all()
    assert p[0].isfinite().all()
    assert torch.equal(p[2].nonzero().flatten(), torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)).to(dtype)
    p, want = topk(scores, 6), topk(scores.double(), 6)
    assert p.dtype == dtype
    assert torch.equal(p > 0, want > 0)
    assert (p.double() - want).abs().max() <= torch.finfo(dtype).eps


def test_no_keys() -> None:
    assert topk(torch.zeros(2, 0), 3).shape == (2, 0)
    assert topk(torch.zeros(0, 5), 3).shape == (0, 5)


@pytest.mark.parametrize("k", [0, -2, 2.0, True, None])
def test_refuses_bad_k(k: object) -> None:
    error, wrong = (ValueError, "is too small") if type(k) is int else (TypeError, "has the wrong type")
    for who, make in (("TopK", lambda k: TopK(k=k)), ("topk", lambda k: topk(torch.zeros(1, 2), k))):
        with pytest.raises(error, match=rf"^{who}: k {wrong} \(got {k!r}\); expected an int >= 1$"):
            make(k)
    with pytest.raises(
        TypeError, match=r"topk: scores has the wrong dtype \(got torch.int64\); expected floating point"
    ):
        topk(torch.zeros(1, 2, dtype=torch.int64), 1)


def test_more_keys_take_nothing_from_the_best() -> None:
    """Three keys matter; softmax loses them among a thousand that don't, top-k does not."""
    g = torch.Generator().manual_seed(4)
    noise = torch.randn(1, 1, 50, 4096, dtype=torch.float64, generator=g)
    noise[..., :3] = 5.0
    held = {
        type(n).__name__: [float(n(noise[..., :S], None)[..., :3].sum(-1).mean()) for S in (16, 256, 4096)]
        for n in (Softmax(), TopK(k=4))
    }
    assert held["Softmax"][0] > 0.9 > 0.6 > held["Softmax"][1] > 0.1 > held["Softmax"][2]
    assert min(held["TopK"]) > 0.9


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_puts_it_in_the_place_of_softmax(causal: bool) -> None:
    M, H, G, D = 12, 4, 2, 3
    layer = regard.create("topk", dim=M, num_heads=H, num_kv_heads=G, causal=causal, k=2).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    w = {key: value.detach() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 5, M, dtype=torch.float64, generator=g)
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    allowed = torch.ones(5, 5, dtype=torch.bool)
    weights = naive_topk(q @ k.mT / math.sqrt(D), 2, allowed.tril()[None, None] if causal else None)
    close(layer(x).detach(), (weights @ v).transpose(1, 2).flatten(2) @ w["o_proj.weight"].T)

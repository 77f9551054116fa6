"""Attention to lists of single keys, in C++ and by torch's operations: the naive form in float64 is the reference."""

import heapq
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import regard
from kernels.test_native import agrees, eager, problem, tensors
from regard import masks
from regard.kernels import listed
from regard.kernels.native import build
from regard.kernels.native import listed as native
from regard.kernels.plan import _auto, choose
from regard.laws.agreement import naive_precision, near
from regard.masks import Mask
from regard.masks.lists import Lasting
from regard.routing import running_best
from regard.routing._indexing import best

SIZES = [(2, 4, 2, 150, 150, 16, 16), (1, 2, 1, 60, 133, 24, 8), (1, 2, 2, 133, 60, 5, 37)]
FORMS = [pytest.param("C++", marks=pytest.mark.skipif(bool(build.why_not()), reason="no C++ kernels here")), "torch"]
RUNS = [1, 3, 9, 64, 200]
"""Queries that share a list: some go one by one, some together, and some in more than one piece."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(listed, "in_cpp", lambda p: False)
        monkeypatch.setattr(listed, "BYTES", 2**16)
    return str(request.param)


def drawn(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picked(sizes: tuple[int, ...], run: int, *, own: bool = True) -> Mask:
    """Lists in which a key may stand twice, and some are none."""
    B, H, _, T, S, *_ = sizes
    return masks.listed(
        torch.randint(-9, S, (B if own else 1, H if own else 1, -(-T // run), 20), generator=drawn()), T, S, run=run
    )


def tiles(sizes: tuple[int, ...], run: int, wide: int) -> Mask:
    _, H, _, T, S, *_ = sizes
    return masks.chosen(torch.rand(1, H, -(-T // run), -(-S // wide), generator=drawn(2)) < 0.1, T, S, (run, wide))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sizes", SIZES)
def test_lists(sizes: tuple[int, ...], run: int, form: str) -> None:
    B, S = sizes[0], sizes[4]
    keep = masks.padding(torch.rand(B, S, generator=drawn(3)) < 0.7)
    given = tensors(*sizes)
    agrees(given, picked(sizes, run), kernel=listed)
    agrees(given, masks.causal() & picked(sizes, run, own=False) & keep, kernel=listed)
    agrees(
        given, masks.window(40) & picked(sizes, run), bias=torch.randn(B, 1, 1, S, generator=drawn(4)), kernel=listed
    )


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_windows_and_first_keys(sizes: tuple[int, ...], run: int, form: str) -> None:
    given = tensors(*sizes)
    agrees(given, tiles(sizes, run, 2), kernel=listed)
    agrees(given, masks.causal() & (tiles(sizes, run, 1) | masks.window(5, ahead=2) | masks.prefix(3)), kernel=listed)
    agrees(given, masks.window(40) & (masks.window(3) | picked(sizes, run)), kernel=listed)


@pytest.mark.parametrize("sizes", SIZES)
def test_keys_that_go(sizes: tuple[int, ...], form: str) -> None:
    B, H, _, _, S, *_ = sizes
    until = torch.randint(0, S + 5, (B, H, S), generator=drawn())
    agrees(tensors(*sizes), masks.causal() & Lasting(until), kernel=listed)
    agrees(tensors(*sizes), Lasting(until[:1, :1]) & masks.padding(lengths=torch.full((B,), S // 2)), kernel=listed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_numbers(dtype: torch.dtype, form: str) -> None:
    sizes = (1, 4, 2, 150, 150, 16, 16)
    for run in (1, 64):
        agrees(tensors(*sizes, dtype=dtype), masks.causal() & picked(sizes, run), kernel=listed)


@pytest.mark.parametrize("shape", [(2, 4, 1, 150), (1, 4, 1, 1), (1, 1, 150, 150)])
@pytest.mark.parametrize("run", [1, 64])
def test_the_bias_learns(run: int, shape: tuple[int, ...], form: str) -> None:
    sizes = (2, 4, 2, 150, 150, 16, 16)
    given, mask = tensors(*sizes), masks.causal() & picked(sizes, run)
    bias = torch.randn(shape, generator=drawn()).requires_grad_()
    wide = [z.detach().double().requires_grad_() for z in (*given, bias)]
    p, exact = problem(given, mask=mask, bias=bias), problem(wide[:3], mask=mask, bias=wide[3])
    grad = torch.randn(2, 4, 150, 16, generator=drawn(5))
    got = torch.autograd.grad(listed.run(p), [*given, bias], grad)
    want = torch.autograd.grad(eager(exact), wide, grad.double())
    with naive_precision():
        plain = torch.autograd.grad(eager(p), [*given, bias], grad)
    for n, (g, w, naive) in enumerate(zip(got, want, plain, strict=True)):
        near(g, w, naive, f"gradient {n}", grad=True)


def test_second_derivatives(form: str) -> None:
    sizes = (1, 2, 1, 20, 20, 8, 8)
    p = problem(tensors(*sizes), mask=masks.causal() & picked(sizes, 9))
    twice = []
    for run in (listed.run, eager):
        (dq,) = torch.autograd.grad(run(p).square().sum(), p.q, create_graph=True)
        twice.append(torch.autograd.grad(dq.square().sum(), p.k)[0])
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-4)


def test_queries_without_keys(form: str) -> None:
    """They give 0, with gradients of 0, whoever else has keys."""
    given = tensors(1, 2, 2, 40, 40, 16, 16)
    for run in (1, 8):
        keys = torch.full((1, 1, 40 // run, 3), -1)
        keys[:, :, 2] = 7
        p = problem(given, mask=masks.listed(keys, 40, 40, run=run))
        out = listed.run(p)
        seen = torch.arange(40) // run == 2
        assert torch.equal(out[:, :, ~seen], torch.zeros_like(out[:, :, ~seen]))
        assert torch.equal(out[:, :, seen], given[2][:, :, 7:8].expand_as(out[:, :, seen]))
        dq, dk, dv = torch.autograd.grad(out.sum(), given)
        assert not dq.any()
        assert not dk.any()
        assert torch.equal(dv[0, 0, :, 0].nonzero().flatten(), torch.tensor([7]))


def test_nan_reaches_who_sees_it(form: str) -> None:
    q, k, v = (z.detach() for z in tensors(1, 1, 1, 40, 40, 16, 16))
    keys = torch.arange(40)[None, None, :, None].repeat(1, 1, 1, 2)
    keys[..., 1] = -1
    keys[0, 0, 5, 1] = 30
    k[0, 0, 30] = torch.nan
    out = regard.attention(q, k, v, mask=masks.listed(keys, 40, 40), kernel="listed")
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [5, 30]


@pytest.mark.skipif(bool(build.why_not()), reason="no C++ kernels here")
def test_very_long_lists_lose_nothing() -> None:
    """Floats to which 100000 equal weights are added one after another are off by 1e-4."""
    S = 100_000
    v = torch.full((1, 1, S, 16), 0.1)
    for T, run in ((1, 1), (8, 8)):
        q, k = torch.zeros(1, 1, T, 16), torch.zeros(1, 1, S, 16)
        out = listed.run(problem([q, k, v], mask=masks.listed(torch.arange(S)[None, None, None], T, S, run=run)))
        assert (out - 0.1).abs().max() < 5e-6


def test_refusals() -> None:
    sizes = (1, 2, 2, 70, 70, 8, 8)
    given = tensors(*sizes)
    for mask in (None, masks.causal(), masks.dilated(3, 2) & picked(sizes, 1), ~picked(sizes, 1),
                 picked(sizes, 1) | masks.causal(), picked(sizes, 1) & picked(sizes, 2)):  # fmt: skip
        assert any("picked single keys" in reason for reason in listed.why_not(problem(given, mask=mask))), mask
    assert "for 71 queries" in listed.why_not(problem(given, mask=picked((1, 2, 2, 71, 71), 1)))[0]
    alibi = problem(given, mask=picked(sizes, 1), position=regard.positions.Alibi(2))
    assert any("Alibi" in reason for reason in listed.why_not(alibi))


@pytest.mark.skipif(bool(build.why_not()), reason="no C++ kernels here")
def test_plan_takes_it_where_little_is_picked() -> None:
    """By its price, and at once where that leaves no doubt; not where half of all is picked."""
    q = torch.randn(1, 1, 2048, 32, generator=drawn())
    for run in (1, 64):
        few, many = (torch.randint(2048, (1, 1, -(-2048 // run), n), generator=drawn()) for n in (16, 2000))
        p = problem([q, q, q], mask=masks.causal() & masks.listed(few, 2048, 2048, run=run))
        assert choose(p).kernel == "listed"
        assert _auto(p) is listed
        p = replace(p, mask=masks.causal() & masks.listed(many, 2048, 2048, run=run))
        assert not listed.apart(p)


def test_lists_written_into_are_obeyed() -> None:
    given, keys = [z.detach() for z in tensors(1, 1, 1, 40, 40, 8, 8)], torch.zeros(1, 1, 40, 1, dtype=torch.int32)
    mask = masks.listed(keys, 40, 40)
    assert torch.equal(regard.attention(*given, mask=mask, kernel="listed"), given[2][:, :, :1].expand(-1, -1, 40, -1))
    keys.fill_(3)
    assert torch.equal(regard.attention(*given, mask=mask, kernel="listed"), given[2][:, :, 3:4].expand(-1, -1, 40, -1))


def gone(delta: list[float], real: list[bool], window: int) -> list[int]:
    """Straight from the words: after each token, who is among the best, of equals the latest?"""
    until = [len(delta) if r else 0 for r in real]
    for t in range(len(delta)):
        there = [s for s in range(t + 1) if real[s]]
        stay = heapq.nlargest(window, there, key=lambda s: (delta[s], s))
        for s in there:
            if s not in stay and until[s] == len(delta):
                until[s] = t
    return until


@pytest.mark.parametrize("window", [1, 4, 50])
def test_how_long_the_best_stay(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    delta = (3 * torch.randn(2, 3, 40, generator=drawn())).round()
    real = torch.rand(2, 3, 40, generator=drawn(2)) < 0.8
    want = [gone(d, r, window) for d, r in zip(delta.flatten(0, 1).tolist(), real.flatten(0, 1).tolist())]
    for reasons in ([], ["none here"]):
        if not reasons and build.why_not():
            continue
        monkeypatch.setattr(running_best.build, "why_not", lambda reasons=reasons: reasons)
        assert running_best.lasting(delta, real, window).flatten(0, 1).tolist() == want


@pytest.mark.skipif(bool(build.why_not()), reason="no C++ kernels here")
@pytest.mark.parametrize(("h", "d", "k"), [(3, 6, 17), (1, 4, 50), (2, 16, 1), (4, 3, 300)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_best_of_small_heads(h: int, d: int, k: int, causal: bool) -> None:
    """Whole numbers, so that many scores are equal: of these the latest."""
    B, T, S = 2, 200, 301
    q, w = torch.randint(-2, 3, (B, h, T, d), generator=drawn()), torch.randint(-2, 3, (B, h, T), generator=drawn(2))
    keys, keep = torch.randint(-2, 3, (B, S, d), generator=drawn(3)), torch.rand(B, S, generator=drawn(4)) < 0.8
    scores = (w[..., None] * (q @ keys.mT[:, None]).relu()).sum(1).double()
    hidden = ~keep[:, None] | (causal & (torch.arange(S) > torch.arange(S - T, S)[:, None]))
    scores = scores.masked_fill(hidden, -torch.inf)
    want = best(scores, k) & (scores > -torch.inf)
    found = native.indexed(q.float(), w.float(), keys.float(), k, causal=causal, keep=keep)
    assert found is not None
    assert torch.equal(masks.listed(found[:, None], T, S).dense(T, S)[:, 0], want)
    assert ((found >= 0).sum(-1) == want.sum(-1)).all(), "none twice"
    keys = keys.float()
    keys[0, 3] = torch.nan
    assert native.indexed(q.float(), w.float(), keys, k, causal=causal, keep=None) is None


@pytest.mark.skipif(bool(build.why_not()), reason="no C++ kernels here")
@pytest.mark.parametrize("sizes", [(5, 3, 1), (33, 130, 2), (1, 64, 4)])
def test_the_greatest_of_some_queries(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    r, c, block = sizes
    q, keys = torch.randn(2, 7, r, 19, generator=drawn()), torch.randn(50, block, 19, generator=drawn(2))
    index = torch.randint(50, (2, 7, c), generator=drawn(3))
    got = native.greatest(q, keys, index)
    monkeypatch.setattr(native, "ready", lambda x: False)
    torch.testing.assert_close(got, native.greatest(q, keys, index))
    want: Tensor = torch.einsum("nmrd,nmcbd->nmcbr", q, keys[index]).amax(-1)
    torch.testing.assert_close(got, want)

"""FAST against its explicit matrix and the authors' numbers (B018)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_fast import naive_fast, naive_fast_normalise
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear import FastAttention, fast_attention
from regard.linear.fast import monomials, normalise, taylor

VECTORS = Path(__file__).parents[1] / "vectors" / "B018.npz"


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients_agree(got: Tensor, want: Tensor, given: tuple[Tensor, ...]) -> None:
    close(got.detach(), want.detach())
    direction = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad((got * direction).sum(), given), torch.autograd.grad(want, given, direction)):
        close(g, w)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 7, 9, 4, 5), (1, 1, 1, 1, 1, 2), (2, 2, 5, 3, 3, 1)], ids=str)
def test_equals_the_explicit_matrix(order: int, causal: bool, sizes: tuple[int, ...]) -> None:
    B, H, T, S, D, V = sizes
    S = T if causal else S
    given = normal(1, B, H, T, D), normal(2, B, H, S, D), normal(3, B, H, S, V)
    q, k = (normalise(z) for z in given[:2])
    want = naive_fast(*(naive_fast_normalise(z, per_token=True) for z in given[:2]), given[2], p=order, causal=causal)
    gradients_agree(fast_attention(q, k, given[2], order=order, causal=causal).out, want, given)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_many_segments(order: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences longer than one segment are recomputed in backward, and come out the same."""
    monkeypatch.setattr("regard.linear.fast.SEGMENT", 4)
    given = normal(1, 1, 1, 11, 3), normal(2, 1, 1, 11, 3), normal(3, 1, 1, 11, 2)
    q, k = (normalise(z) for z in given[:2])
    keep = torch.tensor([[True, True, False, True, True, True, True, True, False, True, True]])
    want = naive_fast(*given, p=order, causal=causal)
    gradients_agree(fast_attention(*given, order=order, causal=causal).out, want, given)
    hidden = fast_attention(q, k, given[2], order=order, causal=causal, keep=keep)
    shown = naive_fast(q[:, :, keep[0]], k[:, :, keep[0]], given[2][:, :, keep[0]], p=order, causal=causal)
    close(hidden.out[:, :, keep[0]].detach(), shown.detach())


@pytest.mark.parametrize(
    ("case", "order", "causal", "lim"),
    [("a", 2, False, None), ("b", 2, True, None), ("c", 1, False, 0.8), ("d", 1, True, 0.8), ("e", 2, True, 1.7)],
)
def test_gives_the_authors_numbers(case: str, order: int, causal: bool, lim: float | None) -> None:
    z = vectors()
    S = 9 if case in "ac" else 7
    given = tuple(z[n][:, :, :S].clone().requires_grad_() for n in "qkv")
    q, k = given[:2] if lim is None else (lim * normalise(t, "sequence") for t in given[:2])
    out = fast_attention(q, k, given[2], order=order, causal=causal).out
    close(out.detach(), z[f"{case}_y"])
    for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv"):
        close(g, z[f"{case}_g{n}"])


def test_gives_the_experiments_numbers() -> None:
    """Another code of the same university: means subtracted, or scores divided by 8 sqrt(D)."""
    z = vectors()
    given = tuple(z[n][:, :, :7].clone().requires_grad_() for n in "qkv")
    q, k, v = given
    centred = [normalise(t - t.mean(-1, keepdim=True), "sequence") for t in (q, k)]
    out = fast_attention(*centred, v).out
    close(out.detach(), z["f_y"])
    for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv"):
        close(g, z[f"f_g{n}"])
    close(fast_attention(q / (8 * 4**0.5), k, v, causal=True).out.detach(), z["g_y"])
    close(fast_attention(*centred, v, order=1, causal=True).out.detach(), z["h_y"])


def test_features_are_the_polynomial() -> None:
    """D (D + 1) / 2 products stand for all D^2."""
    q, k = normal(1, 1, 1, 5, 6).detach(), normal(2, 1, 1, 4, 6).detach()
    s = q @ k.mT
    close(taylor(q, 2) @ monomials(k, 2).mT, 1 + s + s**2 / 2)
    close(taylor(q, 1) @ monomials(k, 1).mT, 1 + s)
    assert monomials(k, 2).shape[-1] == 1 + 6 + 21


def test_order_two_is_closer_to_softmax_than_order_one() -> None:
    """The claim in small: the polynomial stands for exp, which it meets better the higher its order."""
    q, k, v = (t.detach() for t in (normal(1, 1, 2, 20, 8), normal(2, 1, 2, 20, 8), normal(3, 1, 2, 20, 3)))
    q, k = normalise(q), normalise(k)
    exact = (q @ k.mT).softmax(-1) @ v
    off = [(fast_attention(q, k, v, order=p).out - exact).abs().mean() for p in (1, 2)]
    assert off[1] < 0.3 * off[0]
    assert off[1] < 0.01


def test_backward_keeps_no_features() -> None:
    """Beyond inputs and outputs a long sequence keeps moments of its segments, not D^2 / 2 numbers a token."""

    def kept(T: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        q, k, v = (normal(n, 1, 1, T, 24) for n in (1, 2, 3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = fast_attention(q, k, v, causal=True)
        assert out.out.shape[2] == T
        return sum(sizes.values())

    features = 1 + 24 + 24 * 25 // 2
    assert kept(1024) - kept(512) < 0.5 * 8 * 512 * features


def test_normalised_by_the_longest_real_token() -> None:
    k = normal(1, 1, 1, 4, 3).detach()
    keep = torch.tensor([[True, True, False, False]])
    grown = torch.cat([k[:, :, :2], 9 * k[:, :, 2:]], 2)
    close(normalise(grown, "sequence", keep=keep)[:, :, :2], naive_fast_normalise(k[:, :, :2]))
    assert normalise(torch.zeros(1, 1, 2, 3)).eq(0).all()


def test_module_is_the_function() -> None:
    for causal, norm in ((True, "token"), (False, "sequence"), (False, "none")):
        module, x = of("fast").build(causal=causal, norm=norm), tokens(1, 5)
        q, k, v = module.split(x, x)
        if norm != "none":
            q, k = (naive_fast_normalise(z, per_token=norm == "token") for z in (q, k))
        want = naive_fast(q, k, v, causal=causal)
        close(module(x), module.merge(want))


def test_refusals() -> None:
    for options, words in (
        ({"order": 3}, r"order is too large \(got 3\); expected an int from 1 to 2"),
        ({"norm": "batch"}, r"norm is unknown \(got 'batch'\); expected one of 'token', 'sequence', 'none'"),
        (
            {"norm": "sequence", "causal": True},
            r"norm shows later tokens to earlier ones \(got 'sequence'\); expected 'token'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            FastAttention(8, 2, **options)
    with pytest.raises(ValueError, match="order"):
        fast_attention(*(torch.zeros(1, 1, 2, 2) for _ in "qkv"), order=0)
    with pytest.raises(ValueError, match="norm"):
        regard.create("fast", dim=8, num_heads=2, causal=True, norm="sequence")


def test_no_tokens_pass_the_state_on() -> None:
    q = k = v = normal(0, 2, 3, 5, 4)
    state = fast_attention(q, k, v, causal=True).state
    none, starts = q[:, :, :0], torch.zeros(2, 0, dtype=torch.bool)
    out, after = fast_attention(none, none, none, causal=True, state=state, starts=starts)
    assert out.shape == none.shape
    close(after, state, "state")


def test_causal_queries_are_the_keys_own_tokens() -> None:
    q = k = normal(0, 1, 2, 5, 4)
    for T, S in ((3, 5), (5, 3)):
        with pytest.raises(ValueError, match=f"another length than k .got {T}.; expected {S} tokens"):
            fast_attention(q[:, :, :T], k[:, :, :S], k[:, :, :S], causal=True)


def test_a_context_of_another_width_is_missed() -> None:
    layer = FastAttention(8, 2, context_dim=6)
    assert layer(torch.zeros(1, 3, 8), torch.zeros(1, 5, 6)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match=r"context is missing, and x is of another width .*expected \(B, S, 6\)"):
        layer(torch.zeros(1, 3, 8))

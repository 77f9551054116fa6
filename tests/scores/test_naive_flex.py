"""Mods as in attention-gym against plain loops, whose author saw neither the implementation nor its tests."""

from functools import cache

import pytest
import torch

import regard
from regard import masks
from regard.scores.score_mod import from_score_mod
from scores.naive_flex import naive_flex

B, H, G, D, V = 2, 4, 2, 4, 3
SHAPES = {"square": (6, 6), "fewer queries": (4, 7), "fewer keys": (6, 4)}
KERNELS = ["auto", "eager", "chunked", "block_sparse"]


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alibi():
    slopes = rand(1, H).requires_grad_()
    return lambda x, b, h, q, k: x + slopes[h] * (k - q), None, [slopes]


def soft_cap():
    cap = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    return lambda x, b, h, q, k: cap * torch.tanh(x / cap), None, [cap]


def relative_table():
    table = rand(2, H, 7).requires_grad_()
    return lambda x, b, h, q, k: x + table[h, (q - k).clamp(-3, 3) + 3], None, [table]


def per_batch():
    gain, shift = rand(3, B).requires_grad_(), rand(4, B, 8).requires_grad_()
    return lambda x, b, h, q, k: x * gain[b] + shift[b, k], None, [gain, shift]


def document():
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 3]])
    return None, lambda b, h, q, k: ids[b, q] == ids[b, k], []


def window_and_sink():
    return None, lambda b, h, q, k: (((q - k) < 3) & (k <= q)) | (k < 1), []


def causal_mod():
    temperature = rand(5, H).requires_grad_()
    return lambda x, b, h, q, k: x * temperature[h].exp(), lambda b, h, q, k: q >= k, [temperature]


def prefix_lm():
    lengths = torch.tensor([2, 4])
    return None, lambda b, h, q, k: (k <= q) | (k < lengths[b]), []


def dilated():
    return None, lambda b, h, q, k: ((q - k) % (1 + h % 3) == 0) & ((q - k).abs() < 5), []


def neighbourhood():
    bias = rand(6, 3, 3).requires_grad_()

    def near(b, h, q, k):
        return ((q // 3 - k // 3).abs() <= 1) & ((q % 3 - k % 3).abs() <= 1)

    def mod(x, b, h, q, k):
        return x + bias[(q // 3 - k // 3).clamp(-1, 1) + 1, (q % 3 - k % 3).clamp(-1, 1) + 1]

    return mod, near, [bias]


def squared():
    return lambda x, b, h, q, k: x * x, None, []


def scalar_gate():
    gate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    return lambda x, b, h, q, k: torch.where((q + k) % 2 == 0, x * gate, x - gate), None, [gate]


def nothing_to_see():
    scale = rand(7, 8).requires_grad_()
    return lambda x, b, h, q, k: x * scale[k], lambda b, h, q, k: k < q - 2, [scale]


def shuts_pairs_itself():
    slope = rand(8, H).requires_grad_()
    return lambda x, b, h, q, k: torch.where(q - k == 1, -torch.inf, x + slope[h] * k), None, [slope]


MODS = [alibi, soft_cap, relative_table, per_batch, document, window_and_sink, causal_mod, prefix_lm]
MODS += [dilated, neighbourhood, squared, scalar_gate, nothing_to_see, shuts_pairs_itself]


def inputs(T, S):
    return [rand(10 + i, *s).requires_grad_() for i, s in enumerate([(B, H, T, D), (B, G, S, D), (B, G, S, V)])]


def moved(f, by, scored):
    """f with query indices that count from the first key, as regard's own do."""
    if f is None or by == 0:
        return f
    if scored:
        return lambda x, b, h, q, k: f(x, b, h, q + by, k)
    return lambda b, h, q, k: f(b, h, q + by, k)


@cache
def expected(case, shape, causal, by):
    T, S = SHAPES[shape]
    score_mod, mask_mod, captured = case()
    leaves = inputs(T, S) + captured
    y, _ = naive_flex(*leaves[:3], moved(score_mod, by, True), moved(mask_mod, by, False), causal=causal, scale=0.8)
    return y.detach(), torch.autograd.grad((y * rand(20, *y.shape)).sum(), leaves)


def check(case, shape, causal, torch_indices):
    T, S = SHAPES[shape]
    want, want_grads = expected(case, shape, causal, 0 if torch_indices else S - T)
    score_mod, mask_mod, captured = case()
    leaves = inputs(T, S) + captured
    mask, sizes = None, {"batch": B, "heads": H}
    if mask_mod is not None:
        mask = masks.from_mask_mod(mask_mod, T, S, **sizes) if torch_indices else masks.predicate(mask_mod, **sizes)
    if causal:
        mask = masks.causal() if mask is None else mask & masks.causal()
    mix = score_mod
    if score_mod is not None and torch_indices:
        mix = from_score_mod(score_mod, T, S)
    for kernel in KERNELS if mask is not None else KERNELS[:-1]:
        y = regard.attention(*leaves[:3], mask=mask, score_mix=mix, scale=0.8, kernel=kernel)
        grads = torch.autograd.grad((y * rand(20, *y.shape)).sum(), leaves)
        torch.testing.assert_close(y, want, atol=1e-10, rtol=0)
        for got, grad in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got, grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", MODS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("shape", "causal"), [("square", False), ("fewer queries", True), ("fewer keys", True)])
def test_indices_as_torch_counts(case, shape, causal):
    check(case, shape, causal, True)


@pytest.mark.parametrize("case", MODS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [False, True])
def test_indices_from_the_first_key(case, causal):
    check(case, "fewer queries", causal, False)

"""FlexPrefill's choice and outputs against loops, the authors' numbers (B046), and exact attention.

The loops' author has read neither the code nor these tests.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept
from regard.routing.flex_prefill import FlexPrefill, flex_blocks, flex_prefill
from routing import naive_flex_prefill as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "B046.npz"


def heads(seed: int, T: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, T, D), (B, G, T, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


def blocks(q: Tensor, k: Tensor, **options) -> Tensor:
    return flex_blocks(q.detach(), k.detach(), **options).tiles


CASES = [
    (21, {"block": 4, "gamma": 0.7, "tau": 0.45}),
    (25, {"block": 5, "gamma": 0.9, "tau": 0.0}),
    (12, {"block": 2, "gamma": 0.6, "tau": 1.0, "min_budget": 3}),
    (23, {"block": 3, "gamma": 0.8, "tau": 0.4, "max_budget": 5}),
    (9, {"block": 3, "gamma": 0.5, "tau": 0.4, "min_budget": 7}),
    (7, {"block": 4}),
    (1, {"block": 4}),
]


@pytest.mark.parametrize(("T", "options"), CASES)
def test_is_the_definition(T: int, options: dict) -> None:
    q, k, v = heads(T, T)
    want, aware = naive.flex_prefill(q, k, **options)
    found = flex_blocks(q.detach(), k.detach(), **options)
    assert torch.equal(found.tiles, want.tril())
    assert torch.equal(found.aware, aware)
    out = regard.attention(q, k, v, mask=masks.causal(), selector=FlexPrefill(**options))
    loops = naive.attend(q, k, v, want, options["block"])
    close(out, loops, "out")
    g = torch.randn(out.shape, dtype=torch.float64)
    for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (out, loops)), "qkv"):
        close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize("case", ["mix", "vs", "aware"])
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(np.asarray(file[k])) for k in file if k.startswith(case)}
    q, k, v = (z[name].transpose(1, 2).requires_grad_() for name in "qkv")
    block, gamma, tau, T = int(z["block"]), float(z["gamma"]), float(z["tau"]), q.shape[2]
    low = int(z["min_blocks"]) * block
    # Their budgets count by 128 tokens whatever the block.
    tiles = blocks(q, k, gamma=gamma, tau=tau, block=block, min_budget=low, unit=128)
    assert torch.equal(tiles[0], z["block_mask"])
    chosen = masks.causal() & masks.chosen(tiles, T, T, block)
    y = regard.attention(q, k, v, mask=chosen)
    close(y, z["y"].transpose(1, 2), "y")
    grads = torch.autograd.grad((y * z["w"].transpose(1, 2)).sum(), (q, k, v))
    for got, name in zip(grads, "qkv", strict=True):
        close(got, z[f"g{name}"].transpose(1, 2), f"gradient of {name}")


def positional(T: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A head that looks at the first key, and at near ones."""
    turns = torch.arange(T)[:, None] * torch.logspace(0, -1.5, 8)
    near = 3 * torch.cat([turns.cos(), turns.sin()], 1)
    q, k = F.pad(near, (1, 0), value=2.0), F.pad(near, (1, 0))
    k[0] = F.one_hot(torch.tensor(0), 17) * 20
    return q + 0.1 * torch.randn(T, 17, generator=g), k + 0.1 * torch.randn(T, 17, generator=g)


def topical(T: int, g: torch.Generator, block: int = 32) -> tuple[Tensor, Tensor]:
    """A head whose queries look for keys of one of 8 topics, which change from block to block."""
    about = torch.randint(8, (2, T // block), generator=g).repeat_interleave(block, 1)
    q, k = 5 * F.one_hot(about, 17) + 0.3 * torch.randn(2, T, 17, generator=g)
    return q, k


@pytest.mark.parametrize("seed", range(3))
def test_tells_heads_apart(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.stack(both)[None] for both in zip(positional(512, g), topical(512, g), strict=True))
    selector = FlexPrefill(gamma=0.9, tau=0.1, block=32)
    assert flex_blocks(q, k, gamma=0.9, tau=0.1, block=32).aware.tolist() == [[False, True]]
    for head, most in ((slice(0, 1), 0.25), (slice(1, 2), 0.5)):
        selected = selector(q[:, head], k[:, head], masks.causal())
        report = kept(q[:, head], k[:, head], selected, mask=masks.causal())
        assert report.pairs < most
        assert report.mass.min() > 0.88


def test_the_distance_is_that_of_the_last_queries() -> None:
    """Uniform queries foretell how they attend but in the last block, which they see half of."""
    k = torch.randn(1, 1, 32, 4, dtype=torch.float64)
    found = flex_blocks(torch.zeros(1, 1, 32, 4, dtype=torch.float64), k, block=4, tau=0.5)
    P = torch.ones(32, 32, dtype=torch.float64).tril().div(torch.arange(1, 33)[:, None])[-4:]
    V, est = P.mean(0).view(8, 4).sum(1), torch.full((8,), 0.125, dtype=torch.float64)
    middle = (V + est) / 2
    want = ((V * (V / middle).log() + est * (est / middle).log()).sum() / 2).sqrt()
    close(found.distance, want[None, None])
    assert found.aware.all()


def test_more_gamma_keeps_more_and_budgets_bound_lines() -> None:
    q, k, _ = heads(1, 48)
    few, many = (blocks(q, k, gamma=gamma, tau=1.0, block=4) for gamma in (0.5, 0.9))
    assert (many | ~few).all()
    assert few.sum() < many.sum()
    # One line and one slash, which are the first column and the diagonal.
    least = blocks(q, k, gamma=0.9, tau=0.0, block=4, max_budget=4)
    column = torch.arange(12)
    want = (column == 0) | (column == column[:, None])
    assert torch.equal(least, want.expand_as(least))
    assert blocks(q, k, gamma=0.1, tau=0.0, block=4, min_budget=12).sum() > least.sum()


@pytest.mark.parametrize("tau", [0.0, 0.45, 1.0])
def test_padding_is_not_judged(tau: float) -> None:
    q, k, v = (z.detach() for z in heads(4, 22))
    keep = torch.arange(22) < torch.tensor([[22], [13]])
    mask = masks.causal() & masks.padding(keep)
    selector = FlexPrefill(block=3, gamma=0.6, tau=tau)
    got = regard.attention(q, k, v, mask=mask, selector=selector)
    alone = regard.attention(*(z[1:, :, :13] for z in (q, k, v)), mask=masks.causal(), selector=selector)
    close(got[1:, :, :13], alone)
    assert not (got[1:, :, :13] - regard.attention(q, k, v, mask=mask)[1:, :, :13]).abs().max() < 1e-3


def test_a_nan_stays_to_be_seen() -> None:
    q, k, v = (z.detach() for z in heads(7, 20))
    k[0, 0, 6] = torch.nan
    out = regard.attention(q, k, v, mask=masks.causal(), selector=FlexPrefill(block=2, gamma=0.6, tau=0.4))
    assert out[0, :2, 6:].isnan().all()
    assert not out[0, :2, :6].isnan().any()
    assert not out[0, 2:].isnan().any()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("T", [9, 8, 2])
def test_the_last_queries_choose_as_in_the_whole_pass(T: int) -> None:
    """Where they hold a whole last block: lines and slashes are theirs alone."""
    q, k, _ = (z.detach() for z in heads(5, 21))
    options = {"block": 2, "gamma": 0.6, "tau": 0.0}
    whole = flex_prefill(q, k, mask=masks.causal(), **options).dense(21)
    part = flex_prefill(q[:, :, -T:], k, mask=masks.causal(), **options).dense(T, 21)
    assert torch.equal(part, whole[:, :, -T:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, r"gamma is out of range \(got 0\.0\)"),
        ({"tau": -0.1}, r"tau is out of range \(got -0\.1\)"),
        ({"block": 0}, r"block is too small \(got 0\)"),
        ({"min_budget": 0}, r"min_budget is too small \(got 0\)"),
        ({"min_budget": 9, "max_budget": 8}, r"max_budget is below min_budget \(got 8\); expected at least 9"),
    ],
)
def test_refuses_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"FlexPrefill: {words}"):
        FlexPrefill(**options)


def test_refuses_masks_lengths_and_steps() -> None:
    q, k, v = (z.detach() for z in heads(6, 8))
    with pytest.raises(ValueError, match="causality and padding alone"):
        regard.attention(q, k, v, mask=masks.causal() & masks.window(3), selector=FlexPrefill(block=4))
    with pytest.raises(ValueError, match=r"q has more tokens than k \(got 8\); expected at most 5"):
        regard.attention(q, k[:, :, 3:], v[:, :, 3:], mask=masks.causal(), selector=FlexPrefill(block=4))
    with pytest.raises(ValueError, match="stream"):
        regard.create("flex_prefill", dim=8, num_heads=2, causal=True).init_state(1, 8)


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_a_gamma_of_1_keeps_all_however_shares_are_rounded(tau: float) -> None:
    for seed in range(20):
        q, k, _ = heads(seed, 33)
        tiles = flex_blocks(q, k, gamma=1.0, tau=tau, block=1).tiles
        assert torch.equal(tiles, torch.ones_like(tiles).tril())

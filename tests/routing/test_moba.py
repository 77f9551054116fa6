"""MoBA against loops over queries and blocks, the authors' numbers (A191), and full attention."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept
from regard.routing.moba import MoBA, moba
from routing.naive_moba import naive_moba, naive_moba_blocks

VECTORS = Path(__file__).parents[1] / "vectors" / "A191.npz"


def heads(seed: int, T: int, S: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


def attend(q: Tensor, k: Tensor, v: Tensor, block: int, topk: int, **options) -> Tensor:
    return regard.attention(q, k, v, **{"mask": masks.causal(), **options}, selector=MoBA(block=block, topk=topk))


@pytest.mark.parametrize(
    ("T", "S", "block", "topk"),
    [(11, 11, 3, 2), (12, 12, 4, 3), (1, 9, 2, 2), (5, 13, 4, 2), (7, 7, 7, 1), (9, 9, 1, 4)],
)
def test_is_the_definition(T: int, S: int, block: int, topk: int) -> None:
    q, k, v = heads(T + S, T, S)
    got, want = attend(q, k, v, block, topk), naive_moba(q, k, v, block, topk)
    close(got, want, "out")
    g = torch.randn(got.shape, dtype=torch.float64)
    for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (got, want)), "qkv"):
        close(mine, theirs, f"gradient of {name}")
    tiles = naive_moba_blocks(q.detach(), k.detach(), block, topk)
    chosen = masks.causal() & masks.chosen(tiles, T, S, (1, block))
    assert torch.equal(moba(q.detach(), k.detach(), block=block, topk=topk).dense(T, S), chosen.dense(T, S))


@pytest.mark.parametrize("case", ["c1", "c2", "c3"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Packed sequences, of which each is routed alone."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    start = 0
    for length in z["lens"].tolist():
        part = {
            n: z[n][start : start + length].transpose(0, 1)[None] for n in ("q", "k", "v", "w", "out", "gq", "gk", "gv")
        }
        q, k, v = (part[n].clone().requires_grad_() for n in "qkv")
        out = attend(q, k, v, int(z["block"]), int(z["topk"]))
        close(out.detach(), part["out"], "out")
        for got, n in zip(torch.autograd.grad((out * part["w"]).sum(), (q, k, v)), "qkv", strict=True):
            close(got, part["g" + n].contiguous(), f"gradient of {n}")
        start += length


@pytest.mark.parametrize(("block", "topk"), [(8, 8), (8, 99), (64, 1), (100, 1)])
def test_all_blocks_are_full_attention(block: int, topk: int) -> None:
    q, k, v = heads(0, 64, 64)
    close(attend(q, k, v, block, topk), regard.attention(q, k, v, mask=masks.causal()))


@pytest.mark.parametrize("topk", [1, 2, 5])
def test_no_later_token_changes_an_output(topk: int) -> None:
    """Nor a choice: blocks that are not yet whole do not compete."""
    q, k, v = (z.detach() for z in heads(1, 30, 30))
    want = attend(q, k, v, 4, topk)
    for t in (0, 3, 4, 17, 28):
        hurt = [torch.cat([z[:, :, : t + 1], 50 * z[:, :, t + 1 :]], 2) for z in (q, k, v)]
        assert torch.equal(attend(*hurt, 4, topk)[:, :, : t + 1], want[:, :, : t + 1])


def test_the_own_block_counts_among_the_chosen() -> None:
    q, k, _ = (z.detach() for z in heads(2, 40, 40))
    weights = attend(q, k, torch.eye(40).double().expand(2, 2, 40, 40), 4, 3)
    tiles = weights.unflatten(-1, (10, 4)).gt(0).any(-1)
    own = torch.arange(40) // 4
    assert torch.equal(tiles.sum(-1), (own + 1).clamp(max=3).expand(2, 4, -1))
    assert tiles[..., torch.arange(40), own].all()


def test_hidden_keys_count_in_no_mean() -> None:
    """Under padding, and under a mask that hides pairs, where every query has means of its own."""
    q, k, v = (z.detach() for z in heads(3, 20, 20))
    keep = torch.arange(20) >= torch.tensor([[0], [6]])
    pairs = masks.dense(torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7)
    for mask in (masks.causal() & masks.padding(keep), masks.causal() & pairs, masks.causal() & masks.window(7)):
        allowed = mask.dense(20).expand(2, 4, -1, -1)
        want = torch.zeros(2, 4, 20, 5)
        for b, h, t, n in np.ndindex(2, 4, 20, 5):
            seen = [j for j in range(4 * n, 4 * n + 4) if allowed[b, h, t, j]]
            mean = sum(k[b, h // 2, j] for j in seen) / len(seen) if seen else None
            score = -torch.inf if mean is None or n > t // 4 else float(q[b, h, t] @ mean)
            want[b, h, t, n] = torch.inf if n == t // 4 else score
        tiles = torch.zeros_like(want, dtype=torch.bool).scatter(3, want.topk(2).indices, True) & (want > -torch.inf)
        want_mask = masks.chosen(tiles, 20, 20, (1, 4)).dense(20) & allowed
        assert torch.equal(moba(q, k, block=4, topk=2, mask=mask).dense(20) & allowed, want_mask)
        hidden = ~allowed.any(1).any(1)  # from everybody
        for b in range(2):
            other = k.clone()
            other[b, :, hidden[b]] = 1e4
            close(attend(q, other, v, 4, 2, mask=mask), attend(q, k, v, 4, 2, mask=mask))


def test_streams_by_single_tokens_and_chunks() -> None:
    layer = regard.create("moba", dim=12, num_heads=2, causal=True, block=4, topk=2).double()
    x = torch.randn(2, 23, 12, dtype=torch.float64)
    with torch.no_grad():
        want, state, outs = layer(x), layer.init_state(2, 23), []
        for piece in x.split([1, 1, 5, 1, 9, 1, 1, 4], 1):
            y, state = layer.step(piece, state)
            outs.append(y)
        close(torch.cat(outs, 1), want)


def test_runs_on_the_block_sparse_kernel_and_says_what_it_keeps() -> None:
    """Neighbours that agree visit few blocks: ten passages, on four topics with a direction of its own each."""
    g = torch.Generator().manual_seed(0)
    topic = torch.eye(32)[torch.tensor([0, 1, 0, 2, 1, 3, 0, 2, 3, 1]).repeat_interleave(128)]
    q, k = (8 * topic + 0.3 * torch.randn(1, 2, 1280, 32, generator=g) for _ in "qk")
    v = torch.randn(1, 2, 1280, 32, generator=g)
    selected = MoBA(block=64, topk=5)(q, k, masks.causal())
    report = kept(q, k, selected, mask=masks.causal())
    assert report.pairs < 0.45
    assert report.blocks < 0.75
    assert report.mass.min() > 0.9
    plan = regard.plan(q, k, v, mask=masks.causal(), selector=MoBA(block=64, topk=5), kernel="block_sparse")
    assert plan.kernel == "block_sparse"
    outs = [attend(q, k, v, 64, 5, kernel=kernel) for kernel in ("block_sparse", "eager")]
    assert (outs[0] - outs[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": 0}, ValueError, r"block is too small \(got 0\)"),
        ({"topk": 0}, ValueError, r"topk is too small \(got 0\)"),
        ({"block": 2.0}, TypeError, r"block has the wrong type \(got 2\.0\)"),
    ],
)
def test_refuses(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"MoBA: {words}; expected an int >= 1"):
        MoBA(**options)


def test_no_queries_or_keys() -> None:
    q, k, v = (z.detach() for z in heads(0, 0, 5))
    assert attend(q, k, v, 2, 2).shape == (2, 4, 0, 5)
    assert attend(torch.ones(2, 4, 3, 3).double(), k[:, :, :0], v[:, :, :0], 2, 2).eq(0).all()

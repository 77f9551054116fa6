"""XAttention's scores and choice against loops, the authors' numbers (B117), and exact attention shares."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept
from regard.routing.xattention import XAttention, antidiagonal_mass, xattention
from routing.naive_xattention import naive_xattention, naive_xattention_blocks, naive_xattention_sums

VECTORS = Path(__file__).parents[1] / "vectors" / "B117.npz"


def heads(seed: int, T: int, S: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


def seen(causal: bool) -> masks.Mask | None:
    return masks.causal() if causal else None


CASES = [(12, 12, 4, 2), (11, 11, 4, 2), (5, 5, 6, 3), (8, 16, 4, 4), (3, 19, 4, 1), (1, 9, 2, 2)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S", "block", "stride"), CASES)
def test_is_the_definition(T: int, S: int, block: int, stride: int, causal: bool) -> None:
    if not causal and S % block:
        S += -S % block  # the loops let zero padding of keys take part
        T = min(T, S)
    q, k, v = heads(T + S, T, S)
    R = naive_xattention_sums(q.detach(), k.detach(), block, stride, causal=causal)
    got = antidiagonal_mass(q.detach(), k.detach(), block=block, stride=stride, causal=causal)
    close(got.mass, R, "mass")
    selector = XAttention(block=block, stride=stride, threshold=0.6)
    out = regard.attention(q, k, v, mask=seen(causal), selector=selector)
    want = naive_xattention(q, k, v, block, stride, 0.6, causal=causal)
    close(out, want, "out")
    g = torch.randn(out.shape, dtype=torch.float64)
    for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (out, want)), "qkv"):
        close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize("case", ["c1", "c2", "c3", "c4", "c5"])
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    block, stride, causal = int(z["block"]), int(z["stride"]), bool(z["causal"])
    q, k, tau = z["q"], z["k"], float(z["threshold"])
    mass = antidiagonal_mass(q, k, block=block, stride=stride, causal=causal).mass
    nq, nk = mass.shape[2:]
    close(mass, z["sums"][:, :, :nq, :nk].contiguous(), "mass")
    tiles = xattention(q, k, block=block, stride=stride, threshold=tau, mask=seen(causal)).tiles
    theirs = z["mask"][:, :, :nq, :nk]
    # Their first chunk of queries keeps a rank more than the rule, and key block 0 always where nothing is forced.
    first = int(z["chunk"]) // block if q.shape[2] == k.shape[2] and causal else 0
    assert (theirs | ~tiles).all()
    if causal:
        assert torch.equal(tiles[:, :, first:], theirs[:, :, first:])
    else:
        assert torch.equal(tiles[..., 1:], theirs[..., 1:])


def test_query_blocks_stand_on_key_blocks() -> None:
    """The last 9 of 21 queries choose as their blocks do in the whole pass, whatever the remainder."""
    q, k, _ = (z.detach() for z in heads(1, 21, 21))
    whole = antidiagonal_mass(q, k, block=4, stride=2, causal=True)
    part = antidiagonal_mass(q[:, :, -9:], k, block=4, stride=2, causal=True)
    assert (part.front, part.offset) == (0, 3)
    close(part.mass, whole.mass[:, :, 3:].contiguous())
    shifted = antidiagonal_mass(q[:, :, -7:], k, block=4, stride=2, causal=True)
    assert (shifted.front, shifted.offset) == (2, 3)
    close(shifted.mass[:, :, 1:], whole.mass[:, :, 4:].contiguous())
    selected = xattention(q[:, :, -7:], k, block=4, stride=2, threshold=0.6, mask=masks.causal())
    want = xattention(q, k, block=4, stride=2, threshold=0.6, mask=masks.causal())
    assert torch.equal(selected.dense(7, 21)[:, :, 2:], want.dense(21)[:, :, 16:])


def test_stride_1_gives_the_exact_shares() -> None:
    """And so the blocks kept hold at least tau of every block of queries' attention."""
    q, k, _ = (z.detach() for z in heads(2, 24, 24))
    weights = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1)).div(3**0.5)
    weights = weights.masked_fill(~torch.ones(24, 24, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    exact = weights.unflatten(3, (-1, 4)).sum(4).unflatten(2, (-1, 4)).sum(3)
    close(antidiagonal_mass(q, k, block=4, stride=1, causal=True).mass, exact)
    selected = xattention(q, k, block=4, stride=1, threshold=0.8, mask=masks.causal())
    mass = weights.masked_fill(~selected.dense(24), 0).sum(-1).unflatten(2, (-1, 4)).mean(-1)
    assert mass.min() >= 0.8 - 1e-12
    assert selected.tiles.sum() < 0.9 * selected.tiles.shape[0] * 4 * 21


def test_a_high_threshold_keeps_everything() -> None:
    q, k, v = (z.detach() for z in heads(3, 30, 30))
    for causal in (True, False):
        selector = XAttention(block=4, stride=4, threshold=1.5)
        close(
            regard.attention(q, k, v, mask=seen(causal), selector=selector),
            regard.attention(q, k, v, mask=seen(causal)),
        )


@pytest.mark.parametrize("seed", range(3))
def test_finds_strong_keys_at_low_density(seed: int) -> None:
    """One of 16 blocks holds what all queries look for: every later block finds it, at under half of the pairs."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 2, 256, 16, generator=g)
    at = 16 * (2 + seed)
    q[..., 0] += 4
    k[:, :, at : at + 16, 0] += 4
    selected = XAttention(block=16, stride=4, threshold=0.8)(q, k, masks.causal())
    report = kept(q, k, selected, mask=masks.causal())
    assert report.pairs < 0.5
    assert report.mass.min() > 0.85
    assert selected.tiles[:, :, at // 16 :, at // 16].all()


def test_padding_is_not_judged() -> None:
    q, k, v = (z.detach() for z in heads(4, 22, 22))
    keep = torch.arange(22) < torch.tensor([[22], [13]])
    mask = masks.causal() & masks.padding(keep)
    selector = XAttention(block=4, stride=2, threshold=0.6)
    got = regard.attention(q, k, v, mask=mask, selector=selector)
    alone = regard.attention(*(z[1:, :, :13] for z in (q, k, v)), mask=masks.causal(), selector=selector)
    close(got[1:, :, :13], alone)


def test_a_threshold_for_each_head() -> None:
    q, k, _ = (z.detach() for z in heads(5, 24, 24))
    both = xattention(q, k, block=4, stride=2, threshold=(0.3, 0.9, 0.3, 0.9), mask=masks.causal()).tiles
    for h in range(4):
        one = xattention(q, k, block=4, stride=2, threshold=(0.3, 0.9)[h % 2], mask=masks.causal()).tiles
        assert torch.equal(both[:, h], one[:, h])


def test_block_rule_of_the_loops() -> None:
    """The choice alone, on ties and on masses that reach the threshold exactly."""
    R = torch.tensor(
        [[[[2.0, 0, 0, 0], [1, 1, 0, 0], [0.5, 0.75, 0.75, 0], [0.25, 1, 0.25, 0.5]]]], dtype=torch.float64
    )
    want = naive_xattention_blocks(R, 0.75)
    assert want[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 6, "stride": 4}, r"block is no multiple of stride = 4 \(got 6\)"),
        ({"threshold": 0.0}, r"threshold is out of range \(got 0\.0\); expected a finite number > 0"),
        ({"stride": 0}, r"stride is too small \(got 0\); expected an int >= 1"),
    ],
)
def test_refuses_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"XAttention: {words}"):
        XAttention(**options)


def test_refuses_masks_and_streams() -> None:
    q, k, v = (z.detach() for z in heads(6, 8, 8))
    with pytest.raises(ValueError, match="causality and padding alone"):
        regard.attention(q, k, v, mask=masks.causal() & masks.window(3), selector=XAttention(block=4, stride=2))
    layer = regard.create("xattention", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match="stream"):
        layer.init_state(1, 8)
    with pytest.raises(ValueError, match=r"threshold fits another number of heads \(got 3 entries\); expected 1, or 2"):
        regard.create("xattention", dim=8, num_heads=2, causal=True, threshold=(0.5, 0.6, 0.7))

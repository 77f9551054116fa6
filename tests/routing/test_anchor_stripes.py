"""AnchorAttention's anchors, stripes and outputs against loops, the authors' numbers (B132), and exact attention.

The loops' author has read neither the code nor these tests.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import kept
from regard.routing.anchor_stripes import AnchorStripes, anchor_mask, anchor_stripes
from routing import naive_anchor_stripes as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "B132.npz"


def heads(seed: int, T: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, T, D), (B, G, T, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


CASES = [
    (24, {"block": 2, "step": 2, "theta": 0.5}),
    (23, {"block": 3, "step": 2, "theta": -0.5, "init": 2}),
    (21, {"block": 2, "step": 3, "theta": 0.2, "local": 2}),
    (17, {"block": 1, "step": 4, "theta": 1.0}),
    (5, {"block": 2, "step": 4}),
]


@pytest.mark.parametrize(("T", "options"), CASES)
def test_is_the_definition(T: int, options: dict) -> None:
    q, k, v = heads(T, T)
    want, anchors, taken = naive.anchor_attention(q, k, v, **options)
    found = anchor_stripes(q.detach(), k.detach(), **options)
    close(found.anchor, anchors, "anchors")
    for b in range(2):
        for h in range(4):
            assert [row.nonzero().flatten().tolist() for row in found.taken[b, h]] == taken[b][h]
    out = regard.attention(q, k, v, mask=masks.causal(), selector=AnchorStripes(**options))
    close(out, want, "out")
    g = torch.randn(out.shape, dtype=torch.float64)
    for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (out, want)), "qkv"):
        close(mine, theirs, f"gradient of {name}")


def test_gives_the_authors_numbers() -> None:
    """Their first part of R is a run long. Where a key can be taken by both rules, both take it or both don't."""
    with np.load(VECTORS) as file:
        z = {name.removeprefix("a_"): torch.from_numpy(file[name]) for name in file}
    block, step, theta = int(z["params"][0]), int(z["params"][1]), float(z["params"][2])
    P = block * step
    found = anchor_stripes(z["q"], z["k"], theta=theta, block=block, step=step, init=step)
    torch.testing.assert_close(found.anchor, z["anchor"], atol=2e-6, rtol=0)
    assert z["count"].flatten().tolist() == [0, 22, 161]
    for run, count in enumerate(z["count"].flatten().tolist()):
        theirs = {int(j) for j in z["coords"][0, 0, run, :count] if j >= P}
        mine = set(found.taken[0, 0, run].nonzero().flatten().tolist())
        assert theirs == {j for j in mine if j < run * P - block}
    assert mine - theirs, "they leave out the block before the run"


def test_every_key_counts_once() -> None:
    """With a theta that takes all it is full attention; the released kernels count keys of the first run twice."""
    with np.load(VECTORS) as file:
        q, k, v = (torch.from_numpy(file[f"a_{name}"]).double() for name in "qkv")
    dense = regard.attention(q, k, v, mask=masks.causal())
    everything = AnchorStripes(block=16, step=16, theta=100.0)
    close(regard.attention(q, k, v, mask=masks.causal(), selector=everything), dense)


def test_more_theta_takes_more() -> None:
    q, k, _ = (z.detach() for z in heads(3, 40))
    few, more, most = (anchor_stripes(q, k, theta=theta, block=2, step=2).taken for theta in (0.0, 1.0, 2.0))
    assert (more | ~few).all()
    assert (most | ~more).all()
    assert few.sum() < more.sum() < most.sum()


@pytest.mark.parametrize("seed", range(3))
def test_stripes_keep_single_keys(seed: int) -> None:
    """25 of 512 keys, the first among them, are what all look for. Blocks, even the best, need twice the pairs."""
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 512, 16, generator=g, dtype=torch.float64)
    q[..., 0] += 5
    k[:, :, torch.randperm(512, generator=g)[:24], 0] += 8
    k[:, :, 0, 0] = 8
    selected = AnchorStripes(theta=4.0, block=8, step=4)(q, k, masks.causal())
    report = kept(q, k, selected, mask=masks.causal())
    assert report.mass.min() > 0.95
    past = torch.ones(512, 512, dtype=torch.bool).tril()
    weights = (q @ k.mT / 4).masked_fill(~past, -torch.inf).softmax(-1)[0, 0]
    held = weights.view(32, 16, 32, 16).sum((1, 3))
    pairs = past.view(32, 16, 32, 16).sum((1, 3))
    ranked, order = held.sort(descending=True)
    needed = ranked.cumsum(1) - ranked < report.mass.min() * held.sum(1, keepdim=True)
    in_blocks = pairs.gather(1, order)[needed].sum() / past.sum()
    assert report.pairs * 2 < in_blocks


def test_single_keys_are_gathered() -> None:
    """The block-sparse kernel visits the keys taken, not the blocks of 128 that hold one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 1024, 16, generator=g)
    q[..., 0] += 5
    k[:, :, ::16, 0] += 8
    selected = anchor_mask(q, k, theta=2.0, block=32, step=4, mask=masks.causal())
    report = kept(q, k, selected, mask=masks.causal())
    assert report.blocks < 0.4
    got = regard.attention(q, k, v, mask=masks.causal() & selected, kernel="block_sparse")
    want = regard.attention(q, k, v, mask=masks.causal() & selected, kernel="eager")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_padding_is_not_judged() -> None:
    q, k, v = (z.detach() for z in heads(4, 22))
    keep = torch.arange(22) < torch.tensor([[22], [13]])
    mask = masks.causal() & masks.padding(keep)
    selector = AnchorStripes(block=2, step=2, theta=0.2)
    got = regard.attention(q, k, v, mask=mask, selector=selector)
    alone = regard.attention(*(z[1:, :, :13] for z in (q, k, v)), mask=masks.causal(), selector=selector)
    close(got[1:, :, :13], alone)
    assert (got - regard.attention(q, k, v, mask=mask)).abs().max() > 0.1


@pytest.mark.parametrize("T", [10, 7, 1])
def test_runs_stand_on_the_keys(T: int) -> None:
    """The last queries, which begin or end within a run; those of whole runs choose as in the whole pass."""
    q, k, _ = (z.detach() for z in heads(5, 22))
    options = {"block": 2, "step": 2, "theta": 0.2}
    whole = anchor_stripes(q, k, **options)
    part = anchor_stripes(q[:, :, -T:], k, **options)
    close(part.anchor, whole.anchor[:, :, -T:].contiguous())
    if T == 10:  # from the start of a run on
        assert torch.equal(part.taken, whole.taken[:, :, -3:])
    assert part.front == (22 - T) % 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"theta": float("inf")}, r"theta is out of range \(got inf\)"),
        ({"step": 0}, r"step is too small \(got 0\)"),
        ({"init": 0}, r"init is too small \(got 0\)"),
    ],
)
def test_refuses_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"AnchorStripes: {words}"):
        AnchorStripes(**options)


def test_refuses_masks_lengths_and_steps() -> None:
    q, k, v = (z.detach() for z in heads(6, 8))
    selector = AnchorStripes(block=2, step=2)
    with pytest.raises(ValueError, match="causality and padding alone"):
        regard.attention(q, k, v, mask=masks.causal() & masks.window(3), selector=selector)
    with pytest.raises(ValueError, match=r"q has more tokens than k \(got 8\); expected at most 5"):
        regard.attention(q, k[:, :, 3:], v[:, :, 3:], mask=masks.causal(), selector=selector)
    with pytest.raises(ValueError, match="stream"):
        regard.create("anchor_stripes", dim=8, num_heads=2, causal=True).init_state(1, 8)

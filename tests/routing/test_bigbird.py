"""BigBird against loops, whose author has read neither code nor test, and against the layer in transformers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

import regard
from regard import masks
from regard.laws.agreement import close
from regard.masks.random_blocks import bigbird_tiles
from regard.routing.bigbird import BigBird
from routing import naive_bigbird as naive


def tiles(n: int, heads: int = 3, **options) -> Tensor:
    """(H, n, n)."""
    return bigbird_tiles(torch.tensor([n]), n, heads, **options)[0].expand(heads, n, n)


def random_of(found: Tensor) -> list[list[list[int]]]:
    """Of each head and row the blocks besides those that all rows of that number see."""
    n = found.shape[-1]
    return [
        [sorted({*row.nonzero().flatten().tolist()} - {*naive.key_blocks(i, n)}) for i, row in enumerate(head)]
        for head in found
    ]


@pytest.mark.parametrize("n", [6, 7, 8, 9, 12, 30])
@pytest.mark.parametrize("r", [1, 2, 4])
def test_sees_global_blocks_neighbours_and_legal_random_ones(n: int, r: int) -> None:
    found = tiles(n, num_random=r)
    if n < 5 + r:
        assert found.all()
        return
    for head, rows in zip(found, random_of(found), strict=True):
        for i, drawn in enumerate(rows):
            assert {*naive.key_blocks(i, n)} <= {*head[i].nonzero().flatten().tolist()}
            assert {*drawn} <= {*naive.legal_random(i, n)}
            assert len(drawn) == (r if 0 < i < n - 1 else 0)


@pytest.mark.parametrize(("n", "r"), [(30, 2), (9, 4), (9, 3), (8, 3), (12, 5)])
def test_draws_at_the_front_as_the_plan_says(n: int, r: int) -> None:
    plan = naive.draw_plan(n, r)
    for rows in random_of(tiles(n, num_random=r, draw="front")):
        for drawn in rows[1:-1]:
            for count, first, end in plan:
                assert sum(first <= c < end for c in drawn) <= count
            assert all(any(first <= c < end for _, first, end in plan) for c in drawn)
            if len(plan) == 1:
                assert len(drawn) == r


def test_draws_evenly_and_for_each_head_anew() -> None:
    found = tiles(40, 400, num_random=3)
    often = found[:, 20].double().mean(0)
    free = torch.tensor(naive.legal_random(20, 40))
    assert (often[free] - 3 / 35).abs().max() < 0.06  # four standard deviations
    assert len({str(rows) for rows in random_of(found[:20])}) == 20
    assert torch.equal(found, tiles(40, 400, num_random=3))
    assert not torch.equal(found, tiles(40, 400, num_random=3, seed=1))


def test_more_global_blocks_and_neighbours() -> None:
    found = tiles(20, num_random=1, num_global=2, window=3)
    for i in range(2, 18):
        known = {0, 1, 18, 19, *range(max(0, i - 3), min(20, i + 4))}
        assert all(len({*head[i].nonzero().flatten().tolist()} - known) == 1 for head in found)
        assert all(head[i, sorted(known)].all() for head in found)


@pytest.mark.parametrize("hidden", [False, True])
def test_is_the_definition(hidden: bool) -> None:
    torch.manual_seed(0)
    q, k, v = given = torch.randn(3, 2, 3, 16, 4, dtype=torch.float64).requires_grad_()
    part, keep = BigBird(block=2, num_random=1), torch.ones(2, 16, dtype=torch.bool)
    keep[1, 15] = not hidden
    mask = part(q, k, masks.padding(keep))
    rows = random_of(mask.tiles[0])
    assert torch.equal(mask.dense(16)[0], naive.allowed(16, 2, rows))
    want = naive.bigbird(q, k, v, 2, rows, keep)
    got = regard.attention(q, k, v, mask=masks.padding(keep), selector=part) * keep[:, None, :, None]
    close(got, want, "out")
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), given) for y in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("hidden", [0, 1])
def test_is_the_layer_in_transformers(hidden: int) -> None:
    """With its random blocks, which it draws in training only."""
    torch.manual_seed(0)
    config = BigBirdConfig(hidden_size=12, num_attention_heads=3, block_size=2, num_random_blocks=2)
    config.attention_probs_dropout_prob = 0.0
    layer = BigBirdBlockSparseAttention(config, seed=5).double().train()
    x = torch.randn(2, 24, 12, dtype=torch.float64, requires_grad=True)
    keep = torch.ones(2, 24, dtype=torch.bool)
    keep[1, 24 - hidden :] = False
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(keep.double(), 2)
    want = layer(x, band, rows, columns, blocked, blocked)[0]
    np.random.seed(5)
    plan = layer._get_rand_attn_plan(24, 2, 2)
    drawn = torch.from_numpy(np.stack(layer._bigbird_block_rand_mask_with_head(24, 24, 2, 2, 3, *plan))).long()
    seen = masks.bigbird(24, 3, block=2, num_random=0).tiles.clone()
    seen[0, :, 1:-1] = seen[0, :, 1:-1].scatter(-1, drawn, True)
    q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    mask = masks.chosen(seen, 24, 24, 2) & masks.padding(keep)
    got = regard.attention(q, k, v, mask=mask).transpose(1, 2).flatten(2) * keep[..., None]
    assert (got - want).abs().max() < 1e-10
    gradients = [torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (got, want)]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*gradients, strict=True))
    front = random_of(tiles(12, num_random=2, draw="front"))
    assert max(c for head in front for row in head for c in row) <= int(drawn.max()) == 7


def test_all_is_two_steps_away_for_a_share_of_the_pairs() -> None:
    layer = regard.create("bigbird", dim=12, num_heads=3, block=4, num_random=2)
    q = torch.randn(1, 3, 160, 4)
    one = layer.selector(q, q, None).dense(160)[0].double()
    assert ((one @ one) > 0).all()
    n = 40
    assert float(one.mean()) == pytest.approx((2 * n + (n - 2) * 7 - 2) / n**2)


def test_padding_behind_a_row_leaves_it_as_it_is() -> None:
    """Its blocks, the last and the drawn ones too, are those of its own tokens."""
    layer = regard.create("bigbird", dim=12, num_heads=3, block=2, num_random=1).double()
    x, keep = torch.randn(2, 40, 12, dtype=torch.float64), torch.ones(2, 40, dtype=torch.bool)
    keep[1, 25:] = False
    close(layer(x, mask=masks.padding(keep))[1, :25], layer(x[1:, :25])[0], "out")


def test_runs_on_blocks_and_draws_once() -> None:
    q, k, v = torch.randn(3, 1, 4, 640, 16)
    part = BigBird(block=32, num_random=2)
    assert part(q, k, None) is part(q, k, None)
    assert regard.plan(q, k, v, selector=part).kernel in ("native", "block_sparse")
    want = regard.attention(q.double(), k.double(), v.double(), selector=part, kernel="eager")
    for name in ("auto", "block_sparse"):
        torch.testing.assert_close(
            regard.attention(q, k, v, selector=part, kernel=name).double(), want, atol=1e-5, rtol=0
        )
    shared = BigBird(block=32, num_random=2, per_head=False)(q, k, None)
    assert shared.heads == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"block": 0}, "block is too small"),
        ({"num_random": -1}, "num_random is too small"),
        ({"draw": "back"}, "draw is unknown"),
        ({"per_head": 2}, "per_head"),
        ({"seed": -1}, "seed is too small"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        regard.create("bigbird", dim=8, num_heads=2, **wrong)


def test_refuses_another_sequence() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="k is of another length than q"):
        regard.attention(q, q[:, :, :3], q[:, :, :3], selector=BigBird())
    with pytest.raises(ValueError, match="bigbird: lengths"):
        masks.bigbird(5, 2, lengths=torch.zeros(1, 1).long())

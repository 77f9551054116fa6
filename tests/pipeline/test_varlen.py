"""Sequences end to end in `regard.attention`: each as by itself, with other numbers of queries than of keys."""

import itertools

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.pipeline.function import each_alone

H, G, D = 4, 2, 8
QUERIES, KEYS = (3, 0, 1, 5, 2, 4), (3, 2, 7, 9, 0, 2)
"""As many, no queries, one of many keys, more keys, no keys, more queries than keys."""


def ends(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def drawn(queries: int = sum(QUERIES), keys: int = sum(KEYS), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((queries, H, D), (keys, G, D), (keys, G, D + 1))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, rule) -> Tensor:
    """Scores, causality and softmax, written out for every query of every sequence."""
    out = torch.zeros(len(q), H, v.shape[2], dtype=q.dtype)
    begins = zip(ends(QUERIES).tolist(), ends(KEYS).tolist(), QUERIES, KEYS, strict=False)
    for (at, first, T, S), t in ((each, t) for each in begins for t in range(each[2])):
        seen = [j for j in range(S) if rule(t + S - T, j)]
        for h in range(H) if seen else ():
            rows = [first + j for j in seen]
            weights = (k[rows, h // (H // G)] @ q[at + t, h] * D**-0.5).softmax(0)
            out[at + t, h] = weights @ v[rows, h // (H // G)]
    return out


RULES = {
    "none": (None, lambda i, j: True),
    "causal": (masks.causal(), lambda i, j: j <= i),
    "window": (masks.causal() & masks.window(3), lambda i, j: i - 3 < j <= i),
    "near": (masks.window(2), lambda i, j: abs(i - j) < 2),
    "first": (masks.prefix(1) | masks.causal() & masks.window(2), lambda i, j: j < 1 or i - 2 < j <= i),
}


@pytest.mark.parametrize("kernel", ["auto", "eager", "block_sparse", "chunked"])
@pytest.mark.parametrize("name", RULES)
def test_each_is_by_itself(name: str, kernel: str) -> None:
    mask, rule = RULES[name]
    q, k, v = drawn()
    want = one_by_one(q, k, v, rule)
    got = regard.attention(q, k, v, mask=mask, layout="thd", cu_seqlens=(ends(QUERIES), ends(KEYS)), kernel=kernel)
    close(got.detach(), want.detach(), "out")
    for mine, theirs in zip(*(torch.autograd.grad(z.sin().sum(), (q, k, v)) for z in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("name", RULES)
def test_blocks_hold_what_the_mask_does(name: str) -> None:
    """What is said of whole tiles against the tiles themselves; the count, too."""
    q, k, _ = (z.transpose(0, 1)[None] for z in drawn())
    mask = each_alone("thd", q, k, RULES[name][0], (ends(QUERIES), ends(KEYS)))
    T, S = q.shape[2], k.shape[2]
    dense = mask.dense(T, S)
    assert mask.count(T, S) == int(dense.sum())
    layout = mask.layout(T, S, block=4)
    blocks, full = layout.to_dense_blocks(), layout.to_dense_full()
    for row, column in itertools.product(range(-(-T // 4)), range(-(-S // 4))):
        tile = dense[0, 0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert bool(blocks[0, 0, row, column]) == bool(tile.any()), (row, column)
        assert not full[0, 0, row, column] or tile.all(), (row, column)


def test_one_packing_for_both_is_packed_self_attention() -> None:
    q, k, v = drawn(12, 12)
    cu = torch.tensor([0, 1, 8, 10], dtype=torch.int32)
    got = regard.attention(q, k, v, mask=masks.causal(), layout="thd", cu_seqlens=cu)
    heads = [z.transpose(0, 1)[None] for z in (q, k, v)]
    want = regard.attention(*heads, mask=masks.packed(cu) & masks.causal())
    close(got.detach(), want[0].transpose(0, 1).detach(), "out")
    assert not got[10:].any(), "what is in no sequence sees nothing"


def test_a_plan_is_of_blocks() -> None:
    q, k, v = (torch.empty(8192, 4, 64, device="meta") for _ in "qkv")
    cu = torch.arange(0, 8193, 512)
    plan = regard.plan(q, k, v, mask=masks.causal(), layout="thd", cu_seqlens=cu)
    assert plan.kernel != "eager", str(plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "thd"}, "goes with layout 'thd', and only with it"),
        ({"cu_seqlens": ends(QUERIES)}, "goes with layout 'thd', and only with it"),
        ({"layout": "thd", "cu_seqlens": ends((30,))}, "ends behind the last of the queries"),
        ({"layout": "thd", "cu_seqlens": (ends((3,)), ends((3, 2)))}, "other numbers of sequences"),
        ({"layout": "thd", "cu_seqlens": torch.tensor([1, 2])}, "must start with 0"),
        ({"layout": "thd", "cu_seqlens": ends((3,)), "mask": torch.ones(1, 1, 3, 3).bool()}, "does not go with layout"),
    ],
)
def test_refusals(options, words: str) -> None:
    given = drawn()
    if options.get("layout") != "thd":
        given = [z[None] for z in given]
    with pytest.raises(ValueError, match=words):
        regard.attention(*given, **options)


def test_what_counts_across_borders_is_refused() -> None:
    q, k, v = drawn()
    cu = (ends(QUERIES), ends(KEYS))
    with pytest.raises(ValueError, match="position does not go with layout 'thd'"):
        regard.attention(q, k, v, layout="thd", cu_seqlens=cu, position=regard.positions.Alibi(H))
    with pytest.raises(ValueError, match="q does not have layout 'thd'"):
        regard.attention(q[None], k[None], v[None], layout="thd", cu_seqlens=cu)

"""Every mask against its rule written in plain Python, alone and combined, in all that comes of a mask."""

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from regard import masks
from regard.masks import BlockLayout, Mask

SHAPES = [(7, 7), (4, 9), (9, 4), (0, 5), (5, 0), (0, 0), (1, 12)]
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 5, 5, 5, 5], [3, 1, 1, 3, 0, 0, 3, 1, 1, 2]])
KEEP = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
LENGTHS = torch.tensor([3, 0])
CU = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
DENSE = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) < 0.6


PLACES = torch.tensor([[4, 1, 4], [-1, 6, -1]])
PARENTS = torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, 1, 2, 3]])


def _ancestor(parents, n, m):
    """Whether m is n or above it."""
    while n != m and n >= 0:
        n = int(parents[n])
    return n == m


def _in_tree(parents, start, i, j):
    n, m = i - start, j - start
    return j < start or (0 <= n < len(parents) and 0 <= m < len(parents) and _ancestor(parents, n, m))


def _continues(n, lengths, i, j):
    """Which text a token belongs to: 0 the prefix, then the continuations; -1 outside."""

    def text(x):
        end = n
        for k, m in enumerate((0, *lengths)):
            end += m
            if 0 <= x < end:
                return k
        return -1

    return text(j) != -1 and (j < n or (i >= 0 and text(i) == text(j)))


def _diffuses(size, n, i, j):
    if not (0 <= i < 2 * n and 0 <= j < 2 * n):
        return False
    (half_i, at_i), (half_j, at_j) = divmod(i, n), divmod(j, n)
    mine, theirs = at_i // size, at_j // size
    if half_j == 0:  # a noised key
        return half_i == 0 and mine == theirs
    return theirs < mine if half_i == 0 else theirs <= mine


def _document(i, cu=(0, 3, 3, 8)):
    return max(n for n in range(3) if cu[n] <= i)


def _same(ids, i, j):
    return 0 <= i < len(ids) and 0 <= j < len(ids) and bool(ids[i] == ids[j])


def _dense_rule(b, h, i, j):
    T, S = DENSE.shape[2:]
    return 0 <= i - (S - T) < T and j < S and bool(DENSE[b, h, i - (S - T), j])


RULES = {
    "full()": (masks.full(), lambda b, h, i, j: True),
    "nothing()": (masks.nothing(), lambda b, h, i, j: False),
    "causal()": (masks.causal(), lambda b, h, i, j: j <= i),
    "window(1)": (masks.window(1), lambda b, h, i, j: i == j),
    "window(3)": (masks.window(3), lambda b, h, i, j: abs(i - j) < 3),
    "window(4, ahead=2)": (masks.window(4, ahead=2), lambda b, h, i, j: i - j < 4 and j - i < 2),
    "dilated(2, 3)": (masks.dilated(2, 3), lambda b, h, i, j: abs(i - j) < 6 and abs(i - j) % 3 == 0),
    "dilated(3, 1)": (masks.dilated(3, 1), lambda b, h, i, j: abs(i - j) < 3),
    "offset(2)": (masks.offset(2), lambda b, h, i, j: j == i + 2),
    "offset(-1)": (masks.offset(-1), lambda b, h, i, j: j == i - 1),
    "queries(<2x10>)": (masks.queries(KEEP), lambda b, h, i, j: 0 <= i < 10 and bool(KEEP[b, i])),
    "(documents(<2x10>) & ~offset(0)) | queries(<2x10>)": (
        masks.same_token(IDS),
        lambda b, h, i, j: 0 <= i < 10 and (i not in ({5}, {9})[b]) <= (i != j and _same(IDS[b], i, j)),
    ),
    "strided(3)": (masks.strided(3), lambda b, h, i, j: abs(i - j) % 3 == 0),
    "strided(1)": (masks.strided(1), lambda b, h, i, j: True),
    "blocks(3)": (masks.blocks(3), lambda b, h, i, j: i >= 0 and int(i / 3) == int(j / 3)),
    "blocks(3, before=1)": (
        masks.blocks(3, before=1),
        lambda b, h, i, j: i // 3 - j // 3 in (0, 1),
    ),
    "blocks(2, before=2)": (
        masks.blocks(2, before=2),
        lambda b, h, i, j: i // 2 - j // 2 in (0, 1, 2),
    ),
    "global_tokens(2)": (masks.global_tokens(2), lambda b, h, i, j: i < 2 or j < 2),
    "global_tokens(<2x3>)": (
        masks.global_tokens(PLACES),
        lambda b, h, i, j: i in ({1, 4}, {6})[b] or j in ({1, 4}, {6})[b],
    ),
    "global_tokens(<1x3>)": (masks.global_tokens([5, 0, 1]), lambda b, h, i, j: i in (0, 1, 5) or j in (0, 1, 5)),
    "tree(<1x5>, prefix=<1>)": (
        masks.tree(PARENTS[0], prefix=3),
        lambda b, h, i, j: _in_tree(PARENTS[0], 3, i, j),
    ),
    "tree(<2x5>, prefix=<2>)": (
        masks.tree(PARENTS, prefix=torch.tensor([2, 4])),
        lambda b, h, i, j: _in_tree(PARENTS[b], (2, 4)[b], i, j),
    ),
    "tree(<1x0>, prefix=<1>)": (masks.tree(PARENTS[0, :0]), lambda b, h, i, j: False),
    "documents(<1x7>) | prefix(2)": (
        masks.shared_prefix(2, [3, 0, 2]),
        lambda b, h, i, j: j < 2 or _continues(2, (3, 0, 2), i, j),
    ),
    "(documents(<2x9>) | prefix(<2>)) & padding(lengths=<2>)": (
        masks.shared_prefix(torch.tensor([2, 1]), torch.tensor([[3, 4], [1, 2]])),
        lambda b, h, i, j: j < (9, 4)[b] and (j < (2, 1)[b] or _continues((2, 1)[b], ((3, 4), (1, 2))[b], i, j)),
    ),
    "block_causal(3)": (masks.block_causal(3), lambda b, h, i, j: j // 3 <= i // 3),
    "block_diffusion(2, 4)": (masks.block_diffusion(2, 4), lambda b, h, i, j: _diffuses(2, 4, i, j)),
    "block_diffusion(2, 5)": (masks.block_diffusion(2, 5), lambda b, h, i, j: _diffuses(2, 5, i, j)),
    "prefix(2)": (masks.prefix(2), lambda b, h, i, j: j < 2),
    "prefix(<2>)": (masks.prefix(LENGTHS), lambda b, h, i, j: j < (3, 0)[b]),
    "padding(lengths=<2>)": (masks.padding(lengths=LENGTHS), lambda b, h, i, j: j < (3, 0)[b]),
    "padding(<2x10>)": (masks.padding(KEEP), lambda b, h, i, j: j < 10 and bool(KEEP[b, j])),
    "padding(<1x10>)": (masks.padding(KEEP[:1]), lambda b, h, i, j: j < 10 and bool(KEEP[0, j])),
    "documents(<1x10>)": (masks.documents(IDS[0]), lambda b, h, i, j: _same(IDS[0], i, j)),
    "documents(<2x10>)": (masks.documents(IDS), lambda b, h, i, j: _same(IDS[b], i, j)),
    "packed(<3>)": (
        masks.packed(CU),
        lambda b, h, i, j: 0 <= i < 8 and j < 8 and _document(i) == _document(j),
    ),
    "packed(<3>, <3>) & padding(lengths=<2>)": (
        masks.packed([CU, torch.tensor([0, 0, 2])]),
        lambda b, h, i, j: (i >= 0 and (max(i, j) < 8 and _document(i) == _document(j) if b == 0 else max(i, j) < 2)),
    ),
    "documents(<1x0>)": (masks.documents(IDS[0, :0]), lambda b, h, i, j: False),
    "padding(<1x0>)": (masks.padding(KEEP[:1, :0]), lambda b, h, i, j: False),
    "dense(<2x3x6x8>)": (masks.dense(DENSE), _dense_rule),
    "dense(<1x1x6x8>)": (masks.dense(DENSE[0, 0]), lambda b, h, i, j: _dense_rule(0, 0, i, j)),
    "dense(<1x1x0x8>)": (masks.dense(DENSE[0, 0, :0]), lambda b, h, i, j: False),
    "per_head([causal(), window(2), full()])": (
        masks.per_head([masks.causal(), masks.window(2), masks.full()]),
        lambda b, h, i, j: (j <= i, abs(i - j) < 2, True)[h],
    ),
    "per_head([padding(<2x10>), strided(2), nothing()])": (
        masks.per_head([masks.padding(KEEP), masks.strided(2), masks.nothing()]),
        lambda b, h, i, j: (j < 10 and bool(KEEP[b, j]), (i - j) % 2 == 0, False)[h],
    ),
    "predicate(_corner)": (
        masks.predicate(lambda b, h, i, j: (i + j) % 4 == 1),
        lambda b, h, i, j: (i + j) % 4 == 1,
    ),
}
RULES["predicate(_corner)"][0].function.__name__ = "_corner"


def brute(mask, rule, T, S):
    out = torch.zeros(mask.batch, mask.heads, T, S, dtype=torch.bool)
    for b, h, t, j in product(range(mask.batch), range(mask.heads), range(T), range(S)):
        out[b, h, t, j] = rule(b, h, t + S - T, j)
    return out


def tiled(dense, bq, bk):
    """Per block: anything allowed, everything allowed."""
    B, H, T, S = dense.shape
    some = torch.zeros(B, H, -(-T // bq), -(-S // bk), dtype=torch.bool)
    full = some.clone()
    for r, c in product(range(some.shape[2]), range(some.shape[3])):
        tile = dense[:, :, r * bq : (r + 1) * bq, c * bk : (c + 1) * bk]
        some[:, :, r, c], full[:, :, r, c] = tile.any((2, 3)), tile.all((2, 3))
    return some, full


def check(mask, rule, T, S, *blocks):
    """dense, slices, layout, count, bounds: all against the rule."""
    want = brute(mask, rule, T, S)
    torch.testing.assert_close(mask.dense(T, S), want)
    rows, columns = torch.arange(0, T, 2), torch.arange(0, S, 3).flip(0)
    torch.testing.assert_close(mask.at(rows + S - T, columns), want[:, :, rows][..., columns])
    for block in blocks:
        layout = mask.layout(T, S, block=block)
        some, full = tiled(want, *layout.block)
        torch.testing.assert_close(layout.to_dense_blocks(), some)
        torch.testing.assert_close(layout.to_dense_full(), full)
        assert layout.num_blocks == int(some.sum())
        assert layout.row_ptr.tolist() == [0, *some.sum(-1).flatten().cumsum(0).tolist()]
    assert mask.count(T, S) == int(want.sum())
    assert mask.density(T, S) == pytest.approx(want.double().mean().item() if want.numel() else 0)
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    if mask.reach is not None:
        assert not (want & (i - j >= mask.reach)).any()
    if mask.is_causal:
        assert not (want & (j > i)).any()


@pytest.mark.parametrize(("T", "S"), SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_each_mask_follows_its_rule(name, T, S):
    check(*RULES[name], T, S, (2, 3), 4, 128)


@pytest.mark.parametrize("name", RULES)
def test_each_complement_follows_its_rule(name):
    mask, rule = RULES[name]
    check(~mask, lambda *at: not rule(*at), 5, 8, 1, 2, (2, 3))


@pytest.mark.parametrize("name", RULES)
def test_repr_reads_like_the_call(name):
    assert repr(RULES[name][0]) == name


@st.composite
def combined(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return RULES[draw(st.sampled_from(sorted(RULES)))]
    mask, rule = draw(combined(depth - 1))
    match draw(st.sampled_from("~&|")):
        case "~":
            return ~mask, lambda *at: not rule(*at)
        case "&":
            other, second = draw(combined(depth - 1))
            return mask & other, lambda *at: rule(*at) and second(*at)
        case _:
            other, second = draw(combined(depth - 1))
            return mask | other, lambda *at: rule(*at) or second(*at)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(combined(), st.integers(0, 11), st.integers(0, 11), st.integers(1, 5), st.integers(1, 5))
def test_combinations_follow_their_rules(pair, T, S, bq, bk):
    check(*pair, T, S, (bq, bk))


@pytest.mark.parametrize("seed", range(2))
def test_layout_of_many_chunks_equals_dense(seed):
    """Enough row blocks for several chunks, batch and heads included, and a column window that moves."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (2, 200), generator=generator)
    ids = ids.cumsum(1) // 40 if seed else ids
    heads = masks.per_head([masks.window(9), masks.causal(), masks.strided(7)])
    for mask in (masks.documents(ids) & heads, masks.causal() & masks.window(17) & masks.documents(ids)):
        for T, S in ((140, 200), (200, 150)):
            layout = mask.layout(T, S, block=(2, 7))
            some, full = tiled(mask.dense(T, S), 2, 7)
            torch.testing.assert_close(layout.to_dense_blocks(), some)
            torch.testing.assert_close(layout.to_dense_full(), full)
            assert mask.count(T, S) == int(mask.dense(T, S).sum())


def test_causal_window_sees_exactly_its_size():
    for size in (1, 3, 8):
        mask = masks.causal() & masks.window(size)
        assert mask.reach == size
        assert mask.dense(20)[0, 0, -1].sum() == size
        sparse = masks.causal() & masks.dilated(size, 2)
        assert sparse.dense(20)[0, 0, -1].sum() == size
        assert sparse.reach == 2 * (size - 1) + 1


def test_reach_and_causality():
    causal, window = masks.causal(), masks.window(5)
    assert causal.reach is None
    assert masks.nothing().reach == 0
    assert masks.blocks(4).reach == 4
    assert (masks.causal() & masks.blocks(4, before=1)).reach == 8
    assert (window | masks.window(7)).reach == 7
    assert (window | masks.prefix(1)).reach is None
    assert (~window).reach is None
    assert masks.per_head([window, masks.window(2)]).reach == 5
    assert causal.is_causal
    assert (causal & masks.full()).is_causal
    assert (causal | masks.nothing()).is_causal
    assert masks.window(5, ahead=1).is_causal
    assert not (causal | masks.prefix(1)).is_causal
    assert not (~causal).is_causal


def test_masks_of_numbers_are_values():
    one = masks.causal() & (masks.window(4) | ~masks.blocks(2))
    two = masks.causal() & (masks.window(4) | ~masks.blocks(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != masks.causal() & (masks.window(5) | ~masks.blocks(2))
    assert (masks.causal() & masks.window(2)) & masks.full() == masks.causal() & (masks.window(2) & masks.full())
    assert ~~one == one
    assert repr(one) == "causal() & (window(4) | ~blocks(2))"
    assert repr(~(masks.causal() & masks.window(2))) == "~(causal() & window(2))"
    padding = masks.padding(KEEP)
    assert padding & masks.causal() == padding & masks.causal()
    assert padding != masks.padding(KEEP)


def test_masks_are_immutable():
    with pytest.raises(AttributeError):
        masks.blocks(3).size = 4


@pytest.mark.parametrize("name", [n for n in RULES if "x0" not in n])
@pytest.mark.parametrize(("T", "S"), [(4, 9), (9, 4)])
def test_flex_attention_agrees(name, T, S):
    mask = RULES[name][0]
    B, H = 2, 3
    got = create_mask(mask.mask_mod(T, S), B, H, T, S, device="cpu")
    torch.testing.assert_close(got, mask.dense(T, S).expand(B, H, T, S))


def test_flex_attention_blocks_agree():
    mask = masks.causal() & masks.window(40) & masks.padding(torch.arange(256) < torch.tensor([[200], [130]]))
    flex = create_block_mask(mask.mask_mod(192, 256), 2, 1, 192, 256, device="cpu", BLOCK_SIZE=32)
    layout = mask.layout(192, 256, block=32)
    torch.testing.assert_close(flex.to_dense().bool(), layout.to_dense_blocks())
    torch.testing.assert_close(flex.full_kv_num_blocks.long(), layout.to_dense_full().sum(-1))


@pytest.mark.parametrize("half", [0, 1])  # one mask of all would be nested deeper than Python lets a compiler go
def test_all_masks_compile_in_one_graph(half):
    torch._dynamo.reset()
    mask = masks.window(1)
    for n, (other, _) in enumerate(list(RULES.values())[half::2]):
        mask = (mask & other, mask | ~other)[n % 2]
    i, j = torch.arange(1, 9), torch.arange(8)
    compiled = torch.compile(lambda i, j: mask.at(i, j), backend="eager", fullgraph=True)
    want = mask.at(i, j)
    assert 0 < want.sum() < want.numel()
    torch.testing.assert_close(compiled(i, j), want)


def test_can_be_made_inside_a_compiled_function():
    def function(keep, ids):
        mask = masks.causal() & masks.window(3) & masks.padding(keep) & masks.documents(ids)
        return mask.dense(keep.shape[1])

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(KEEP, IDS), function(KEEP, IDS))


def test_to_moves_the_tensors():
    joined = masks.per_head([masks.padding(KEEP), masks.documents(IDS)]) & ~masks.prefix(LENGTHS)
    moved = (joined & masks.dense(DENSE[:, :2])).to("meta")
    assert moved.dense(6, 8, device="meta").device.type == "meta"
    assert masks.causal().to("meta") == masks.causal()


def test_from_blocks_keeps_the_tiles():
    tiles = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    full = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    layout = BlockLayout.from_blocks(tiles, 30, 33, (8, 7), full=full)
    assert layout.shape == (2, 3, 4, 5)
    torch.testing.assert_close(layout.to_dense_blocks(), tiles)
    torch.testing.assert_close(layout.to_dense_full(), tiles & full)
    assert layout.block_density == tiles.float().mean()
    assert BlockLayout.from_blocks(tiles, 30, 33, (8, 7)).full.all()
    b, h, r = 1, 2, 3
    start, end = layout.row_ptr[(b * 3 + h) * 4 + r :][:2]
    assert layout.cols[start:end].tolist() == tiles[b, h, r].nonzero().flatten().tolist()
    shared = masks.causal().layout(30, 33, block=(8, 7))
    torch.testing.assert_close((layout & shared).to_dense_blocks(), tiles & shared.to_dense_blocks())
    torch.testing.assert_close((shared & layout).to_dense_full(), tiles & full & shared.to_dense_full())


BAD = [
    (lambda: masks.window(0), ValueError, "window: size is too small (got 0); expected an int >= 1"),
    (lambda: masks.window(True), TypeError, "window: size has the wrong type (got True); expected an int >= 1"),
    (lambda: masks.window(2.0), TypeError, "window: size has the wrong type (got 2.0); expected an int >= 1"),
    (lambda: masks.window(2, ahead=0), ValueError, "window: ahead is too small (got 0); expected an int >= 1"),
    (lambda: masks.dilated(2, 0), ValueError, "dilated: dilation"),
    (lambda: masks.dilated(0, 2), ValueError, "dilated: size"),
    (lambda: masks.strided(-1), ValueError, "strided: stride"),
    (lambda: masks.blocks("3"), TypeError, "blocks: size"),
    (lambda: masks.prefix(0), ValueError, "prefix: n"),
    (
        lambda: masks.prefix(LENGTHS.float()),
        TypeError,
        "prefix: n has the wrong dtype (got torch.float32); expected an integer Tensor",
    ),
    (lambda: masks.global_tokens(0), ValueError, "global_tokens: n"),
    (lambda: masks.global_tokens([1, -1]), ValueError, "global_tokens: places is too small (got -1)"),
    (lambda: masks.global_tokens(KEEP), TypeError, "global_tokens: places has the wrong dtype (got torch.bool)"),
    (lambda: masks.tree(torch.tensor([0, 0])), ValueError, "tree: parents must come before their children (got 0 of"),
    (lambda: masks.tree(torch.tensor([-1, -2])), ValueError, "tree: parents must come before their children (got -2"),
    (lambda: masks.tree(PARENTS, prefix=-1), ValueError, "tree: prefix is too small (got -1); expected an int >= 0"),
    (lambda: masks.tree(PARENTS, prefix=torch.ones(3).long()), ValueError, "tree: prefix has the wrong shape"),
    (lambda: masks.shared_prefix(0, [2]), ValueError, "shared_prefix: n is too small"),
    (lambda: masks.shared_prefix(2, torch.tensor([2, -1])), ValueError, "shared_prefix: lengths is out of range"),
    (lambda: masks.block_causal(0), ValueError, "block_causal: size is too small (got 0); expected an int >= 1"),
    (lambda: masks.block_diffusion(2, 0), ValueError, "block_diffusion: length is too small (got 0)"),
    (lambda: masks.documents(IDS.float()), TypeError, "documents: ids"),
    (
        lambda: masks.documents(IDS[None]),
        ValueError,
        "documents: ids has the wrong shape (got (1, 2, 10))",
    ),
    (lambda: masks.packed(CU[1:]), ValueError, "packed: cu_seqlens must start with 0 (got [3])"),
    (lambda: masks.packed(CU.float()), TypeError, "packed: cu_seqlens has the wrong dtype"),
    (lambda: masks.packed([]), ValueError, "packed: expected at least one cu_seqlens (got none)"),
    (lambda: masks.packed(torch.tensor([0, 7, 4])), ValueError, "must be non-decreasing (got 7 then 4 at 2)"),
    (
        lambda: masks.padding(KEEP.long()),
        TypeError,
        "padding: keep has the wrong dtype (got torch.int64)",
    ),
    (
        lambda: masks.padding(KEEP[0]),
        ValueError,
        "padding: keep has the wrong shape (got (10,))",
    ),
    (lambda: masks.padding(lengths=[3, 4]), TypeError, "padding: lengths"),
    (lambda: masks.padding(), ValueError, "padding: give either keep or lengths"),
    (lambda: masks.padding(KEEP, lengths=LENGTHS), ValueError, "padding: give either keep or lengths"),
    (lambda: masks.dense(DENSE[0]), ValueError, "dense: tensor has the wrong shape"),
    (lambda: masks.dense(DENSE.float()), TypeError, "dense: tensor has the wrong dtype"),
    (lambda: masks.per_head([]), ValueError, "per_head: expected at least one mask"),
    (lambda: masks.per_head([masks.full(), DENSE]), TypeError, "per_head: every entry must be a Mask"),
    (lambda: masks.per_head([masks.dense(DENSE)]), ValueError, "per_head: entries must not differ by head"),
    (lambda: masks.predicate(3), TypeError, "predicate: function must be callable"),
    (lambda: masks.predicate(lambda b, h, i, j: i + b > j), ValueError, "predicate: batch is missing"),
    (lambda: masks.predicate(lambda b, h, i, j: i + h > j), ValueError, "predicate: heads is missing"),
    (lambda: masks.predicate(lambda b, h, i, j: i > j, heads=0), ValueError, "predicate: heads"),
    (lambda: masks.causal() & DENSE, TypeError, "wrap a tensor in masks.dense(...)"),
    (lambda: masks.causal() | None, TypeError, "mask |: expected a Mask (got NoneType)"),
    (lambda: bool(masks.causal()), TypeError, "combine masks with &, | and ~"),
    (
        lambda: masks.padding(KEEP) & masks.prefix(torch.ones(3).long()),
        ValueError,
        "cannot combine batch sizes",
    ),
    (
        lambda: masks.dense(DENSE) | masks.per_head([masks.full()] * 2),
        ValueError,
        "cannot combine heads sizes",
    ),
    (lambda: masks.causal().dense(-1), ValueError, "dense: T is too small (got -1); expected an int >= 0"),
    (lambda: masks.causal().layout(4, block=0), ValueError, "layout: block"),
    (lambda: masks.causal().layout(4, block=(2, 2, 2)), ValueError, "layout: block must be an int or a pair"),
    (lambda: masks.causal().count(4, 2.5), TypeError, "count: S"),
    (lambda: masks.causal().picture(4, h=1), ValueError, "picture: h must lie in 0..0 (got 1)"),
    (lambda: BlockLayout.from_blocks(KEEP, 4, 4, 2), ValueError, "from_blocks: tiles has the wrong shape"),
    (lambda: BlockLayout.from_blocks(DENSE, 4, 4, 2), ValueError, "from_blocks: tiles must be (B, H, 2, 2)"),
    (
        lambda: masks.full().layout(4, block=2) & masks.full().layout(5, block=2),
        ValueError,
        "layout &: block, T and S must agree",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_refusals_say_what_is_wrong(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_a_subclass_needs_only_its_rule():
    class Anti(Mask):
        def __call__(self, b, h, i, j):
            return (i + j) % 5 == 0

    check(Anti() & masks.causal(), lambda b, h, i, j: (i + j) % 5 == 0 and j <= i, 9, 11, 3)


@pytest.mark.parametrize("block", [(20, 16), (1, 16), (7, 9), (128, 128)])
@pytest.mark.parametrize(("T", "S"), [(50, 70), (70, 50), (40, 40)])
def test_chosen_blocks(T: int, S: int, block: tuple[int, int]) -> None:
    """What a selector chose is what the mask allows, cut into these or any other blocks, alone and in company."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(2, 3, -(-T // block[0]), -(-S // block[1]), generator=generator) < 0.5
    mask = masks.chosen(tiles, T, S, block)
    want = tiles.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :T, :S]
    assert torch.equal(mask.dense(T, S), want)
    assert mask.count(T, S) == want.sum()
    assert mask.grain == (mask & masks.causal()).grain == block
    layout = masks.BlockLayout.from_blocks(tiles, T, S, block)
    assert torch.equal(masks.chosen(layout).dense(T, S), want)
    for both, allowed in ((mask, want), (mask & masks.causal(), want & masks.causal().dense(T, S))):
        for cut in (block, (16, 16), (5, 33)):
            got = both.layout(T, S, block=cut)
            padded = torch.nn.functional.pad(allowed, (0, -S % cut[1], 0, -T % cut[0]))
            blocks = padded.unflatten(3, (-1, cut[1])).unflatten(2, (-1, cut[0]))
            assert torch.equal(got.to_dense_blocks(), blocks.any(-1).any(3))
            assert mask.density(T, S) == pytest.approx(want.double().mean().item())


def test_chosen_refuses_what_does_not_fit() -> None:
    tiles = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"chosen: tiles must be \(B, H, 4, 4\) for T=50, S=50"):
        masks.chosen(tiles, 50, 50, 16)
    with pytest.raises(ValueError, match="need their T, S and block"):
        masks.chosen(tiles)


def test_positions_restart_with_each_document():
    assert masks.packed(CU).positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert masks.packed(torch.tensor([0, 0, 3, 3, 4], dtype=torch.int32)).positions.tolist() == [0, 1, 2, 0]
    several = masks.tensors.unpacked(masks.packed([CU, torch.tensor([0, 2])]))[0]
    assert several.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert several.places(10)[0].tolist()[8:] == [0, 1], "what is in no document is one more"
    assert masks.packed(torch.tensor([0])).positions.tolist() == []


def test_one_packing_a_row():
    twice = masks.packed(CU) & masks.packed(CU)
    with pytest.raises(ValueError, match="packed twice"):
        masks.tensors.unpacked(twice)

"""FlexAttention's masks as masks and back: pairs, blocks, and what is kept of functions that read tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import regard
from regard import masks
from regard.kernels import block_sparse
from regard.kernels.native import build
from regard.laws.agreement import close

VECTORS = np.load(Path(__file__).parent.parent / "vectors" / "B034.npz")
CASES = ["alibi", "document", "window_or_sink", "empty", "prefix"]


def mask_mod(case: str):
    ids = torch.tensor(VECTORS["document_document"])
    return {
        "alibi": lambda b, h, q, k: q >= k,
        "document": lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k),
        "window_or_sink": lambda b, h, q, k: (q >= k) & ((q - k < 4) | (k < 2)),
        "empty": lambda b, h, q, k: k < q - 2,
        "prefix": lambda b, h, q, k: (q >= k) | (k < 5),
    }[case]


def listed(count: Tensor, columns: Tensor) -> list[list[int]]:
    """The columns that are listed, row by row."""
    rows = columns.reshape(-1, columns.shape[-1])
    return [row[:n].tolist() for n, row in zip(count.flatten().tolist(), rows, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_torchs(case: str) -> None:
    """Golden lists, partial and full, of every head; and the layout of the mask made of them is the layout we make."""
    want = {n: torch.tensor(VECTORS[f"{case}_{n}"]) for n in ("mask", "kv_num_blocks", "kv_indices")}
    full = [torch.tensor(VECTORS[f"{case}_full_{n}"]) for n in ("kv_num_blocks", "kv_indices")]
    (T, S), block = want["mask"].shape[2:], tuple(VECTORS[f"{case}_block"].tolist())
    mask = masks.from_mask_mod(mask_mod(case), T, S)
    assert torch.equal(mask.dense(T, S).expand_as(want["mask"]), want["mask"])
    made = mask.block_mask(T, S, block=block)
    assert isinstance(made, BlockMask)
    many = want["mask"].shape[0] * want["mask"].shape[1]
    assert listed(made.kv_num_blocks, made.kv_indices) * many == listed(want["kv_num_blocks"], want["kv_indices"])
    assert listed(made.full_kv_num_blocks, made.full_kv_indices) * many == listed(*full)
    back = masks.from_block_mask(made)
    assert torch.equal(back.dense(T, S).expand_as(want["mask"]), want["mask"])
    for size in (block, 3, 8):
        theirs, ours = (m.layout(T, S, block=size) for m in (back, mask))
        assert torch.equal(theirs.to_dense_blocks(), ours.to_dense_blocks())
        assert torch.equal(theirs.to_dense_full(), ours.to_dense_full())


@pytest.mark.parametrize("case", CASES)
def test_attention_over_a_block_mask_is_golden(case: str) -> None:
    q, k, v, want = (torch.tensor(VECTORS[f"{case}_{name}"]) for name in ("q", "k", "v", "y"))
    blocks = create_block_mask(mask_mod(case), None, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=4)
    mod = None
    if case == "alibi":
        mod = lambda score, b, h, i, j: score + torch.tensor(VECTORS["alibi_slopes"])[h] * (j - i)  # noqa: E731
    for kernel in ("eager", "chunked", "block_sparse"):
        close(regard.attention(q, k, v, mask=masks.from_block_mask(blocks), score_mix=mod, kernel=kernel), want)


def test_blocks_decide_before_the_function_does() -> None:
    """Full blocks are not asked about, absent ones are skipped; what stands behind the listed counts for nothing."""
    count, columns = torch.tensor([[[1, 1]]]), torch.tensor([[[[1, 0], [1, 1]]]])
    made = BlockMask.from_kv_blocks(
        count, columns, torch.tensor([[[0, 1]]]), torch.tensor([[[[0, 0], [0, 0]]]]), (2, 3), lambda b, h, q, k: k > 3
    )
    want = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2 + [[1, 1, 1, 0, 1, 1]] * 2).bool()
    assert torch.equal(masks.from_block_mask(made).dense(4, 6)[0, 0], want)


def test_batch_rows_and_heads() -> None:
    table = torch.rand(2, 3, 9, 11) > 0.5
    for rule in (lambda b, h, q, k: table[b, h, q, k], lambda b, h, q, k: table[b][h][q, k]):
        made = create_block_mask(lambda b, h, q, k: table[b, h, q, k], 2, 3, 9, 11, device="cpu", BLOCK_SIZE=4)
        for mask in (masks.from_block_mask(made), masks.from_mask_mod(rule, 9, 11, batch=2, heads=3)):
            assert (mask.batch, mask.heads) == (2, 3)
            assert torch.equal(mask.dense(9, 11), table)
            assert torch.equal(mask.block_mask(9, 11, block=4).to_dense(), made.to_dense())
        with pytest.raises(ValueError, match="batch is missing"):
            masks.from_mask_mod(rule, 9, 11)


def test_a_plain_function_is_a_predicate() -> None:
    """Its positions count from the first key; batch rows and heads are those of the call, if it reads them."""
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    table = torch.rand(2, 3, 7, 7) > 0.3
    table[..., 0] = True
    for rule in (lambda b, h, i, j: table[b, h, i, j], lambda b, h, i, j: table[b][h][i, j]):
        for kernel in ("auto", "block_sparse"):
            got = regard.attention(q, k, v, mask=rule, kernel=kernel)
            torch.testing.assert_close(got, regard.attention(q, k, v, mask=table[:, :, 2:]))
    causal = regard.attention(q, k, v, mask=masks.causal())
    torch.testing.assert_close(regard.attention(q, k, v, mask=lambda b, h, i, j: j <= i), causal)
    layer = regard.Attention(12, 3, mask=lambda b, h, i, j: (j <= i) & (i - j < 2 + h))
    assert layer.mask.heads == 3
    x = torch.randn(2, 7, 12)
    by_head = masks.per_head([masks.causal() & masks.window(n) for n in (2, 3, 4)])
    bare = regard.Attention(12, 3)
    bare.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), bare(x, mask=by_head))
    assert (layer(x, mask=lambda b, h, i, j: j > 0) - layer(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="batch is missing"):
        regard.Attention(12, 3, mask=lambda b, h, i, j: i > j + b)


@pytest.mark.parametrize("kernel", ["auto", "native", "block_sparse", "sdpa", "chunked", "eager", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_a_function_reads_counts_as_it_is_now(kernel: str) -> None:
    """Its table ends where the keys end, is written into, and is another one later; the function stays the same."""
    if kernel == "native" and build.why_not():
        pytest.skip("no C++ kernels here")
    N = 300
    held = {"ids": torch.arange(N) // 100}
    q = torch.randn(1, 2, N, 8)
    rule = lambda b, h, i, j: (held["ids"][i] == held["ids"][j]) & (j <= i)  # noqa: E731

    def agree() -> None:
        got = regard.attention(q, q, q, mask=rule, kernel=kernel)
        want = regard.attention(q, q, q, mask=masks.causal() & masks.documents(held["ids"].clone()), kernel="eager")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    agree()
    near = masks.predicate(rule) & masks.causal() & masks.window(20)
    want = regard.attention(q, q, q, mask=near, kernel="eager")
    for name in regard.plan(q, q, q, mask=near).costs:
        torch.testing.assert_close(regard.attention(q, q, q, mask=near, kernel=name), want, rtol=0, atol=1e-5)
    held["ids"].copy_(torch.arange(N) // 7)
    agree()
    held["ids"] = torch.arange(N) // 150
    agree()


def test_layouts_of_functions_are_kept() -> None:
    asked = []
    ids = torch.arange(600) // 100

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        asked.append(max(i.numel(), j.numel()))
        return ids[i] == ids[j]

    mask = masks.predicate(rule)
    first = block_sparse._layout(mask, 600, 600, (128, 128))
    assert max(asked) > 1000
    asked.clear()
    assert block_sparse._layout(masks.predicate(rule), 600, 600, (128, 128)) is first
    assert max(asked) <= 4
    ids[0] = 3
    assert block_sparse._layout(mask, 600, 600, (128, 128)) is not first


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="from_block_mask: block_mask has the wrong type"):
        masks.from_block_mask(torch.ones(3, 3))
    with pytest.raises(TypeError, match="predicate: function must be callable"):
        masks.from_mask_mod(3, 5, 5)
    with pytest.raises(ValueError, match="from_mask_mod: T"):
        masks.from_mask_mod(lambda b, h, q, k: q >= k, -1)
    with pytest.raises(ValueError, match="predicate: function can't be asked about many pairs"):
        masks.from_mask_mod(lambda b, h, q, k: q >= k if q > 2 else q > k, 5).dense(5)
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(TypeError, match=r"block_mask.*from_block_mask"):
        regard.attention(q, q, q, block_mask=masks.causal().block_mask(5))
    with pytest.raises(TypeError, match="mask has the wrong type"):
        regard.attention(q, q, q, mask=lambda i: i)

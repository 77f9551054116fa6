"""What is kept of a mask with tensors goes when the tensors change, whoever changes them, and serves equal masks."""

import gc

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import KERNELS
from regard.masks import Mask
from regard.masks.content import remembered

N = 600


def changes() -> dict[str, tuple]:
    """The tensor, the mask that holds it, and what is written into it."""
    half = torch.arange(N) < N // 2
    tiles = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    few = torch.eye(5, dtype=torch.bool)[None, None]
    return {
        "padding": (torch.ones(1, N, dtype=torch.bool), masks.padding, half[None]),
        "documents": ((torch.arange(N) // 100)[None], masks.documents, (torch.arange(N).flip(0) // 50)[None]),
        "chosen": (tiles, lambda t: masks.chosen(t, N, N, 128), few),
        "dense": (torch.ones(N, N, dtype=torch.bool), masks.dense, half[None] & half[:, None]),
        "lengths": (torch.tensor([N]), lambda t: masks.padding(lengths=t), torch.tensor([N // 3])),
        "joined": (torch.ones(1, N, dtype=torch.bool), lambda t: masks.causal() & ~masks.padding(t), half[None]),
    }


@pytest.mark.parametrize("kernel", ["auto", "native", "block_sparse", "sdpa", "chunked", "eager"])
@pytest.mark.parametrize("case", list(changes()))
def test_what_is_written_into_a_mask_counts(case: str, kernel: str) -> None:
    tensor, make, after = changes()[case]
    mask = make(tensor)
    q = torch.randn(1, 2, N, 8, generator=torch.Generator().manual_seed(0))
    if kernel != "auto" and regard.plan(q, q, q, mask=mask).why_not.get(kernel, [""])[0].startswith("no C++"):
        pytest.skip("no C++ kernels here")
    before = regard.attention(q, q, q, mask=mask, kernel=kernel)
    count = mask.count(N)
    tensor.copy_(after)
    assert mask.count(N) == int(mask.dense(N).sum()) != count
    got = regard.attention(q, q, q, mask=mask, kernel=kernel)
    want = regard.attention(q, q, q, mask=make(after.clone()), kernel="eager")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (got - before).abs().max() > 0.1


def counting() -> tuple:
    """A function of masks that is remembered, and the masks that it was really asked about."""
    asked: list[Mask] = []

    @remembered(4)
    def count(mask: Mask, T: int) -> int:
        asked.append(mask)
        return mask.count(T)

    return count, asked


def test_masks_of_the_same_tensors_are_one() -> None:
    count, asked = counting()
    keep = torch.arange(12) < torch.tensor([[7]])
    assert [count(masks.padding(keep) & masks.causal(), 12) for _ in range(3)] == [63] * 3
    assert count.knows(masks.padding(keep) & masks.causal(), 12)
    assert len(asked) == 1
    assert count(masks.padding(keep) & masks.causal(), 10) == 49
    assert count(masks.padding(keep), 12) == 84
    assert len(asked) == 3
    keep[0, 0] = False
    assert not count.knows(masks.padding(keep) & masks.causal(), 12)
    assert count(masks.padding(keep) & masks.causal(), 12) == 51


def test_views_of_one_memory_are_told_apart() -> None:
    count, _ = counting()
    keep = torch.arange(24) < 7
    assert count(masks.padding(keep[None, :12]), 12) == 84
    assert count(masks.padding(keep[None, 12:]), 12) == 0
    assert count(masks.padding(keep[None, ::2]), 12) == 48


def test_memory_that_is_freed_and_used_again_is_another_mask() -> None:
    count, asked = counting()
    for n in range(1, 40):
        keep = torch.arange(64) < n  # the allocator hands out the same address again
        assert count(masks.padding(keep[None]), 64) == 64 * n
        del keep
        gc.collect()
    assert len(asked) == 39
    assert len(count.held) <= 4


@pytest.mark.parametrize("owner", ["numpy", "inference"])
def test_memory_whose_writes_torch_does_not_count_is_looked_at_each_time(owner: str) -> None:
    count, _ = counting()
    if owner == "numpy":
        array = np.ones((1, 12), dtype=bool)
        mask = masks.padding(torch.from_numpy(array))
        assert count(mask, 12) == 144
        array[0, 5:] = False
    else:
        with torch.inference_mode():
            keep = torch.ones(1, 12, dtype=torch.bool)
            mask = masks.padding(keep)
            assert count(mask, 12) == 144
            keep[0, 5:] = False
    assert count(mask, 12) == 60
    assert not count.knows(mask, 12)


def test_a_rule_in_code_is_known_by_its_function() -> None:
    count, asked = counting()

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < 3

    assert [count(masks.predicate(rule), 12) for _ in range(2)] == [36, 36]
    assert count(masks.predicate(lambda b, h, i, j: j < 4), 12) == 48
    assert len(asked) == 2


def test_every_kernel_that_takes_masks_is_tried_here() -> None:
    named = {"native", "block_sparse", "sdpa", "chunked", "eager"}
    special = {"few", "paged", "grouped", "listed", "window", "neighborhood", "triton", "flex", "decode"}
    assert set(KERNELS) == named | special

"""Queries that chose blocks for themselves: the parts put together are the whole."""

import pytest
import torch
from torch import Tensor

import regard
from kernels.test_native import agrees, problem, tensors
from regard import masks
from regard.kernels import grouped, native
from regard.kernels.native import build
from regard.masks import Mask
from regard.routing.moba import moba

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")


def picked(given: list[Tensor], block: int, share: float) -> Mask:
    """Any blocks, the own one or none at all included."""
    (B, H, T, _), S = given[0].shape, given[1].shape[2]
    tiles = torch.rand(B, H, T, -(-S // block), generator=torch.Generator().manual_seed(4)) < share
    return masks.chosen(tiles, T, S, (1, block))


SIZES = [(2, 4, 2, 300, 300, 16, 16), (1, 2, 2, 100, 333, 8, 24), (1, 2, 1, 333, 100, 8, 8), (1, 1, 1, 20, 20, 8, 8)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("block", [32, 64, 96])
def test_moba(sizes: tuple[int, ...], block: int) -> None:
    given = tensors(*sizes)
    mask = moba(given[0].detach(), given[1].detach(), block=block, topk=3)
    agrees(given, mask, kernel=grouped)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 1.0])
def test_any_choice(sizes: tuple[int, ...], share: float) -> None:
    given = tensors(*sizes)
    for mask in (picked(given, 32, share), masks.causal() & picked(given, 32, share)):
        agrees(given, mask, kernel=grouped)


def test_refusals() -> None:
    given = tensors(1, 2, 2, 70, 70, 8, 8)
    for mask in (None, masks.causal(), masks.window(9) & picked(given, 32, 0.4), picked(given, 8, 0.4)):
        assert any("every query chose" in reason for reason in grouped.why_not(problem(given, mask=mask)))
    alibi = problem(given, mask=picked(given, 32, 0.4), position=regard.positions.Alibi(2))
    assert any("Alibi" in reason for reason in grouped.why_not(alibi))


def test_plan_takes_it_for_moba() -> None:
    q = torch.randn(1, 2, 2048, 16, generator=torch.Generator().manual_seed(0))
    mask = moba(q, q, block=128, topk=3)
    assert regard.plan(q, q, q, mask=mask).kernel == "grouped"
    torch.testing.assert_close(
        regard.attention(q, q, q, mask=mask), native.run(problem([q, q, q], mask=mask)), atol=1e-5, rtol=1e-5
    )

"""Axes in blocks, as they are and exported: one graph whose outputs and final states are right at any length."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from regard.kernels.blocks import among, from_blocks, greatest, in_blocks
from regard.kernels.linear_scan import linear_scan
from regard.mixers.exponential import exponential_sum, lags

LENGTHS = (2, 7, 63, 64, 65, 128, 200)


class Calls(nn.Module):
    """A function as a module, which is what torch.export takes."""

    def __init__(self, f: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.f(x)


def right_at_any_length(f: Callable[[Tensor], tuple[Tensor, ...]], *, strict: bool = False) -> None:
    free = ({1: torch.export.Dim("T", min=2)},)
    exported = torch.export.export(Calls(f), (draw(12),), dynamic_shapes=free, strict=strict).module()
    for T in LENGTHS:
        x = draw(T)
        torch.testing.assert_close(exported(x), f(x))


def draw(T: int) -> Tensor:
    return torch.randn(2, T, 6, generator=torch.Generator().manual_seed(T), dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2])
def test_blocks_hold_the_tokens_in_order_and_zeros_behind(dim: int) -> None:
    x = draw(10).movedim(1, dim)
    cut = in_blocks(x, 4, dim)
    assert cut.shape[dim : dim + 2] == (3, 4)
    assert torch.equal(from_blocks(cut, 10, dim), x)
    assert not cut.select(dim, 2).narrow(dim, 2, 2).any()


def test_blocks_are_exported() -> None:
    right_at_any_length(lambda x: (from_blocks(in_blocks(x, 8, 1).cumsum(2), x.shape[1], 1),))


def test_the_greatest_are_exported() -> None:
    right_at_any_length(lambda x: (greatest(x.mT, 5).values[..., :2], among(x.mT, 5)))


def test_fewer_than_k_are_all_among_the_greatest() -> None:
    assert among(draw(3).mT, 5).all()


@pytest.mark.parametrize(
    "decay", ["head", *(pytest.param(d, marks=pytest.mark.slow) for d in ("none", "token", "feature"))]
)
def test_linear_scans_are_exported_with_their_states(decay: str) -> None:
    def scan(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x[:, None].expand(-1, 3, -1, -1)
        g = {"none": None, "head": -z.new_tensor([0.0, 0.1, 2.0]), "token": -z[..., 0].abs(), "feature": -z.abs()}[
            decay
        ]
        return linear_scan(z, z.flip(-1), z[..., :4], g, state=z.new_ones(2, 3, 6, 4))

    right_at_any_length(scan)


@pytest.mark.slow
def test_exports_that_read_the_code_are_right_too() -> None:
    right_at_any_length(lambda x: tuple(linear_scan(*(x[:, None],) * 3)), strict=True)


@pytest.mark.parametrize("turning", [pytest.param(False, marks=pytest.mark.slow), True])
def test_exponential_sums_are_exported_with_their_states(turning: bool) -> None:
    def total(x: Tensor) -> tuple[Tensor, ...]:
        decay = torch.linspace(0.1, 0.99, 12, dtype=torch.float64, device=x.device).view(6, 2)
        decay = decay * torch.exp(1j * decay) if turning else decay
        out, state = exponential_sum(x, decay[..., None] ** lags(x), decay + 1, decay.new_ones(2, 6, 2))
        return out, torch.view_as_real(state) if turning else state

    right_at_any_length(total)


def test_of_equals_the_first_are_chosen_however_long_the_row_is() -> None:
    for n in (5, 30, 33, 300):
        z = torch.zeros(2, n).index_fill(1, torch.tensor([2]), 1.0).index_fill(1, torch.tensor([0]), float("nan"))
        assert among(z, 4).nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 2
    assert among(torch.zeros(2, 3), 4).all()
    assert among(torch.full((1, 6), float("-inf")), 2).tolist() == [[True] * 2 + [False] * 4]

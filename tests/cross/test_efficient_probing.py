"""Efficient probing against loops over queries and tokens, and the authors' numbers (A157)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from cross.naive_efficient_probing import naive_efficient_probing
from regard.cross.efficient_probing import EfficientProbing, efficient_probing
from regard.laws.agreement import close, close_all, run

VECTORS = Path(__file__).parents[1] / "vectors" / "A157.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", "ab")
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    x, q = z["x"].requires_grad_(), z["q"].requires_grad_()
    out = efficient_probing(x, q, z["Wv"], z.get("bv"))
    close(out.detach(), z["out"])
    for got, want in zip(torch.autograd.grad((out * z["w"]).sum(), (x, q)), (z["grad_x"], z["grad_q"]), strict=True):
        close(got, want)


class Naive(nn.Module):
    """The loops, with the layer's parameters under the same names."""

    def __init__(self, layer: EfficientProbing) -> None:
        super().__init__()
        self.queries, self.v_proj = layer.queries, layer.v_proj

    def forward(self, x: Tensor) -> Tensor:
        return naive_efficient_probing(x, self.queries, self.v_proj.weight, self.v_proj.bias)


@pytest.mark.parametrize(
    ("T", "M", "Q", "reduction", "bias"), [(1, 4, 2, 1, True), (5, 12, 3, 2, False), (7, 6, 1, 3, True)]
)
def test_equals_the_loops(T: int, M: int, Q: int, reduction: int, bias: bool) -> None:
    layer = EfficientProbing(M, Q, reduction=reduction, bias=bias).double()
    nn.init.normal_(layer.queries)
    x = normal(T, 2, T, M)
    close_all(run(layer, x), run(Naive(layer), x))


def test_one_zero_query_takes_the_mean() -> None:
    layer = EfficientProbing(6, 1).double()
    nn.init.zeros_(layer.queries)
    nn.init.eye_(layer.v_proj.weight)
    x = normal(1, 2, 5, 6)
    close(layer(x), x.mean(1))


def test_a_query_along_a_token_finds_it() -> None:
    x = torch.eye(4, dtype=torch.float64)[None]
    queries = 500 * torch.eye(4, dtype=torch.float64)[[2]]
    close(efficient_probing(x, queries, torch.eye(4, dtype=torch.float64)), x[:, 2])


def test_order_is_free_and_padding_is_as_if_absent() -> None:
    layer, x = EfficientProbing(6, 3, bias=True).double(), normal(2, 2, 5, 6)
    close(layer(x.flip(1)), layer(x))
    padded = torch.cat([x, torch.full((2, 2, 6), torch.nan, dtype=torch.float64)], 1)
    keep = (torch.arange(7) < 5).expand(2, 7)
    for mask in (keep, regard.masks.padding(keep)):
        close_all(
            {k: v[:, :5] if k == "input0" else v for k, v in run(layer, padded, mask=mask).items()}, run(layer, x)
        )
    assert not layer(x, mask=torch.zeros(2, 5, dtype=torch.bool)).any()


def test_nan_reaches_its_own_sample_only() -> None:
    layer, x = EfficientProbing(6, 3).double(), normal(3, 2, 5, 6)
    x[0, 1, 2] = torch.inf
    out = layer(x)
    assert out[0].isnan().all()
    close(out[1:], layer(x[1:]))


def test_fewer_parameters_with_a_reduction() -> None:
    M, Q = 64, 8
    layer = EfficientProbing(M, Q, reduction=2)
    assert sum(p.numel() for p in layer.parameters()) == Q * M + M * M // 2


def test_work_grows_with_queries_not_with_the_width_of_values() -> None:
    """Pooling comes first: T tokens cost 2 T M Q multiply-adds, and the values M^2 once.

    Multi-head pooling projects every key and value: more than 2 T M^2, with 4 M^2 parameters.
    """
    from torch.utils.flop_counter import FlopCounterMode

    B, T, M, Q = 2, 50, 32, 4
    layer = EfficientProbing(M, Q)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(B, T, M))
    assert counter.get_total_flops() == 2 * B * (2 * T * M * Q + M * M) < 2 * B * 2 * T * M * M
    assert sum(p.numel() for p in layer.parameters()) == Q * M + M * M < 4 * M * M


def test_queries_are_as_many_as_heads_unless_said() -> None:
    assert EfficientProbing(64).queries.shape == (32, 64)  # the authors' number
    assert regard.create("efficient_probing", dim=64, num_heads=4).queries.shape == (4, 64)
    assert regard.create("efficient_probing", dim=64, num_heads=4, num_queries=32).queries.shape == (32, 64)


def test_bad_sizes_raise() -> None:
    with pytest.raises(ValueError, match=r"dim is no multiple of num_queries \* reduction = 4 \(got 10\)"):
        EfficientProbing(10, 4)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 8\)\); expected \(B, T, M = 12\)"):
        EfficientProbing(12, 4)(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="causal"):
        regard.create("efficient_probing", dim=12, num_heads=4, causal=True)

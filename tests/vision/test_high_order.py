"""High-order attention against loops over places, and the authors' numbers (A133)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.laws.agreement import close
from regard.vision import HighOrderAttention, MixedHighOrder
from vision.naive_high_order import high_order_attention, inner_width, mixed_high_order, parameter_count
from vision.shared import filled, gradients, leaves, normal, vectors


def rows(layer: HighOrderAttention) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The matrices as the loops take them, those of an order in a list."""
    inward = list(layer.inward)
    return [[inward.pop(0) for _ in range(r)] for r in range(1, layer.order + 1)], list(layer.outward)


@pytest.mark.parametrize(
    ("dim", "options", "sizes"),
    [
        (8, {}, (2, 3)),
        (8, {"order": 3, "inner_dim": 3}, (1, 2)),
        (9, {"order": 1}, (2, 2)),
        (3, {"inner_dim": 1}, (1, 1)),
    ],
)
def test_equals_the_loops(dim: int, options: dict, sizes: tuple[int, int]) -> None:
    layer = filled(HighOrderAttention(dim, **options))
    (x,) = leaves(1.5 * normal(1, 2, dim, *sizes))
    got, want = layer(x), high_order_attention(x, *rows(layer))
    close(got, want)
    for g, w in zip(gradients(got, [x, *layer.parameters()]), gradients(want, [x, *layer.parameters()]), strict=True):
        close(g, w)


def test_orders_are_stacked_one_after_the_other_and_share_nothing() -> None:
    layer = filled(MixedHighOrder(8, orders=3))
    x = normal(1, 2, 8, 2, 2)
    close(layer(x), mixed_high_order(x, [rows(gate) for gate in layer.gates]))
    assert layer(x).shape == (6, 8, 2, 2)
    numbers = [sum(p.numel() for p in gate.parameters()) for gate in layer.gates]
    assert numbers == [parameter_count(8, r) for r in (1, 2, 3)]
    assert HighOrderAttention(20).inward.shape[1] == inner_width(20) == 4


@pytest.mark.parametrize("order", [1, 2, 3])
def test_gives_the_authors_numbers(order: int) -> None:
    z = vectors("A133", f"hoa{order}")
    layer = HighOrderAttention(8, order=order).double()
    places = [(r, i) for r in range(1, order + 1) for i in range(1, r + 1)]
    with torch.no_grad():
        for n, (r, i) in enumerate(places):
            layer.inward[n] = z[f"p_order{order}_{r}_{i}.0.weight"].flatten(1)
        for r in range(order):
            layer.outward[r] = z[f"p_convb{order}_{r + 1}.0.weight"].flatten(1)
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    gx, inward, outward = torch.autograd.grad((out * z["w"]).sum(), (x, layer.inward, layer.outward))
    close(gx, z["gx"])
    checked = 0
    for n, (r, i) in enumerate(places):
        if (name := f"g_order{order}_{r}_{i}.0.weight") in z:
            close(inward[n], z[name].flatten(1))
            checked += 1
    close(outward[0], z[f"g_convb{order}_1.0.weight"].flatten(1))
    assert checked >= 1


def test_products_grow_with_their_order_and_one_order_is_a_gate_of_two_layers() -> None:
    one, two = (filled(HighOrderAttention(8, order=r)) for r in (1, 2))
    x = 0.3 * normal(1, 1, 8, 2, 2)
    z = torch.einsum("ic,bcyx->biyx", one.inward[0], x)
    close(one(x), x * torch.einsum("ci,biyx->bcyx", one.outward[0], F.relu(z)).sigmoid())
    with torch.no_grad():
        two.outward[0].zero_()  # the first order's gate is 1/2 then
    odds = [torch.logit(2 * two.gate(s * x) - 0.5) for s in (1.0, 3.0)]
    close(odds[1], 9 * odds[0])


@torch.no_grad()
def test_opens_where_two_channels_agree() -> None:
    """The sign of x_0 x_1, which no gate of the first order follows."""
    layer = filled(HighOrderAttention(8, order=2))
    for weight in (layer.inward, layer.outward):
        weight.zero_()
    layer.inward[1, :, 0] = torch.tensor([1.0, -1.0])
    layer.inward[2, :, 1] = 1.0
    layer.outward[1] = torch.tensor([1e4, -1e4])
    x = normal(1, 4, 8, 6, 6)
    x[:, 2] = 1
    gate = layer(x)[:, 2]
    agree = x[:, 0] * x[:, 1] > 0
    assert (gate[agree] > 0.7).all()
    assert (gate[~agree] < 0.3).all()


def accuracy(order: int) -> float:
    """Of a gate that learns to tell it, in 300 steps."""
    torch.manual_seed(0)
    layer = HighOrderAttention(8, order=order)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(number, 8, 1, 1)
        agree = (x[:, 0] * x[:, 1] > 0).float()
        x[:, 7] = 1
        return agree, layer(x)[:, 7]

    for _ in range(300):
        agree, gate = batch(64)
        optimizer.zero_grad()
        (gate - agree).square().mean().backward()
        optimizer.step()
    agree, gate = batch(2000)
    return float(((gate > 0.5) == (agree > 0.5)).float().mean())


def test_the_second_order_learns_what_the_first_cannot() -> None:
    first, second = accuracy(1), accuracy(2)
    assert first < 0.8 < 0.85 < second


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"dim leaves no inner width \(got 6\); expected 8 at least, or an inner_dim"):
        HighOrderAttention(6)
    with pytest.raises(ValueError, match=r"order is too small \(got 0\)"):
        HighOrderAttention(8, order=0)
    with pytest.raises(ValueError, match=r"orders is too small \(got 0\)"):
        MixedHighOrder(8, orders=0)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, Y, X\)"):
        HighOrderAttention(8)(torch.zeros(1, 7, 2, 2))
    for shape in ((0, 8, 2, 2),):
        assert HighOrderAttention(8)(torch.zeros(shape)).shape == shape

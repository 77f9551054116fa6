"""Large kernel attention against loops over pixels, and the authors' code (A072)."""

import pytest
import torch

from laws.measured import flops
from regard.laws.agreement import close, same
from regard.vision import LargeKernelAttention, VANAttention, large_kernel_attention
from vision.naive_large_kernel import naive_large_kernel, naive_van_attention
from vision.shared import filled, gradients, leaves, normal, vectors


@pytest.mark.parametrize(
    ("near", "far", "dilation", "sizes"), [(5, 7, 3, (4, 5)), (3, 3, 2, (6, 3)), (1, 3, 1, (2, 7)), (3, 1, 2, (1, 1))]
)
def test_equals_the_loops(near: int, far: int, dilation: int, sizes: tuple[int, int]) -> None:
    C = 3
    shapes = ((2, C, *sizes), (C, 1, near, near), (C,), (C, 1, far, far), (C,), (C, C, 1, 1), (C,))
    x, *p = leaves(*(normal(n, *shape) for n, shape in enumerate(shapes)))
    got = large_kernel_attention(x, (p[0], p[1]), (p[2], p[3]), (p[4], p[5]), dilation=dilation)
    want = naive_large_kernel(x, *p, dilation=dilation)
    close(got, want)
    for g, w in zip(gradients(got, [x, *p]), gradients(want, [x, *p]), strict=True):
        close(g, w)


def test_layers_equal_the_loops() -> None:
    layer = filled(VANAttention(2, kernel=5, dilation=2))
    x = normal(1, 1, 2, 4, 3)
    a = layer.attention
    p = [z for c in (layer.in_proj, a.near, a.far, a.mix, layer.out_proj) for z in (c.weight, c.bias)]
    close(layer(x), naive_van_attention(x, *p, dilation=2))
    close(a(x), naive_large_kernel(x, *p[2:8], dilation=2))


@pytest.mark.parametrize("case", ["lka", "att"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("A072", case)
    layer = (LargeKernelAttention if case == "lka" else VANAttention)(z["x"].shape[1]).double()
    names = {"conv0": "near", "conv_spatial": "far", "conv1": "mix", "proj_1": "in_proj", "proj_2": "out_proj"}
    names["spatial_gating_unit"] = "attention"
    given = {k.removeprefix("p_"): v for k, v in z.items() if k.startswith("p_")}
    layer.load_state_dict({".".join(names.get(part, part) for part in k.split(".")): v for k, v in given.items()})
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


def test_reach_is_that_of_a_large_kernel() -> None:
    """K = 21 as 5 x 5 and 7 x 7 with dilation 3 reaches 2 + 9 = 11 pixels to each side; the cost is that of 74."""
    layer = filled(LargeKernelAttention(2))
    (x,) = leaves(normal(3, 1, 2, 25, 25))
    a = layer(x) / x
    seen = torch.autograd.grad(a[0, 0, 12, 12], x)[0].ne(0).any(1)[0]
    far = (torch.arange(25) - 12).abs() <= 11
    same(seen, far[:, None] & far)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (25 + 49) + 2 * 2 + 3 * 2


def test_cost_is_linear_in_pixels() -> None:
    layer = filled(LargeKernelAttention(4))
    small, large = normal(0, 1, 4, 8, 8), normal(0, 1, 4, 16, 32)
    assert flops(lambda: layer(large)) == 8 * flops(lambda: layer(small)) > 0


def test_map_is_neither_softmax_nor_sigmoid() -> None:
    """Without biases, twice the input is four times the output, and the map takes any sign."""
    layer = filled(LargeKernelAttention(3, kernel=5, dilation=2))
    for conv in (layer.near, layer.far, layer.mix):
        torch.nn.init.zeros_(conv.bias)
    x = normal(4, 1, 3, 5, 5)
    close(layer(2 * x), 4 * layer(x))
    a = layer(x) / x
    assert a.min() < 0
    assert a.max() > 1


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"kernel gives an even far convolution \(got 6, .* of 2\); expected an odd one"
    ):
        LargeKernelAttention(4, kernel=6, dilation=3)
    with pytest.raises(ValueError, match=r"dilation is too small \(got 0\)"):
        LargeKernelAttention(4, kernel=3, dilation=0)
    with pytest.raises(ValueError, match=r"kernel is too small \(got 2\); expected an int >= 3"):
        LargeKernelAttention(4, kernel=2)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 4, Y, X\)"):
        LargeKernelAttention(4)(normal(0, 2, 3, 5, 5))

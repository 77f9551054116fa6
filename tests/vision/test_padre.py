"""PADRe on maps against loops, whose author has read neither code nor test, and what makes it a polynomial."""

import pytest
import torch
from torch import Tensor

import regard
from regard.kernels.flops import FlopCounter
from regard.laws.agreement import close, same
from regard.vision.padre import PolynomialMixer, polynomial_recursion
from vision import naive_padre as naive
from vision.shared import filled, gradients, leaves, normal

C = 4


def built(**options) -> PolynomialMixer:
    return filled(regard.create("padre", dim=C, num_heads=1, **{"kernel_size": 3, **options}))


def maps(parts) -> list[tuple[Tensor, ...]]:
    return [(pw.weight[..., 0, 0], pw.bias, dw.weight[:, 0], dw.bias) for pw, dw in parts]


def loops(layer: PolynomialMixer, x: Tensor) -> Tensor:
    out = None if layer.o_proj is None else (layer.o_proj.weight[..., 0, 0], layer.o_proj.bias)
    return naive.polynomial_mixer(x, maps(layer.first), maps(layer.between), out)


@pytest.mark.parametrize(
    "options",
    [{}, {"degree": 1}, {"degree": 2, "bias": False}, {"out_proj": True, "degree": 2}, {"kernel_size": 5, "degree": 2}],
)
def test_is_the_definition(options: dict) -> None:
    layer, (x,) = built(**options), leaves(normal(1, 2, C, 3, 4))
    got, want = layer(x), loops(layer, x)
    close(got, want)
    for mine, theirs in zip(*(gradients(y, [x, *layer.parameters()]) for y in (got, want)), strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_is_homogeneous_without_biases(degree: int) -> None:
    layer, x = built(degree=degree, bias=False), normal(1, 2, C, 5, 6)
    same(layer(2 * x), 2**degree * layer(x))
    assert layer(x).abs().max() > 0.01


def test_is_a_polynomial_with_biases() -> None:
    """Along a line its differences of order d + 1 are 0, those of order d are not."""
    layer, x, step = built(), normal(1, 1, C, 3, 3), normal(2, 1, C, 3, 3)
    points = torch.stack([layer(x + n * step) for n in range(5)])
    assert points.diff(n=4, dim=0).abs().max() < 1e-10 * points.abs().max()
    assert points.diff(n=3, dim=0).abs().max() > 0.1


def test_cost_is_linear_in_pixels() -> None:
    layer, costs = built(kernel_size=11), []
    for Y in (8, 16):
        with FlopCounter() as counter:
            layer(normal(1, 1, C, Y, 8))
        costs.append(counter.get_total_flops())
    assert costs[1] == 2 * costs[0]


def test_the_recursion_takes_any_maps() -> None:
    """Full ones, which move what they like: one product of degree 2 tells whether two tokens are the same."""
    x, a = normal(1, 5, 3), normal(2, 5, 5)
    b = normal(3, 3, 3)
    full = naive.dense_map(x, a, b)
    close(a @ x @ b, full)
    ys = [a @ x @ b, x, x @ b]
    maps = [lambda z: a @ z, lambda z: z @ b]
    for got, want in zip(polynomial_recursion(ys, maps), naive.polynomial_recursion(ys, maps), strict=True):
        close(got, want)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[..., None]
    other = torch.tensor([[0.0, 1], [1, 0]])
    _, z = polynomial_recursion([other @ signs, signs], [lambda z: z])
    assert z[:, 0, 0].tolist() == [1, -1, -1, 1]


def test_bad_input() -> None:
    for wrong in ({"degree": 0}, {"kernel_size": 4}, {"kernel_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PolynomialMixer(C, **wrong)
    with pytest.raises(TypeError, match="bias has the wrong type"):
        PolynomialMixer(C, bias=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 4, Y, X\)"):
        built()(normal(1, 2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"polynomial_recursion: mix has the wrong length \(got 0\)"):
        polynomial_recursion([normal(1, 2, 2)] * 2, [])

"""MHDLSA against loops, whose author saw only the paper's account, and the authors' numbers (A199)."""

import pytest
import torch
from torch import Tensor

import regard
from laws.measured import flops, largest
from regard.laws.agreement import close
from regard.vision.dynamic_local import DynamicLocalAttention, dynamic_convolution
from vision import naive_dlgsanet as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def made(dim: int, seed: int = 0, **options) -> DynamicLocalAttention:
    return filled(regard.create("dynamic_local", dim=dim, num_heads=1, causal=False, **options), seed)


def weights(layer: DynamicLocalAttention) -> list[Tensor | None]:
    inner = [getattr(part, kind) for part in (layer.narrow, layer.near, layer.taps) for kind in ("weight", "bias")]
    return [layer.v_proj.weight, *inner, layer.o_proj.weight]


@pytest.mark.parametrize(
    ("dim", "sizes", "options"),
    [
        (4, (3, 4), {"kernel_size": 3, "group_channels": 2}),
        (4, (2, 6), {"kernel_size": 5, "group_channels": 4}),
        (6, (3, 3), {"kernel_size": 3, "group_channels": 1, "reduction": 2, "bias": False}),
        (2, (1, 1), {"kernel_size": 3, "group_channels": 2, "reduction": 1}),
    ],
)
def test_equals_the_loops(dim: int, sizes: tuple[int, int], options: dict) -> None:
    layer, (x,) = made(dim, **options), leaves(normal(1, 2, dim, *sizes))
    want = naive.mhdlsa(x, *weights(layer), options["group_channels"])
    got = layer(x)
    close(got, want)
    wanted = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)
    u = layer.v_proj(x)
    close(layer.kernels(x).flatten(1, 2), naive.dynamic_kernels(u, *weights(layer)[1:-1]))


NAMES = {"conv0": "v_proj", "conv1": "o_proj", "conv.conv1.0": "narrow", "conv.conv1.1": "near", "conv.conv2.0": "taps"}


@pytest.mark.parametrize(("case", "group_channels"), [("mhdlsa", 2), ("mhdlsa5", 3)])
def test_gives_the_authors_numbers(case: str, group_channels: int) -> None:
    z = vectors("A199", case)
    size = z["p_conv.conv1.1.weight"].shape[-1]
    layer = DynamicLocalAttention(z["x"].shape[1], kernel_size=size, group_channels=group_channels).double()
    given = {name[2:].rpartition("."): p for name, p in z.items() if name.startswith("p_")}
    layer.load_state_dict({f"{NAMES[part]}.{kind}": p for (part, _, kind), p in given.items()})
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    wanted = [x, layer.taps.weight, layer.narrow.weight]
    found = torch.autograd.grad((out * z["w"]).sum(), wanted)
    for got, name in zip(found, ("gx", "g_conv2", "g_conv1_0"), strict=True):
        close(got, z[name])


def test_is_quadratic_without_biases() -> None:
    layer, x = made(4, kernel_size=3, group_channels=2, bias=False), normal(1, 2, 4, 5, 6)
    close(layer(-3 * x), 9 * layer(x))
    close(layer.kernels(-3 * x), -3 * layer.kernels(x))
    assert (layer.kernels(x) < 0).any(), "nothing makes them positive"


def test_moves_with_the_map() -> None:
    layer, x = made(4, kernel_size=3, group_channels=2), normal(1, 1, 4, 9, 9)
    here, there = layer(x), layer(x.roll((1, 2), (2, 3)))
    close(there[..., 4:-2, 4:-2], here[..., 3:-3, 2:-4])
    x = x.requires_grad_()
    seen = torch.autograd.grad(layer(x)[0, :, 4, 4].sum(), x)[0].ne(0).any(1)[0]
    want = torch.zeros(9, 9, dtype=torch.bool)
    want[3:6, 3:6] = True
    assert torch.equal(seen, want)


def test_channels_of_a_group_share_a_kernel() -> None:
    values, kernels = normal(1, 1, 4, 3, 3), normal(2, 1, 2, 9, 3, 3)
    out = dynamic_convolution(values[:, [0, 0, 2, 2]], kernels)
    close(out[:, 0], out[:, 1])
    close(out[:, 2], out[:, 3])
    one = torch.zeros(1, 1, 9, 3, 3, dtype=torch.float64)
    one[:, :, 5] = 1  # the right neighbour
    close(dynamic_convolution(values, one), torch.nn.functional.pad(values[..., 1:], (0, 1)))


def test_cost_is_linear_in_pixels() -> None:
    layer = made(8, kernel_size=3, group_channels=4)
    small, large = normal(0, 1, 8, 8, 8), normal(0, 1, 8, 16, 32)
    assert flops(lambda: layer(large)) == 8 * flops(lambda: layer(small)) > 0


def test_neighbours_are_not_laid_out() -> None:
    values, kernels = torch.randn(1, 12, 16, 16), torch.randn(1, 1, 49, 16, 16)
    assert largest(lambda: dynamic_convolution(values, kernels)) <= 12 * 22 * 22


def test_starts_as_the_authors_do() -> None:
    layer = DynamicLocalAttention(60)
    assert layer.groups == 10
    inner = 60 * 15 + 15 + 15 * 49 + 15 + 15 * 490 + 490
    assert sum(p.numel() for p in layer.parameters()) == 2 * 60**2 + inner
    bound = 60**-0.5
    assert all(p.weight.abs().max() <= bound for p in (layer.v_proj, layer.o_proj, layer.narrow))


def test_bad_input() -> None:
    for options, said in (
        ({"kernel_size": 4}, r"kernel_size is even \(got 4\)"),
        ({"group_channels": 5}, r"dim is no multiple of group_channels = 5 \(got 12\)"),
        ({"reduction": 13}, r"reduction leaves no channel \(got 13\)"),
    ):
        with pytest.raises(ValueError, match=said):
            DynamicLocalAttention(12, **options)
    x = torch.zeros(2, 4, 3, 3)
    with pytest.raises(ValueError, match=r"kernels have no odd square of taps \(got 4\)"):
        dynamic_convolution(x, torch.zeros(2, 1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"values has channels that are no multiple of groups \(got 4\)"):
        dynamic_convolution(x, torch.zeros(2, 3, 9, 3, 3))
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 12, Y, X\)"):
        DynamicLocalAttention(12)(x)
    assert DynamicLocalAttention(12)(torch.zeros(0, 12, 3, 3)).shape == (0, 12, 3, 3)
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(1, 12, 0, 3\)\)"):
        DynamicLocalAttention(12)(torch.zeros(1, 12, 0, 3))

"""Residual attention against loops over channels and places, and numbers of the authors' layers (B185)."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.laws.agreement import close
from regard.vision import BottomUpTopDown, ResidualAttention, Unit, soft_mask
from vision.naive_residual_attention import (
    frozen_bn,
    golden_params,
    mask_logits,
    mask_values,
    residual_attention,
)
from vision.naive_residual_attention import (
    soft_mask as naive_soft_mask,
)
from vision.shared import filled, gradients, leaves, normal, vectors


def affine(norm: nn.BatchNorm2d) -> Tensor:
    if norm.training:
        return torch.stack([norm.weight, norm.bias])
    return frozen_bn(norm.weight, norm.bias, norm.running_mean, norm.running_var)


def unit(layer: Unit) -> tuple[Tensor, ...]:
    return tuple(z for norm, conv in zip(layer.norms, layer.convs, strict=True) for z in (affine(norm), conv.weight))


def branch(layer: BottomUpTopDown) -> dict:
    """Levels of the loops count from the top, those of the layer's way up from the bottom."""
    head = (z for norm, conv in zip(layer.norms, layer.linears, strict=True) for z in (affine(norm), conv.weight))
    return {
        "down": [[unit(u) for u in units] for units in layer.down],
        "bottom": [unit(u) for u in layer.bottom],
        "skip": [unit(units[0]) for units in layer.skip][::-1],
        "up": [[unit(u) for u in units] for units in layer.up][::-1],
        "head": tuple(head),
    }


def whole(layer: ResidualAttention) -> dict:
    parts = {} if layer.branch is None else branch(layer.branch)
    trunks = {"pre": [unit(u) for u in layer.pre], "trunk": [unit(u) for u in layer.trunk]}
    return {**trunks, **parts, "post": [unit(layer.post)]}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"depth": 2}, (6, 5)),
        ({"depth": 1, "pre": 2, "trunk": 1, "per_level": 2}, (3, 2)),
        ({"depth": 3, "bottleneck": 2}, (9, 11)),
        ({"depth": 1, "residual": False}, (4, 4)),
        ({"depth": 1, "mask": "none"}, (2, 3)),
    ],
)
def test_equals_the_loops(options: dict, sizes: tuple[int, int], training: bool) -> None:
    layer = filled(ResidualAttention(4, **options)).train(training)
    (x,) = leaves(normal(1, 2, 4, *sizes))
    variant = {key: options[key] for key in ("mask", "residual") if key in options}
    inputs = [x, *layer.parameters()]
    want = residual_attention(x, whole(layer), training=training, **variant)
    wanted = gradients(want, inputs)
    got = layer(x)
    close(got, want)
    for g, w in zip(gradients(got, inputs), wanted, strict=True):
        close(g, w)


@pytest.mark.parametrize("mask", ["sigmoid", "channel", "spatial"])
def test_kinds_of_masks(mask: str) -> None:
    layer = filled(ResidualAttention(4, depth=1, mask=mask))
    (x,) = leaves(normal(1, 2, 4, 4, 3))
    trunk, got = layer.parts(x)
    want = mask_values(mask_logits(layer.pre(x), branch(layer.branch)), mask, std_eps=1e-5)
    close(got, want)
    for g, w in zip(gradients(got, [x]), gradients(want, [x]), strict=True):
        close(g, w)
    for residual in (False, True):
        close(soft_mask(trunk, got, residual=residual), naive_soft_mask(trunk, got, residual))


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_gives_the_authors_layers_numbers(case: str) -> None:
    z = vectors("B185", case)
    params = golden_params({f"{case}_{key}": value for key, value in z.items()}, case)
    layer = ResidualAttention(8, depth={"A": 3, "B": 2, "C": 1}[case]).double().eval()
    fill(layer, params)
    (x,) = leaves(z["x"])
    trunk, mask = layer.parts(x)
    close(trunk, z["trunk"])
    close(mask, z["mask"])
    out = layer(x)
    close(out, z["out"])
    last = layer.branch.linears[1].weight
    gx, g = torch.autograd.grad((out * z["w"]).sum(), (x, last))
    close(gx, z["gx"])
    close(g, z["g_linear_2"])


@torch.no_grad()
def fill(layer: ResidualAttention, params: dict) -> None:
    """Norms are given as scale and shift: their running statistics say mean 0, and variance 1 but for eps."""

    def norm(part: nn.Module, given: Tensor) -> None:
        part.weight.copy_(given[0])
        part.bias.copy_(given[1])
        part.running_var.fill_(1 - part.eps)

    def unit(part: Unit, given: tuple[Tensor, ...]) -> None:
        for n in range(3):
            norm(part.norms[n], given[2 * n])
            part.convs[n].weight.copy_(given[2 * n + 1])

    tree = layer.branch
    pairs = [*zip(layer.pre, params["pre"], strict=True), *zip(layer.trunk, params["trunk"], strict=True)]
    pairs += [(layer.post, params["post"][0]), *zip(tree.bottom, params["bottom"], strict=True)]
    pairs += [(units[0], given[0]) for units, given in zip(tree.down, params["down"], strict=True)]
    pairs += [(units[0], given) for units, given in zip(tree.skip, params["skip"][::-1], strict=True)]
    pairs += [(units[0], given[0]) for units, given in zip(tree.up, params["up"][::-1], strict=True)]
    for part, given in pairs:
        unit(part, given)
    for n in range(2):
        norm(tree.norms[n], params["head"][2 * n])
        tree.linears[n].weight.copy_(params["head"][2 * n + 1])


@torch.no_grad()
def test_a_stack_keeps_what_plain_masks_shrink() -> None:
    """Ten modules whose units do nothing, so that what is left is their masks; a mask of 0 leaves the trunk."""
    x = normal(1, 1, 4, 4, 4).abs() + 0.1
    found = {}
    for residual in (False, True):
        y = x
        for seed in range(10):
            layer = filled(ResidualAttention(4, depth=1, residual=residual), seed)
            for part in layer.modules():
                if isinstance(part, Unit):
                    part.convs[-1].weight.zero_()
            y = layer(y)
        found[residual] = (y / x).abs()
    assert found[False].max() < 0.2
    assert found[True].min() > 1
    layer = filled(ResidualAttention(4, depth=1))
    layer.branch.norms[1].weight.zero_()
    layer.branch.norms[1].bias.fill_(1.0)
    layer.branch.linears[1].weight.fill_(-200.0)
    close(layer(x), layer.post(layer.trunk(layer.pre(x))))


def test_gradients_of_the_trunk_pass_the_mask() -> None:
    trunk, mask = leaves(normal(1, 2, 3), normal(2, 2, 3))
    close(torch.autograd.grad(soft_mask(trunk, mask).sum(), trunk)[0], 1 + mask)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_normalise_as_the_first_pass_did(reentrant: bool) -> None:
    found = []
    for again in (False, True):
        layer = filled(ResidualAttention(4, depth=1)).train()
        (x,) = leaves(normal(1, 2, 4, 4, 6))
        out = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_starts_as_he_et_al() -> None:
    torch.manual_seed(0)
    layer = ResidualAttention(64, depth=1)
    conv = layer.trunk[0].convs[1]
    assert float(conv.weight.std()) == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.05)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"mask is unknown \(got 'softmax'\)"):
        ResidualAttention(4, mask="softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim is no multiple of bottleneck = 4 \(got 6\)"):
        ResidualAttention(6)
    with pytest.raises(TypeError, match=r"residual has the wrong type \(got 1\); expected True or False"):
        ResidualAttention(4, residual=1)  # type: ignore[arg-type]
    layer = ResidualAttention(4).eval()
    with pytest.raises(ValueError, match=r"x is too small \(got \(1, 4, 8, 7\)\); expected 8 places at least"):
        layer(torch.zeros(1, 4, 8, 7))
    assert layer(torch.zeros(1, 4, 8, 9)).shape == (1, 4, 8, 9)
    assert layer(torch.zeros(0, 4, 8, 8)).shape == (0, 4, 8, 8)

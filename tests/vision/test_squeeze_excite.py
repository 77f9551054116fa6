"""Squeeze-excite and its effective form against loops over pixels, and timm's numbers (B199)."""

import pytest
import torch
import torch.nn.functional as F

from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import EffectiveSqueezeExcite, SqueezeExcite, gating
from vision.gates import affine, equals_the_loops, gives_the_numbers, moved_by
from vision.naive_gates import effective_squeeze_excite, squeeze_excite, timm_width
from vision.shared import filled, leaves, normal


@pytest.mark.parametrize("sizes", [(3, 4), (1, 1)])
def test_equals_the_loops(sizes: tuple[int, int]) -> None:
    (x,) = leaves(normal(1, 2, 4, *sizes))
    layer = filled(SqueezeExcite(4, inner_dim=2))
    equals_the_loops(layer, layer(x), squeeze_excite(x, *affine(layer.mlp.down, layer.mlp.up)), x)
    other = filled(EffectiveSqueezeExcite(4))
    equals_the_loops(other, other(x), effective_squeeze_excite(x, *affine(other.mix)), x)


def test_gives_timms_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the effective form the values first: timm's gradients are those of torch's hard sigmoid, off by 3e-8."""
    gives_the_numbers(SqueezeExcite(12, inner_dim=3), "B199", "se", {"fc1": "mlp.down", "fc2": "mlp.up"})
    with pytest.raises(AssertionError):
        gives_the_numbers(EffectiveSqueezeExcite(12), "B199", "ese", {"fc": "mix"})
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    close(gating.hard_sigmoid(z), F.hardsigmoid(z))
    monkeypatch.setitem(gating.SQUASHES, "hard_sigmoid", F.hardsigmoid)
    gives_the_numbers(EffectiveSqueezeExcite(12), "B199", "ese", {"fc": "mix"})


def test_other_activations() -> None:
    layer, x = filled(SqueezeExcite(4, inner_dim=2, activation="silu", squash="hard_sigmoid")), normal(1, 2, 4, 3, 5)
    (down, a), (up, b) = ((z.weight, z.bias) for z in (layer.mlp.down, layer.mlp.up))
    z = x.mean((2, 3)) @ down.T + a
    close(layer.gate(x)[..., 0, 0], (((z * z.sigmoid()) @ up.T + b + 3) / 6).clamp(0, 1))


def test_the_width_is_timms() -> None:
    for dim in (16, 24, 96, 200, 300, 768):
        assert SqueezeExcite(dim).inner_dim == timm_width(dim / 16)


def test_commutes_with_any_shuffle_and_costs_the_same_on_any_map() -> None:
    for layer in (filled(SqueezeExcite(6, inner_dim=3)), filled(EffectiveSqueezeExcite(6))):
        assert moved_by(layer, "pixels") < 1e-12
        small, large = (flops(lambda n=n, f=layer: f(normal(0, 1, 6, 4, n))) for n in (4, 64))
        assert small == large > 0
        x = normal(3, 2, 6, 3, 4)
        close(layer(x) / x, layer.gate(x).expand(x.shape))


def test_no_bottleneck_loses_nothing() -> None:
    """What the gate reads of the means: R directions, or all C."""
    for layer, rank in (
        (filled(SqueezeExcite(6, inner_dim=2, activation="silu")), 2),
        (filled(EffectiveSqueezeExcite(6)), 6),
    ):
        if rank == 6:
            layer.mix.weight.data *= 0.1  # in the sigmoid's middle piece
        x = normal(3, 1, 6, 1, 1)
        slopes = torch.autograd.functional.jacobian(lambda z, f=layer: (f(z) / z).flatten(), x).flatten(1)
        assert int(torch.linalg.matrix_rank(slopes, rtol=1e-9)) == rank


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"squash is unknown \(got 'tanh'\)"):
        SqueezeExcite(8, squash="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation is unknown \(got 'gelu'\)"):
        SqueezeExcite(8, activation="gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim is too small \(got 0\)"):
        EffectiveSqueezeExcite(0)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, Y, X\)"):
        SqueezeExcite(8)(torch.zeros(2, 4, 3, 3))

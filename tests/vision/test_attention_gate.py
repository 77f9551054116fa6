"""The attention gate against loops over places, and the authors' numbers (A128)."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.laws.agreement import close
from regard.vision import AttentionGate
from vision.naive_attention_gate import naive_attention_gate, naive_attention_map
from vision.shared import filled, gradients, leaves, normal, vectors


def pointwise(conv: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return conv.weight.flatten(1), conv.bias


@pytest.mark.parametrize(
    ("axes", "sizes", "gating", "options"),
    [
        (2, (4, 6), (2, 3), {}),
        (2, (5, 4), (1, 3), {"align_corners": True}),
        (2, (4, 3), (2, 2), {"normalize": "softmax", "subsample": (1, 3)}),
        (2, (2, 2), (1, 1), {}),
        (3, (2, 4, 2), (1, 2, 1), {"subsample": (2, 2, 1)}),
    ],
)
def test_equals_the_loops(axes: int, sizes: tuple, gating: tuple, options: dict) -> None:
    layer = filled(AttentionGate(4, gating_dim=3, inner_dim=2, axes=axes, **options))
    x, g = leaves(normal(1, 2, 4, *sizes), normal(2, 2, 3, *gating))
    theta, norm = layer.theta.weight, layer.norm
    p = (theta, *pointwise(layer.phi), *pointwise(layer.psi))
    variant = {
        "normalise": options.get("normalize", "sigmoid"),
        "align_corners": options.get("align_corners", False),
    }
    close(layer.coefficients(x, g), naive_attention_map(x, g, *p, **variant))
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    got = layer(x, g)
    want = naive_attention_gate(x, g, *p, *pointwise(layer.out), statistics, **variant)
    close(got, want)
    inputs = [x, g, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("case", ["g2", "g3", "g2soft"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("A128", case)
    inner, dim = z["p_theta.weight"].shape[:2]
    layer = AttentionGate(
        dim,
        gating_dim=z["g"].shape[1],
        inner_dim=inner,
        subsample=tuple(z["sub"].tolist()),
        axes=len(z["sub"]),
        normalize="softmax" if case == "g2soft" else "sigmoid",
    ).double()
    names = {"W.0": "out", "W.1": "norm"}
    state = layer.state_dict()
    for key, value in z.items():
        if key.startswith("p_"):
            part, _, kind = key.removeprefix("p_").rpartition(".")
            state[f"{names.get(part, part)}.{kind}"] = value
    layer.load_state_dict(state)
    layer.eval()
    x, g = leaves(z["x"], z["g"])
    close(layer.coefficients(x, g), z["att"])
    out = layer(x, g)
    close(out, z["out"])
    for ours, theirs in zip(torch.autograd.grad((out * z["w"]).sum(), (x, g)), (z["gx"], z["gg"]), strict=True):
        close(ours, theirs)


def test_coefficients_lie_between_0_and_1_and_cost_little() -> None:
    layer = filled(AttentionGate(16))
    x, g = 10 * normal(1, 2, 16, 9, 7), 10 * normal(2, 2, 16, 4, 3)
    a = layer.coefficients(x, g)
    assert a.shape == (2, 1, 9, 7)
    assert a.min() >= 0
    assert a.max() <= 1
    assert a.max() - a.min() > 0.5
    counts = {"theta": 16 * 8 * 4, "phi": 16 * 8 + 8, "psi": 8 + 1, "out": 16 * 16 + 16, "norm": 2 * 16}
    assert sum(p.numel() for p in layer.parameters()) == sum(counts.values())


def test_a_signal_that_says_nothing_gates_evenly() -> None:
    layer = filled(AttentionGate(4))
    torch.nn.init.zeros_(layer.psi.weight)
    x, g = normal(1, 1, 4, 4, 4), normal(2, 1, 4, 2, 2)
    a = layer.psi.bias.sigmoid()
    close(layer(x, g), layer.norm(layer.out(a * x)))


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"subsample has another number of axes \(got \(2, 2, 2\)\); expected one int, or 2"
    ):
        AttentionGate(4, subsample=(2, 2, 2))
    with pytest.raises(ValueError, match=r"subsample is too small \(got 0\)"):
        AttentionGate(4, subsample=(2, 0))
    with pytest.raises(ValueError, match=r"axes is unknown \(got 1\); expected one of 2, 3"):
        AttentionGate(4, axes=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normalize is unknown \(got 'max'\); expected one of 'sigmoid', 'softmax'"):
        AttentionGate(4, normalize="max")  # type: ignore[arg-type]
    layer = AttentionGate(4, gating_dim=3).double()
    with pytest.raises(ValueError, match=r"g has the wrong shape .* expected \(B = 2, C = 3, Y, X\)"):
        layer(normal(0, 2, 4, 4, 4), normal(0, 2, 4, 2, 2))
    with pytest.raises(ValueError, match=r"g has the wrong shape \(got \(1, 3, 2, 2\)\); expected \(B = 2,"):
        layer(normal(0, 2, 4, 4, 4), normal(0, 1, 3, 2, 2))
    with pytest.raises(
        ValueError, match=r"x is smaller than a step \(got \(2, 4, 1, 4\)\); expected axes of at least \(2, 2\)"
    ):
        layer(normal(0, 2, 4, 1, 4), normal(0, 2, 3, 2, 2))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpoints_normalise_as_the_first_pass_did(frozen: bool, reentrant: bool) -> None:
    found = []
    for again in (False, True):
        layer = filled(AttentionGate(4, gating_dim=3, inner_dim=2)).train()
        layer.norm.train(not frozen)
        x, g = leaves(normal(1, 2, 4, 4, 6), normal(2, 2, 3, 2, 3))
        out = checkpoint(layer, x, g, use_reentrant=reentrant) if again else layer(x, g)
        out.square().sum().backward()
        found.append([out, x.grad, g.grad, *(p.grad for p in layer.parameters()), *layer.norm.buffers()])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@torch.no_grad()
def test_what_the_gate_closes_does_not_count() -> None:
    """Coefficients near 0 shut a region out whole, where weights that sum to 1 always let something through."""
    layer = filled(AttentionGate(4, inner_dim=1)).eval()
    layer.theta.weight.zero_()
    for conv, weight, bias in ((layer.phi, 1.0, 1.0), (layer.psi, 60.0, -60.0)):
        conv.weight.fill_(weight)
        conv.bias.fill_(bias)
    left = torch.cat([torch.ones(1, 4, 8, 4), -torch.ones(1, 4, 8, 4)], 3).double() / 4  # open on the left alone
    x, other = normal(1, 1, 4, 8, 8), normal(2, 1, 4, 8, 8)
    out = layer(x, left)
    close(layer(torch.cat([x[..., :5], other[..., 5:]], 3), left), out)  # resizing blurs the edge by a column
    assert (layer(other, left) - out)[..., :4].abs().min() > 1e-6
    assert sum(p.numel() for p in layer.parameters()) < 4 * 4 * 4

"""StepNet against loops over samples and channels."""

import pytest
import torch
from torch import nn

from regard.laws.agreement import close
from regard.vision import StepBlock, StiffnessStep, step_block, step_profile
from vision import naive_stepnet
from vision.shared import filled, gradients, leaves, normal


@pytest.mark.parametrize("options", [{"reduction": 2}, {"reduction": 1, "inputs": "branch"}, {}])
def test_equals_the_loops(options: dict) -> None:
    layer = filled(StepBlock(4, nn.Conv2d(4, 4, 3, padding=1), **options))
    gate = layer.step
    (x,) = leaves(normal(1, 2, 4, 3, 2))
    f = layer.branch(x)
    weights = (gate.down.weight, gate.down.bias, gate.up.weight, gate.up.bias)
    step = naive_stepnet.stiffness_step(x, f, *weights, inputs=options.get("inputs", "both"))
    close(gate(x, f), step)
    got, want = layer(x), naive_stepnet.step_block(x, f, step)
    close(got, want)
    inputs = [x, *layer.parameters()]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


@torch.no_grad()
def test_half_a_step_keeps_stiff_layers_stable() -> None:
    """x' = -3 x, ten layers: a step of 1 doubles x each time, with its sign turned; a step of 1/2 halves it."""
    branch = nn.Conv2d(4, 4, 1, bias=False)
    branch.weight.copy_(-3 * torch.eye(4)[:, :, None, None])
    layer = StepBlock(4, branch).double()
    for part in (layer.step.up.weight, layer.step.up.bias):
        part.zero_()
    x = normal(1, 2, 4, 3, 3)
    half, whole = x, x
    for _ in range(10):
        half, whole = layer(half), step_block(whole, branch(whole), torch.ones(2, 4))
    close(half, x / 1024)
    close(whole, x * 1024)


def test_only_both_together_tell_how_stiff_a_layer_is() -> None:
    """The same branch beside a state of another scale: its ratio has changed, and one of the gates sees it."""
    x, f = normal(1, 2, 4, 3, 3), normal(2, 2, 4, 3, 3)
    both, branch = (filled(StiffnessStep(4, reduction=1, inputs=inputs)) for inputs in ("both", "branch"))
    assert torch.equal(branch(x, f), branch(10 * x, f))
    assert (both(x, f) - both(10 * x, f)).abs().max() > 0.01


def test_a_profile_is_in_the_order_of_calls() -> None:
    layers = [filled(StepBlock(4), seed) for seed in range(3)]
    model = nn.Sequential(*layers)
    x = normal(1, 2, 4, 3, 3)
    profile, y = step_profile(model, x), x
    for found, layer in zip(profile, layers, strict=True):
        close(found, layer.step(y, layer.branch(y)).mean(1))
        y = layer(y)
    assert not any(layer.step._forward_hooks for layer in layers)
    with pytest.raises(ValueError, match=r"step_profile: model calls no step gate \(got Identity\)"):
        step_profile(nn.Identity(), x)


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"inputs is unknown \(got 'state'\); expected one of 'both', 'branch'"):
        StepBlock(4, inputs="state")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction is too small \(got 0\)"):
        StepBlock(4, reduction=0)
    gate = StiffnessStep(4)
    with pytest.raises(ValueError, match=r"f has the wrong shape \(got \(1, 4, 2, 2\)\); expected \(B = 2, C = 4,"):
        gate(torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert StepBlock(4)(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)

"""StepNet: attention on a residual branch is Euler's step size, chosen by state and branch together."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, fits, refuse, whole

CARD = Card(
    "stepnet",
    equation="""s = [mean of x ; mean of f(x)]          over places
a = sigmoid(W2 ReLU(W1 s + b1) + b2)         y = x + a * f(x)          a step for each channel""",
    papers=(
        Paper(
            "Understanding Self-attention Mechanism via Dynamical System Perspective",
            "Huang, Liang, Qin, Zhong, Lin",
            2023,
            "2308.09939",
            "abstract",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*18*Y*X*M*M + B*3*M*(M//reduction)", ""),
    claim="A step below 1 keeps stable what a plain residual block, of step 1, blows up: "
    "tests/vision/test_stepnet.py::test_half_a_step_keeps_stiff_layers_stable.",
    differs=(
        "The abstract alone was read: what the gate sees, means of the state and of the branch side by side, is "
        "inferred, and so is the form of its two layers, which are those of squeeze and excitation.",
    ),
    verified="reconstructed",
    example={"reduction": 4},
    defaults={"reduction": "ours, as squeeze and excitation", "inputs": "ours, inferred from the abstract"},
)

Inputs = Literal["both", "branch"]


class StiffnessStep(nn.Module):
    """The gate: (state x, branch f) -> a step for each channel, in (0, 1).

    Args:
        dim: C.
        reduction: the inner width is C // reduction, 1 at least.
        inputs: means of state and branch, or of the branch alone, as squeeze and excitation on it has. The ratio of
            their norms, which says how stiff a layer is, shows in both alone.
    """

    def __init__(self, dim: int, *, reduction: int = 16, inputs: Inputs = "both") -> None:
        super().__init__()
        whole(self, dim=dim, reduction=reduction)
        choice(self, ("both", "branch"), inputs=inputs)
        self.dim, self.inputs = dim, inputs
        inner = max(1, dim // reduction)
        self.down = nn.Linear(2 * dim if inputs == "both" else dim, inner)
        self.up = nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "B C Y X"], f: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C"]:
        fits(self, "B C Y X", {"C": self.dim}, x=x, f=f)
        s = f.mean((2, 3))
        if self.inputs == "both":
            s = torch.cat([x.mean((2, 3)), s], 1)
        return self.up(F.relu(self.down(s))).sigmoid()


def step_block(
    x: Float[Tensor, "B C Y X"], f: Float[Tensor, "B C Y X"], step: Float[Tensor, "B C"]
) -> Float[Tensor, "B C Y X"]:
    """x + step * f: the step is of the branch alone, never of x."""
    return x + step[:, :, None, None] * f


@CARD.module
class StepBlock(nn.Module):
    """A residual block whose branch is gated.

    Args:
        dim: C.
        branch: f, any module of maps; default two 3 x 3 convolutions with a ReLU between.
        reduction, inputs: as for `StiffnessStep`.
    """

    def __init__(
        self, dim: int, branch: nn.Module | None = None, *, reduction: int = 16, inputs: Inputs = "both"
    ) -> None:
        super().__init__()
        self.step = StiffnessStep(dim, reduction=reduction, inputs=inputs)
        self.dim = dim
        first, second = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        self.branch = nn.Sequential(first, nn.ReLU(), second) if branch is None else branch

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        f = self.branch(x)
        return step_block(x, f, self.step(x, f))


@torch.no_grad()
def step_profile(model: nn.Module, *inputs: Tensor) -> Float[Tensor, "L B"]:
    """The mean step over the channels, of each `StiffnessStep` in the order in which the model calls them."""
    steps: list[Tensor] = []
    gates = [part for part in model.modules() if isinstance(part, StiffnessStep)]
    hooks = [gate.register_forward_hook(lambda _, __, step: steps.append(cast(Tensor, step).mean(1))) for gate in gates]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not steps:
        refuse(
            "step_profile", "model", "calls no step gate", type(model).__name__, "one with StepBlock or StiffnessStep"
        )
    return torch.stack(steps)

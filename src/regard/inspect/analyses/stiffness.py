"""Stiffness of layers: how far each moves a residual network's state, relative to the state's norm."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number, refuse
from regard.inspect.analyses._maps import floats

CARD = Card(
    "stiffness",
    equation="NSI(t) = || x_(t+1) - x_t || / || x_t ||        norms of a sample's whole state; step divides it by h",
    papers=(
        Paper(
            "Understanding Self-attention Mechanism via Dynamical System Perspective",
            "Huang, Liang, Qin, Zhong, Lin",
            2023,
            "2308.09939",
            "abstract",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*N*M", ""),
    claim="Tells how fast a layer's dynamics are: h times the rate of the equation that Euler's method solves: "
    "tests/inspect/analyses/test_stiffness.py::test_is_the_rate_of_a_turning_state.",
    differs=("Norms and ratio are of each sample; whoever wants one number a layer takes the mean of the ratios.",),
    verified="reconstructed",
)


@CARD.function
def stiffness(states: Sequence[Float[Tensor, " B *_n"]], *, step: float = 1.0) -> Float[Tensor, "L B"]:
    """The index of each layer and sample; NaN for a layer that changes the state's shape, which has none.

    Args:
        states: what goes into each layer, and what leaves the last one: L + 1 tensors, before any activation that
            follows the sum. All axes but the first are one vector.
        step: h, if the index is to be that of the equation itself, whatever the step.

    Raises:
        ValueError: fewer than two states, batches that differ.
    """
    number("stiffness", above=0, step=step)
    if len(states) < 2:
        refuse("stiffness", "states", "are too few", len(states), "two at least, before and after a layer")
    for n, x in enumerate(states):
        floats("stiffness", " B *_n", {"B": len(states[0])}, **{f"states[{n}]": x})
    rows = []
    for before, after in pairwise(states):
        wide = torch.promote_types(before.dtype, torch.float32)
        x = before.to(wide).flatten(1)
        if before.shape != after.shape:
            rows.append(x.new_full((len(x),), torch.nan))
            continue
        moved = (after.to(wide).flatten(1) - x) / step
        rows.append(torch.linalg.vector_norm(moved, dim=1) / torch.linalg.vector_norm(x, dim=1))
    return torch.stack(rows)


@checked()
def profile_distance(profile: Float[Tensor, "L _B"], reference: Float[Tensor, "L _K"]) -> Float[Tensor, ""]:
    """How far a network's profile, its mean over samples, is from that of a reference of as many layers."""
    return torch.linalg.vector_norm(profile.mean(1) - reference.mean(1))

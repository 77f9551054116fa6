"""The stiffness index against loops, and on equations whose rate is known."""

import math

import pytest
import torch

from regard.inspect.analyses.stiffness import profile_distance, stiffness
from regard.laws.agreement import close
from vision import naive_stepnet


def states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_equals_the_loops() -> None:
    close(stiffness(states()), naive_stepnet.stiffness(states()))
    close(stiffness(states(), step=0.3), naive_stepnet.stiffness(states(), h=0.3))
    one, other = stiffness(states()), stiffness([2 * z + 1 for z in states()])
    close(profile_distance(one, other), naive_stepnet.profile_distance(one, other))
    assert profile_distance(one, one) == 0


def test_is_the_rate_of_a_turning_state() -> None:
    """Euler's method on x' = A x, with A a turn by a right angle times 2: however x lies, it moves 2 h of its norm."""
    turn = 2 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    x = [torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
    for _ in range(4):
        x.append(x[-1] + 0.3 * x[-1] @ turn.mT)
    found = stiffness(x)
    assert found.shape == (4, 3)
    close(found, torch.full_like(found, 0.6))
    close(stiffness(x, step=0.3), torch.full_like(found, 2.0))


def test_a_layer_that_changes_the_shape_has_none() -> None:
    x = [*states()[:2], *(z[:, :, 0] for z in states()[2:])]
    found = stiffness(x)
    assert [math.isnan(row[0]) for row in found] == [False, True, False]
    close(found[[0, 2]], naive_stepnet.stiffness(x)[[0, 2]])


def test_half_precision_is_summed_in_float32() -> None:
    x = [torch.full((1, 70000), 4.0, dtype=torch.float16), torch.full((1, 70000), 6.0, dtype=torch.float16)]
    close(stiffness(x), torch.tensor([[0.5]]))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"stiffness: states are too few \(got 1\); expected two at least"):
        stiffness(states()[:1])
    with pytest.raises(ValueError, match=r"stiffness: states\[1\] has the wrong shape .*expected \(B = 2, \*_n\)"):
        stiffness([states()[0], states()[0][:1]])
    with pytest.raises(ValueError, match=r"stiffness: step is out of range \(got 0\)"):
        stiffness(states(), step=0)

"""ETSformer's smoothing layers against loops, the T x T matrix, and the authors' numbers (B143)."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from laws.measured import largest
from regard.laws.agreement import close
from regard.timeseries.exponential_smoothing import (
    ExponentialSmoothingAttention,
    SmoothingState,
    damped_growth,
    exponential_smoothing,
    smoothed_level,
)
from timeseries.naive_exponential_smoothing import (
    naive_damping,
    naive_exponential_smoothing,
    naive_growth,
    naive_level,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "B143.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, dim: int = 6, num_heads: int = 3) -> ExponentialSmoothingAttention:
    layer = ExponentialSmoothingAttention(dim, num_heads).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.7 * normal(100 * seed + n, *p.shape))
    return layer


def same_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got.detach(), want.detach())
    direction = normal(7, *got.shape)
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


@pytest.mark.parametrize("T", [1, 2, 9, 70])
def test_smoothing_equals_the_loops(T: int) -> None:
    v, theta, before = (normal(n, *s).requires_grad_() for n, s in enumerate([(2, T, 3, 2), (3,), (3, 2)]))
    got = exponential_smoothing(v, theta.sigmoid(), before)
    same_gradients(got, naive_exponential_smoothing(v, theta, before), [v, theta, before])


@pytest.mark.parametrize("T", [1, 5, 64, 200])
def test_smoothing_equals_its_matrix(T: int) -> None:
    """The T x (T + 1) matrix of attention weights, [a^(t+1) | (1 - a) a^(t-j)], whose rows sum to 1."""
    v, a, before = normal(1, 2, T, 3, 2), torch.tensor([0.1, 0.9, 0.999], dtype=torch.float64), normal(3, 3, 2)
    t = torch.arange(T)
    lag = t[:, None] - t
    weights = ((1 - a)[:, None, None] * a[:, None, None] ** lag.clamp(min=0)).tril()
    weights = torch.cat([(a[:, None] ** (t + 1))[..., None], weights], -1)
    close(weights.sum(-1), torch.ones(3, T, dtype=torch.float64))
    want = torch.einsum("htj,bjhd->bthd", weights, torch.cat([before.expand(2, 1, 3, 2), v], 1))
    close(exponential_smoothing(v, a, before), want)
    layer, x = filled(2), normal(4, 2, T, 6)
    with torch.no_grad():
        layer.theta.copy_(a.logit())
        u = layer.v_proj(x).unflatten(-1, (3, 2))
        steps = u - torch.cat([layer.last.expand(2, 1, 3, 2), u[:, :-1]], 1)
        steps = torch.cat([layer.smoothed.expand(2, 1, 3, 2), steps], 1)
        close(layer(x), layer.o_proj(torch.einsum("htj,bjhd->bthd", weights, steps).flatten(2)))


def test_no_square_matrix() -> None:
    """Twice as long a series makes tensors twice as large, where the matrix would be four times as large."""
    a, before = torch.tensor([0.1, 0.9, 0.999], dtype=torch.float64), normal(3, 3, 2)
    for run in (
        lambda T: exponential_smoothing(normal(1, 1, T, 3, 2), a, before),
        lambda T: filled(1)(normal(1, 1, T, 6)),
    ):
        with torch.no_grad():
            sizes = [largest(partial(run, T)) for T in (512, 1024, 2048)]
        assert sizes[2] <= 2.1 * sizes[1] <= 2.1 * 2.1 * sizes[0]
        assert sizes[2] < 2048**2 / 8


def test_constant_series_stay_as_they_are() -> None:
    before = normal(1, 3, 2)
    a = torch.tensor([0.2, 0.5, 0.99], dtype=torch.float64)
    close(exponential_smoothing(before.expand(2, 100, 3, 2), a, before), before.expand(2, 100, 3, 2))


@pytest.mark.parametrize("T", [1, 6])
def test_growth_equals_the_loops(T: int) -> None:
    layer, z = filled(T), normal(2, 2, T, 6).requires_grad_()
    p = dict(layer.named_parameters())
    projections = (p[f"{name}_proj.{kind}"] for name in ("v", "o") for kind in ("weight", "bias"))
    want = naive_growth(z, p["last"], p["theta"], p["smoothed"], *projections)
    same_gradients(layer.growth(z), want, [z, *layer.parameters()])
    close(layer(z).detach(), want[:, 1:].detach())


def test_level_equals_the_loops() -> None:
    x, growth, season = (normal(n, 2, 7, 3).requires_grad_() for n in range(3))
    theta, before = normal(4, 3).requires_grad_(), normal(5, 3).requires_grad_()
    one, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    got = smoothed_level(x, season, growth, theta.sigmoid(), before)
    same_gradients(
        got, naive_level(x, growth, season, theta, before, one, zero, one, zero), [x, growth, season, theta, before]
    )


def test_gives_the_authors_numbers() -> None:
    z = vectors("esa")
    v = z["v"].requires_grad_()
    out = exponential_smoothing(v, z["weight"].sigmoid(), z["v0"])
    close(out.detach(), z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), v)[0], z["grad_v"])


def test_growth_gives_the_authors_numbers() -> None:
    z = vectors("gr")
    layer = ExponentialSmoothingAttention(6, 3).double()
    state = {"theta": z["weight"], "last": z["z0"], "smoothed": z["v0"]}
    for own, theirs in (("v_proj", "in"), ("o_proj", "out")):
        state |= {own + ".weight": z["W" + theirs], own + ".bias": z["b" + theirs]}
    layer.load_state_dict(state)
    x = z["x"].requires_grad_()
    out = layer.growth(x)
    close(out.detach(), z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["grad_x"])


def test_level_without_growth_gives_the_authors_numbers() -> None:
    """The authors' growth term is a^(T - t) growth_t (their sum runs over another axis); ours is the recursion's."""
    z = vectors("lev")
    a, season = z["weight"].sigmoid(), z["season"] @ z["Ws"].T + z["bs"]
    growth = z["growth"] @ z["Wg"].T + z["bg"]
    ages = torch.arange(6, 0, -1)
    want = z["out"] - a ** ages[:, None] * growth
    close(smoothed_level(z["level"], season, torch.zeros_like(growth), a, z["v0"]), want)
    theirs = naive_level(*(z[n] for n in ("level", "growth", "season", "weight", "v0", "Wg", "bg", "Ws", "bs")))
    close(smoothed_level(z["level"], season, growth, a, z["v0"]), theirs)


def test_damping_gives_the_authors_numbers() -> None:
    z = vectors("damp")
    growth = z["x"][:, 0].unflatten(-1, (2, 3))
    got = damped_growth(growth, z["factor"].sigmoid(), 5).flatten(2)
    close(got, z["out"])
    close(got, naive_damping(z["x"], z["factor"], 5))


def test_a_straight_line_grows_by_its_slope() -> None:
    """What the layer is for: of u_t = 3 t, started on the line, the smoothed growth is 3 everywhere."""
    layer = filled(1, dim=1, num_heads=1)
    with torch.no_grad():
        for p in (layer.v_proj.weight, layer.o_proj.weight):
            p.fill_(1.0)
        for p in (layer.v_proj.bias, layer.o_proj.bias):
            p.zero_()
        layer.last.fill_(-3.0)
        layer.smoothed.fill_(3.0)
    line = 3 * torch.arange(20, dtype=torch.float64)[None, :, None]
    close(layer(line).detach(), torch.full((1, 20, 1), 3.0, dtype=torch.float64))
    forecast = damped_growth(layer(line)[:, -1:], torch.ones(1, dtype=torch.float64), 4)
    close(forecast.flatten().detach(), 3 * torch.arange(1, 5, dtype=torch.float64))


def test_bad_input() -> None:
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 5\)\); expected \(B, T, M = 6\)"):
        layer(normal(1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"a has the wrong shape \(got \(3,\)\); expected \(H = 4\)"):
        exponential_smoothing(normal(1, 2, 3, 4, 5), torch.ones(3), normal(1, 4, 5))
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 3\); expected 2"):
        layer.step(normal(1, 3, 1, 6), layer.init_state(2, 9))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the SmoothingState"):
        layer.step(normal(1, 3, 1, 6), None)
    assert isinstance(layer.init_state(2, 9), SmoothingState)

"""Frequency attention against sums of cosines, the authors' numbers (B143), and series it must go on with exactly."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.timeseries.frequency_attention import FrequencyAttention, frequency_attention
from timeseries.naive_frequency_attention import naive_frequency_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B143.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("T", "K"), [(3, 1), (8, 2), (9, 2), (9, 4), (12, 3), (13, 20)])
@pytest.mark.parametrize("horizon", [0, 5])
def test_equals_the_loops(T: int, K: int, horizon: int) -> None:
    x = normal(T, 2, T, 3).requires_grad_()
    results = []
    for out in (frequency_attention(x, K, horizon), naive_frequency_attention(x, horizon, K)):
        results.append((out.detach(), torch.autograd.grad((out * normal(7, *out.shape)).sum(), x)[0]))
    for got, want in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("case", ["fa_odd", "fa_even"])
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    x = z["x"].requires_grad_()
    out = frequency_attention(x, int(z["K"]), int(z["P"]))
    close(out.detach(), z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["grad_x"])


def test_sines_go_on_exactly() -> None:
    """K sines of whole cycles, each feature its own, are all of the season, and its forecast is what they do next."""
    t = torch.arange(40 + 25, dtype=torch.float64)[:, None]
    cycles = torch.tensor([3.0, 5.0, 12.0], dtype=torch.float64)
    series = (2 * math.pi * cycles * t / 40).sin() + 0.5 * (2 * math.pi * (cycles + 1) * t / 40 + 1).cos()
    past = series[None, :40] + 7  # a level is no season
    close(frequency_attention(past, 2, horizon=25), series[None])
    made = FrequencyAttention(3, top_k=2).double()
    for proj in (made.v_proj, made.o_proj):
        nn.init.eye_(proj.weight)
    close(made(past), series[None, :40])


def test_layer_is_the_function_between_projections() -> None:
    layer, x = FrequencyAttention(4, top_k=2).double(), normal(3, 2, 9, 4)
    want = frequency_attention(x @ layer.v_proj.weight.T, 2) @ layer.o_proj.weight.T
    close(layer(x).detach(), want.detach())


def test_the_strongest_frequency_is_kept() -> None:
    t = torch.arange(30, dtype=torch.float64)
    weak, strong = 0.4 * (2 * math.pi * 2 * t / 30).sin(), (2 * math.pi * 7 * t / 30).cos()
    close(frequency_attention((weak + strong)[None, :, None], 1), strong[None, :, None])


def test_series_too_short_have_no_season() -> None:
    for T in (0, 1, 2):
        assert frequency_attention(normal(1, 2, T, 3), 1).eq(0).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"top_k is too small \(got 0\)"):
        frequency_attention(normal(1, 2, 9, 3), 0)
    with pytest.raises(ValueError, match=r"horizon is too small \(got -1\)"):
        frequency_attention(normal(1, 2, 9, 3), 1, -1)
    with pytest.raises(ValueError, match=r"x has 0 tokens \(got horizon = 4\); expected some"):
        frequency_attention(normal(1, 2, 0, 3), 1, 4)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 9, 3\)\); expected \(B, T, M = 4\)"):
        FrequencyAttention(4)(normal(1, 2, 9, 3))
    with pytest.raises(ValueError, match="causal"):
        regard.create("frequency_attention", dim=24, num_heads=2, causal=True)

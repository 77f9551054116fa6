"""Retention against loops (naive_retnet.py, written from the equations before the code was, by the same author) and
numbers of flash-linear-attention's function."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_retnet import naive_gammas, naive_layer, naive_retention
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear.retnet import RetNet, log_gammas, retention

VECTORS = Path(__file__).parents[1] / "vectors" / "retnet_naive.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_numbers_of_another_library() -> None:
    with np.load(VECTORS) as file:
        z = {name.removeprefix("r_"): torch.from_numpy(file[name]) for name in file}
    given = [z[n].clone().requires_grad_() for n in "qkv"]
    rates = torch.tensor(log_gammas("powers", 3), dtype=torch.float64)
    close(rates.exp(), z["gamma"])
    out, state = retention(*given, rates)
    close(out.detach(), z["out"])
    close(state.detach(), z["state"])
    for n, g in zip("qkv", torch.autograd.grad((out * z["w"]).sum(), given), strict=True):
        close(g, z[f"g{n}"])


def test_core_equals_the_loops() -> None:
    q, k, v, gammas = normal(1, 1, 3, 6, 4), normal(2, 1, 3, 6, 4), normal(3, 1, 3, 6, 5), naive_gammas(3)
    got = retention(q, k, v, torch.tensor(gammas, dtype=torch.float64).log()).out
    for h in range(3):
        close(got[0, h], naive_retention(q[0, h], k[0, h], v[0, h], gammas[h]))


SPREAD = [1 - math.exp(math.log(1 / 32) + h / 5 * (math.log(1 / 512) - math.log(1 / 32))) for h in range(6)]
OWN = [1.0, 0.9, 0.5, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(
    ("options", "gammas"),
    [
        ({}, naive_gammas(6)),
        ({"decays": "spread", "norm": "group", "eps": 0.1}, SPREAD),
        ({"decays": OWN, "rotary": False, "gate": False}, OWN),
        ({"key_expand": 0.5, "value_expand": 1.0}, naive_gammas(6)),
    ],
    ids=str,
)
def test_layer_equals_the_loops(options: dict, gammas: list[float]) -> None:
    module, x = of("retnet").build(**options), tokens(2, 7)
    w = {n: getattr(module, f"{n}_proj").weight for n in "qkvo"} | {"norm": module.norm_weight}
    told = {name: options[name] for name in ("rotary", "norm", "gate", "eps") if name in options}
    w |= {"g": module.gate_proj.weight} if told.get("gate", True) else {}
    got = module(x)
    for b in range(2):
        close(got[b].detach(), naive_layer(x[b], w, heads=6, gammas=gammas, **told).detach())


def test_what_is_far_counts_gamma_to_the_distance() -> None:
    """gamma = 1/2: 20 steps back is less than a millionth of the newest, and one step is half."""
    q = k = torch.ones(1, 1, 21, 4, dtype=torch.float64)
    eye = torch.eye(21, dtype=torch.float64)[None, None]
    weights = retention(q, k, eye, torch.tensor([0.5], dtype=torch.float64).log()).out[0, 0, -1] / 2
    close(weights.flip(0), 0.5 ** torch.arange(21, dtype=torch.float64))
    assert weights[0] < 1e-6 * weights[-1]


@torch.no_grad()
def test_positions_go_on_and_the_state_does_not_grow() -> None:
    module = of("retnet").build()
    states = [module.step(tokens(1, n), module.init_state(1, 1))[1] for n in (10, 1000)]
    assert [s.kv.untyped_storage().nbytes() for s in states] == [8 * 6 * 4 * 8] * 2
    assert [s.length for s in states] == [10, 1000]


def test_heads_that_hardly_forget_are_exact() -> None:
    """1 - 2^-35 is 1 in float32: its logarithm is not of that number."""
    rates = log_gammas("powers", 31)
    assert rates[30] == pytest.approx(-(2.0**-35), rel=1e-9)
    assert rates == sorted(set(rates))
    assert rates[-1] < 0


def test_starting_values_and_refusals() -> None:
    module = regard.create("retnet", dim=32, num_heads=4, causal=True)
    assert (module.q_proj.out_features, module.v_proj.out_features, module.q_taps) == (32, 64, None)
    assert torch.equal(module.norm_weight, torch.ones(16))
    assert module.log_gamma == pytest.approx(
        [math.log(1 - 1 / 32), math.log(1 - 1 / 64), *map(math.log, (127 / 128, 255 / 256))]
    )
    assert not [name for name, _ in module.named_parameters() if name.endswith("bias")]
    for option, value in (("decays", "none"), ("norm", "layer"), ("key_expand", 0.75), ("decays", [0.5])):
        with pytest.raises(ValueError, match=f"RetNet: {option} "):
            RetNet(16, 4, **{option: value})
    with pytest.raises(ValueError, match=r"RetNet: decays\[1\] is out of range"):
        RetNet(16, 2, decays=[0.5, 1.5])
    with pytest.raises(ValueError, match=r"log_gamma has the wrong shape"):
        retention(*(torch.zeros(1, 3, 4, 2) for _ in "qkv"), torch.zeros(2))

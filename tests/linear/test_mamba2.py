"""Mamba-2 against loops and the numbers of transformers' layer. The loops' author has read neither code nor test."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_mamba2 import mamba2, ssd, ssd_attention
from regard.kernels.linear_scan import linear_scan
from regard.kernels.short_conv import short_conv
from regard.laws.agreement import close
from regard.linear import Mamba2, state_space_dual

VECTORS = Path(__file__).parents[1] / "vectors" / "mamba2.npz"
NAMES = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "taps": "conv1d.weight",
    "taps_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "log_rate": "A_log",
    "skip": "D",
    "norm_weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
    "o_proj.bias": "out_proj.bias",
}
CASES = {
    "a_": {"num_heads": 3, "chunk": 4},
    "b_": {"num_heads": 4, "groups": 2, "bias": True, "dt_limits": (0.05, 1.5), "chunk": 3},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, dim: int = 8, **options) -> Mamba2:
    layer = regard.create("mamba2", dim=dim, causal=True, **{"num_heads": 4, "state_dim": 5, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: Mamba2, x: Tensor, keep: Tensor | None = None) -> Tensor:
    given = {their: p for own, their in NAMES.items() if (p := dict(layer.named_parameters()).get(own)) is not None}
    given["conv1d.weight"] = given["conv1d.weight"][:, None]
    sizes = layer.num_heads, layer.inner // layer.num_heads, layer.state_dim, layer.groups
    return mamba2(x, given, *sizes, layer.dt_limits, layer.eps, keep)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2, "bias": True, "dt_limits": (0.3, 0.9), "conv_size": 2},
        {"expand": 4, "conv_bias": False, "eps": 0.3, "groups": 4, "chunk": 2},
    ],
)
def test_equals_the_loops(options: dict) -> None:
    layer, x = filled(1, **options), normal(1, 2, 5, 8).requires_grad_()
    direction = normal(2, 2, 5, 8)
    got, want = layer(x), naive(layer, x)
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_it_is_the_scan_and_an_attention() -> None:
    x, dt, rate = normal(1, 2, 4, 6, 3), normal(2, 2, 4, 6).exp(), normal(3, 4).exp()
    b, c, state = normal(4, 2, 2, 6, 5), normal(5, 2, 2, 6, 5), normal(6, 2, 4, 5, 3)
    got = state_space_dual(x, dt, rate, b, c, state=state)
    theirs = [z.transpose(1, 2) for z in (x, dt, b, c)]
    out, last = ssd(theirs[0], theirs[1], -rate, *theirs[2:], state=state.mT)
    close(got.out, out.transpose(1, 2))
    close(got.state, last.mT)
    wide = [z.repeat_interleave(2, 1) for z in (c, b)]
    scanned = linear_scan(*wide, dt[..., None] * x, -dt * rate[:, None], state=state, form="step")
    close(got.out, scanned.out)
    attended = ssd_attention(theirs[0], theirs[1], -rate, *theirs[2:], torch.zeros(4, dtype=torch.float64))
    close(state_space_dual(x, dt, rate, b, c).out, attended.transpose(1, 2))


@pytest.mark.parametrize("case", ["a_", "b_"])
def test_gives_the_numbers_of_the_released_layer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In b_ their convolution also reads the bias of the projection at hidden tokens, which ours does not."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    layer = Mamba2(6, state_dim=5, **CASES[case]).double()
    z["conv1d.weight"] = z["conv1d.weight"][:, 0]
    layer.load_state_dict({own: z[their] for own, their in NAMES.items() if their in z})
    x, keep = z["x"].clone().requires_grad_(), None
    given = x
    if "keep" in z:
        keep = z["keep"].bool()
        given = x * keep[..., None]

        def as_theirs(x: Tensor, weight: Tensor, bias: Tensor, *, keep: Tensor, **past: Tensor) -> tuple:
            out, last = short_conv(x, weight, bias, **past)
            return out.masked_fill(~keep[..., None], 0), last

        monkeypatch.setattr("regard.linear.mamba2.conv_of_real", as_theirs)
    out = layer(given, mask=keep)
    close(out.detach(), z["out"])
    leaves = [x, layer.log_rate, layer.in_proj.weight]
    for g, name in zip(torch.autograd.grad((out * z["w"]).sum(), leaves), ("gx", "gA_log", "gin_proj"), strict=True):
        close(g, z[name])


def test_a_long_step_forgets() -> None:
    """A separator whose step is long: what follows is the same after any past. The convolution has no reach here."""
    layer = filled(3, conv_size=1)
    with torch.no_grad():
        layer.in_proj.weight[-4:] = 0
        layer.in_proj.weight[-4:, 0] = 50
        layer.log_rate.zero_()
    x, other = normal(4, 2, 9, 8), normal(5, 2, 9, 8)
    x[..., 0], other[..., 0] = -0.01, -0.01
    x[:, 5], other[:, 5] = (torch.tensor([2.0, 0, 1, 0, 0, 1, 0, 1], dtype=torch.float64) for _ in range(2))
    other[:, 6:] = x[:, 6:]
    close(layer(x)[:, 5:].detach(), layer(other)[:, 5:].detach())
    x[:, 5, 0] = other[:, 5, 0] = -0.01
    difference = (layer(x) - layer(other))[:, 5:].abs().amax((0, 2))
    assert difference.min() > 1e-3, "with short steps the past is seen"


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    """Prompts of different lengths in one batch, whose padding is neither in the sums nor in the convolution."""
    layer, x, new = filled(6, bias=True), normal(6, 3, 7, 8), normal(7, 3, 4, 8)
    lengths = (7, 4, 1)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    x = x.masked_fill(~keep[..., None], 1e4)
    _, state = layer.step(x, layer.init_state(3, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values() -> None:
    layer = regard.create("mamba2", dim=16, num_heads=8, causal=True)
    torch.testing.assert_close(layer.log_rate.detach().exp(), torch.arange(1.0, 9.0))
    steps = F.softplus(layer.dt_bias.detach())
    assert 0.00099 < steps.min() < steps.max() < 0.101
    assert layer.skip.eq(1).all()
    assert layer.norm_weight.eq(1).all()
    assert layer.state_dim == 128
    assert layer.taps.shape == (32 + 2 * 128, 4)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"groups": 3}, "groups"),
        ({"dt_limits": (2.0, 1.0)}, r"dt_limits are out of order \(got \(2.0, 1.0\)\); expected two numbers"),
        ({"dt_limits": (-1.0, math.inf)}, "dt_limits are out of order"),
        ({"state_dim": 0}, r"state_dim is too small \(got 0\)"),
    ],
)
def test_bad_options(options: dict, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Mamba2(6, **{"num_heads": 4, **options})


def test_bad_input() -> None:
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 5\)\); expected \(B, T, M = 8\)"):
        layer(normal(1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"state has another batch than x \(got 2\); expected 3 sequences"):
        layer.step(normal(1, 3, 1, 8), layer.init_state(2, 9))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the Mamba2State"):
        layer.step(normal(1, 3, 1, 8), None)
    x, dt, b = normal(1, 1, 3, 2, 2), normal(2, 1, 3, 2), normal(3, 1, 2, 2, 4)
    with pytest.raises(ValueError, match="groups"):
        state_space_dual(x, dt, dt[0, :, 0], b, b)

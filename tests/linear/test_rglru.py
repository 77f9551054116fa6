"""The real-gated linear recurrent unit against loops and the numbers of transformers' layer.

The loops' author has read neither code nor test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_rglru import block
from regard import masks
from regard.kernels.short_conv import short_conv
from regard.laws.agreement import close
from regard.linear import RGLRU, gated_recurrence
from regard.linear.rglru import bounded_root, firsts
from regard.masks.tensors import Packed

VECTORS = Path(__file__).parents[1] / "vectors" / "rglru.npz"
NAMES = {
    "in_proj.weight": "linear_x.weight",
    "in_proj.bias": "linear_x.bias",
    "gate_proj.weight": "linear_y.weight",
    "gate_proj.bias": "linear_y.bias",
    "o_proj.weight": "linear_out.weight",
    "o_proj.bias": "linear_out.bias",
    "taps": "conv_1d.weight",
    "taps_bias": "conv_1d.bias",
    "rate": "rg_lru.recurrent_param",
    "input_weight": "rg_lru.input_gate_weight",
    "input_bias": "rg_lru.input_gate_bias",
    "forget_weight": "rg_lru.recurrent_gate_weight",
    "forget_bias": "rg_lru.recurrent_gate_bias",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> RGLRU:
    layer = regard.create("rglru", dim=6, num_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: RGLRU, x: Tensor, positions: Tensor) -> Tensor:
    given = {their: dict(layer.named_parameters())[own] for own, their in NAMES.items()}
    given["conv_1d.weight"] = given["conv_1d.weight"][:, None]
    return block(x, given, positions)[0]


@pytest.mark.parametrize("options", [{}, {"width": 8, "conv_size": 2}, {"width": 4, "conv_size": 1}])
def test_equals_the_loops(options: dict) -> None:
    layer, x = filled(1, **options), normal(1, 2, 6, 6).requires_grad_()
    direction = normal(2, 2, 6, 6)
    got, want = layer(x), naive(layer, x, torch.arange(6).expand(2, 6))
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_documents_equal_the_loops() -> None:
    """Each by itself: neither the sum nor the convolution sees the one before."""
    layer, x = filled(2, width=8), normal(1, 2, 7, 6)
    got = layer(x, mask=masks.packed(torch.tensor([0, 3, 4, 7])))
    parts = [naive(layer, part, torch.arange(part.shape[1]).expand(2, -1)) for part in x.split([3, 1, 3], 1)]
    close(got.detach(), torch.cat(parts, 1).detach())


def test_gives_the_numbers_of_the_released_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 1 holds two documents, of 4 and 3 tokens; their convolution reads across, ours does not."""
    with np.load(VECTORS) as file:
        z = {k: torch.from_numpy(file[k]) for k in file}
    z["conv_1d.weight"] = z["conv_1d.weight"][:, 0]
    layer = RGLRU(6, 2, width=8).double()
    layer.load_state_dict({own: z[their] for own, their in NAMES.items()})
    assert (z["positions"] == 0).nonzero().tolist() == [[0, 0], [1, 0], [1, 4]]

    def across(x: Tensor, weight: Tensor, bias: Tensor, **_: Tensor) -> tuple:
        return short_conv(x, weight, bias)

    monkeypatch.setattr("regard.linear.rglru.conv_of_real", across)
    x = z["x"].clone().requires_grad_()
    out = layer(x, mask=Packed.of(torch.tensor([[0, 7, 7], [0, 4, 7]])))
    close(out.detach(), z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, layer.rate])
    for g, name in zip(grads, ("gx", "grecurrent_param"), strict=True):
        close(g, z[name])


def open_layer(forget: Tensor) -> RGLRU:
    """Channels go through as they are, but for the recurrence, whose forget gate is open by sigmoid(forget)."""
    layer = filled(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        for linear in (layer.in_proj, layer.o_proj):
            linear.weight.copy_(torch.eye(6))
        layer.o_proj.weight.div_(F.gelu(torch.tensor(1.0, dtype=torch.float64), approximate="tanh"))
        layer.gate_proj.bias.fill_(1.0)
        layer.taps[:, -1] = 1.0
        layer.input_bias.fill_(100.0)
        layer.forget_bias.copy_(forget.view(2, 3))
    return layer


def test_variance_is_kept() -> None:
    """White noise of variance 1 comes out with variance 1, whether a channel forgets in one step or in a hundred."""
    layer = open_layer(torch.tensor([-6.5, -5.0, -4.0, -3.0, -1.0, 2.0], dtype=torch.float64))
    out = layer(normal(1, 64, 600, 6)).detach()
    assert (out.var((0, 1)) - 1).abs().max() < 0.2
    memory = (out[:, 1:] * out[:, :-1]).mean((0, 1))
    assert memory[0] > 0.8
    assert memory[-1] < 0.1


def test_closed_gates_forget_nothing() -> None:
    layer = open_layer(torch.full((6,), -800.0, dtype=torch.float64))
    x = normal(1, 1, 1001, 6)
    close(layer(x)[:, 1000].detach(), x[:, 0])


def test_the_slope_of_the_root_is_bounded() -> None:
    x = torch.tensor([0.0, 1e-8, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    y = bounded_root(x)
    close(y.detach(), x.detach().sqrt())
    close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1000.0, 1000.0, 1.0, 0.5], dtype=torch.float64))
    u, g = normal(1, 1, 3, 2), torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(gated_recurrence(u, g).out.sum(), g)[0].isfinite().all()


def test_first_real_tokens() -> None:
    real = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]]).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0, 0]]).bool()
    assert firsts(real, None).nonzero().tolist() == [[0, 1], [1, 0]]
    assert firsts(real, starts).nonzero().tolist() == [[0, 1], [0, 5], [1, 0], [1, 4]]


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6), normal(6, 4, 7, 6), normal(7, 4, 4, 6)
    lengths = (7, 4, 1, 0)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(4, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values() -> None:
    layer = regard.create("rglru", dim=64, num_heads=4, causal=True)
    decay = (-F.softplus(layer.rate.detach())).exp()
    assert 0.899 < decay.min() < decay.max() < 0.9991
    assert 0.03 < layer.taps.std() < 0.07
    assert 0.2 < layer.forget_weight.std() < 0.3
    for name, p in layer.named_parameters():
        assert not name.endswith("bias") or p.eq(0).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        RGLRU(6, 4)
    with pytest.raises(ValueError, match=r"c is out of range \(got 0.0\)"):
        RGLRU(6, 2, c=0.0)
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 5\)\); expected \(B, T, M = 6\)"):
        layer(normal(1, 2, 3, 5))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got tuple\); expected the RGLRUState"):
        layer.step(normal(1, 3, 1, 6), ())

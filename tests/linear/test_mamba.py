"""Mamba against loops and the numbers of transformers' layer. The loops' author has read neither code nor test."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_mamba import mamba
from linear.naive_mamba import selective_scan as naive_scan
from regard.laws.agreement import close
from regard.linear import Mamba, selective_scan

VECTORS = Path(__file__).parents[1] / "vectors" / "mamba.npz"
NAMES = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "taps": "conv1d.weight",
    "taps_bias": "conv1d.bias",
    "select_weight": "x_proj.weight",
    "dt_weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "log_rate": "A_log",
    "skip": "D",
    "o_proj.weight": "out_proj.weight",
    "o_proj.bias": "out_proj.bias",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> Mamba:
    options = {"state_dim": 3, "dt_rank": 2, **options}
    layer = regard.create("mamba", dim=5, num_heads=1, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: Mamba, x: Tensor) -> Tensor:
    given = {their: p for own, their in NAMES.items() if (p := dict(layer.named_parameters()).get(own)) is not None}
    given["conv1d.weight"] = given["conv1d.weight"][:, None]
    return mamba(x, given, layer.state_dim)[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"expand": 1, "bias": True, "conv_size": 2, "chunk": 2}, {"conv_bias": False, "dt_rank": 1, "state_dim": 1}],
)
def test_equals_the_loops(options: dict) -> None:
    layer, x = filled(1, **options), normal(1, 2, 5, 5).requires_grad_()
    direction = normal(2, 2, 5, 5)
    got, want = layer(x), naive(layer, x)
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_make_no_difference(chunk: int) -> None:
    u, dt, a = normal(1, 2, 7, 4), normal(2, 2, 7, 4).exp(), -normal(3, 4, 3).exp()
    given = [u, dt, a, normal(4, 2, 7, 3), normal(5, 2, 7, 3), normal(6, 4), normal(7, 2, 4, 3)]
    leaves = [z.requires_grad_() for z in given]
    got = selective_scan(*leaves[:6], state=leaves[6], chunk=chunk)
    want = naive_scan(*leaves)
    directions = normal(8, 2, 7, 4), normal(9, 2, 4, 3)
    for g, w in zip(got, want, strict=True):
        close(g.detach(), w.detach())
    grads = [torch.autograd.grad(sum((o * d).sum() for o, d in zip(out, directions)), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)
    starts = torch.tensor([[1, 0, 0, 1, 1, 0, 0]]).bool()
    parts = [selective_scan(*(z[:, s] if z.dim() == 3 else z for z in given[:6])).out for s in DOCUMENTS]
    close(selective_scan(*given[:6], starts=starts, chunk=chunk).out.detach(), torch.cat(parts, 1).detach())


DOCUMENTS = (slice(0, 3), slice(3, 4), slice(4, 7))


def test_training_keeps_no_states() -> None:
    """What backward holds grows with T (I + N), not with T I N."""
    u, a, b = (normal(n, *shape).requires_grad_() for n, shape in enumerate([(1, 512, 4), (4, 64), (1, 512, 64)]))
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda z: held.append(z.numel()) or z, lambda z: z):
        selective_scan(u, u.detach().abs(), -a.exp(), b, b, chunk=32)
    assert sum(held) < 512 * 4 * 64


@pytest.mark.parametrize("case", ["a_", "b_"])
def test_gives_the_numbers_of_the_released_layer(case: str) -> None:
    """Their convolution reads hidden tokens as zeros, as no bias is there: with padding on the left, as ours does."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    z["conv1d.weight"] = z["conv1d.weight"][:, 0]
    layer = Mamba(5, state_dim=3, dt_rank=2).double()
    layer.load_state_dict({own: z[their] for own, their in NAMES.items() if their in z})
    x = z["x"].clone().requires_grad_()
    out = layer(x, mask=z["keep"].bool() if "keep" in z else None)
    close(out.detach(), z["out"])
    leaves = [x, layer.log_rate, layer.select_weight]
    for g, name in zip(torch.autograd.grad((out * z["w"]).sum(), leaves), ("gx", "gA_log", "gx_proj"), strict=True):
        close(g, z[name])


def test_a_long_step_forgets_and_a_short_one_skips() -> None:
    """The first channel of a token says how long its step is: 1.6, and nothing earlier is seen; -0.6, and
    nothing is written, so that what follows is the same without that token."""
    layer = filled(3, conv_size=1)
    with torch.no_grad():
        layer.in_proj.weight[:10] = 0
        layer.in_proj.weight[:5] = torch.diag(torch.tensor([100.0, 1, 1, 1, 1]))
        layer.taps.fill_(1.0)
        layer.taps_bias.zero_()
        layer.select_weight[:2] = 0
        layer.select_weight[0, 0] = 1.0
        layer.dt_weight[:, 0] = 1.0
        layer.dt_bias.fill_(-60.0)
        layer.log_rate.zero_()
    x, other = normal(4, 2, 9, 5), normal(5, 2, 9, 5)
    x[..., 0], other[..., 0] = 0.6, 0.6
    other[:, 5:] = x[:, 5:]
    x[:, 5, 0] = other[:, 5, 0] = 1.6
    close(layer(x)[:, 5:].detach(), layer(other)[:, 5:].detach())
    x[:, 5, 0] = other[:, 5, 0] = 0.6
    assert (layer(x) - layer(other))[:, 5].abs().max() > 1e-3, "with usual steps the past is seen"
    x[:, 5, 0] = -0.6
    without = torch.cat([x[:, :5], x[:, 6:]], 1)
    close(layer(x)[:, 6:].detach(), layer(without)[:, 5:].detach())


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6, bias=True), normal(6, 3, 7, 5), normal(7, 3, 4, 5)
    lengths = (7, 4, 1)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(3, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values() -> None:
    layer = regard.create("mamba", dim=40, num_heads=4, causal=True)
    torch.testing.assert_close(layer.log_rate.detach().exp(), torch.arange(1.0, 17.0).expand(80, 16))
    steps = F.softplus(layer.dt_bias.detach())
    assert 0.00099 < steps.min() < steps.max() < 0.101
    assert layer.dt_rank == 3
    assert 0.9 * 3**-0.5 < layer.dt_weight.abs().max() <= 3**-0.5
    assert layer.skip.eq(1).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"dt_rank is too small \(got 0\)"):
        filled(1, dt_rank=0)
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 5\)"):
        layer(normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the MambaState"):
        layer.step(normal(1, 3, 1, 5), None)
    u = normal(1, 1, 3, 4)
    with pytest.raises(ValueError, match="b has the wrong shape"):
        selective_scan(u, u.abs(), normal(2, 4, 2), u, u)

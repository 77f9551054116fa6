"""HGRN against loops, and its recurrence against numbers of flash-linear-attention's plain loop.

The loops' author has read neither code nor test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_hgrn import bounds, hgrn
from regard.kernels.channel_scan import channel_scan
from regard.laws.agreement import close
from regard.linear import HGRN
from regard.linear.hgrn import forget_gate, lower_bound

VECTORS = Path(__file__).parents[1] / "vectors" / "hgrn.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> HGRN:
    layer = regard.create("hgrn", dim=5, num_heads=1, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


@pytest.mark.parametrize("options", [{}, {"layers": 4, "layer": 2, "width": 7}, {"layers": 3, "layer": 2, "eps": 0.2}])
def test_equals_the_loops(options: dict) -> None:
    layer, x = filled(1, **options), normal(1, 2, 6, 5).requires_grad_()
    direction = normal(2, 2, 6, 5)
    wi, wf = layer.in_proj.weight.chunk(2)
    gamma = None if layer.bounds is None else bounds(layer.bounds.table)[layer.layer]
    want, last = hgrn(x, wi, wf, layer.gate_proj.weight, layer.o_proj.weight, layer.norm_weight, gamma, layer.eps)
    got = layer(x)
    close(got.detach(), want.detach())
    close(layer.step(x, layer.init_state(2, 9, dtype=torch.float64))[1].h.detach(), last.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_the_recurrence_gives_the_numbers_of_a_released_loop() -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix("h_"): torch.from_numpy(file[k]) for k in file}
    x, decay = z["x"].clone().requires_grad_(), z["log_decay"].clone().requires_grad_()
    out, last = channel_scan(x, decay, state=z["state0"])
    close(out.detach(), z["out"])
    close(last.detach(), z["state"])
    for g, name in zip(torch.autograd.grad((out * z["w"]).sum(), [x, decay]), ("gx", "glog_decay"), strict=True):
        close(g, z[name])


def test_bounds() -> None:
    """They grow from layer to layer, from 0 on; the gate keeps its digits where it is nearly shut or open."""
    table = normal(1, 4, 3)
    for layer in range(4):
        close(lower_bound(table, layer), bounds(table)[layer])
    grown = torch.stack([lower_bound(table, layer) for layer in range(4)]).diff(dim=0)
    assert grown.min() > 0
    logits = torch.tensor([-200.0, -40.0, 0.0, 40.0, 200.0], dtype=torch.float64)
    kept, written = forget_gate(logits, None)
    assert kept[:2].tolist() == [-200.0, -40.0]
    assert (written[3:] / (-logits[3:]).exp() - 1).abs().max() < 1e-12
    kept, written = forget_gate(logits, torch.full((5,), 0.25, dtype=torch.float64))
    close(kept.exp() + written, torch.ones(5, dtype=torch.float64))
    assert kept.exp().min() >= 0.25


def test_upper_layers_remember_longer() -> None:
    """All tokens ask to forget all. What the first wrote, in terms of what the last did, is g_l^(T - 1)."""
    x = torch.zeros(1, 4, 5, dtype=torch.float64)
    x[..., 4] = 1.0
    x[0, 0, 0] = x[0, 3, 1] = 3.0
    left = []
    for layer in range(4):
        mixer = filled(1, layers=4, layer=layer)
        with torch.no_grad():
            for p in mixer.parameters():
                p.zero_()
            mixer.in_proj.weight[:5].copy_(torch.diag(torch.tensor([1.0, 1, 1, 1, 0])))
            mixer.in_proj.weight[5:, 4] = -100.0
            mixer.gate_proj.weight[:, 4] = 1.0
            mixer.norm_weight.fill_(1.0)
            mixer.o_proj.weight.copy_(torch.eye(5))
        out = mixer(x)[0, 3].detach()
        left.append(float(out[0] / out[1]))
    close(torch.tensor(left).double(), torch.tensor([0, 0.25, 0.5, 0.75]).double() ** 3)


def test_layers_share_their_bounds() -> None:
    layers = [filled(n, layers=3, layer=n) for n in range(3)]
    regard.share(*layers)
    assert layers[0].bounds is None
    assert layers[1].bounds.table is layers[2].bounds.table


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6, conv_size=3), normal(6, 3, 7, 5), normal(7, 3, 4, 5)
    lengths = (7, 4, 1)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(3, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"layer is too large \(got 3\)|layer .*got 3"):
        HGRN(5, layers=3, layer=3)
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 5\)"):
        layer(normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the HGRNState"):
        layer.step(normal(1, 3, 1, 5), None)

"""Registers against the same tokens put before the sequence by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.mixers.registers import Registers
from regard.pipeline.page_pool import PagePool

CAUSAL = ["softmax", "rotary", "memory_kv+rotary", "linear", "mla(absorb=True)", "window(window=4)"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(spec: str, *, causal: bool = True, R: int = 3) -> Registers:
    torch.manual_seed(0)
    return Registers(regard.create(spec, dim=16, num_heads=2, causal=causal), 16, num_registers=R, std=1.0).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", ["softmax", "rotary", "linear"])
def test_are_tokens_before_the_sequence(spec: str, causal: bool) -> None:
    layer, x = made(spec, causal=causal), normal(1, 2, 7, 16)
    both = torch.cat([layer.registers.expand(2, -1, -1), x], 1)
    got = layer(x)
    torch.testing.assert_close(got, layer.mixer(both)[:, 3:])
    assert (got - layer.mixer(x)).abs().max() > 1e-2
    (grad,) = torch.autograd.grad(got.square().sum(), layer.registers)
    assert (grad.norm(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("spec", CAUSAL)
def test_steps_are_the_full_pass(spec: str) -> None:
    layer, x = made(spec), normal(1, 2, 9, 16)
    want = layer(x)
    pools = [None] if spec.startswith(("linear", "mla(")) else [None, PagePool(64, page_size=2)]
    for pool in pools:
        with torch.no_grad():
            state = layer.init_state(2, 9, **({} if pool is None else {"pool": pool}))
            outs = []
            for piece in torch.arange(9).split([1, 4, 1, 3]):
                y, state = layer.step(x[:, piece], state)
                outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), want.detach())


def test_gradients_reach_them_through_steps() -> None:
    layer, x = made("softmax"), normal(1, 1, 4, 16)
    y, _ = layer.step(x, layer.init_state(1, 4))
    got, want = (torch.autograd.grad(z.square().sum(), layer.registers)[0] for z in (y, layer(x)))
    torch.testing.assert_close(got, want)


def test_padding_and_positions() -> None:
    layer, x = made("rotary", causal=False), normal(1, 2, 6, 16)
    keep = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    spoilt = x.clone()
    spoilt[1, :2] = math.nan
    at = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    for mask in (keep, masks.padding(keep)):
        got = layer(spoilt, mask=mask, positions=at)
        torch.testing.assert_close(got[0], layer(x[:1])[0])
        torch.testing.assert_close(got[1, 2:], layer(x[1:, 2:])[0])


def test_run_through_a_stack() -> None:
    """Where blocks follow each other, what the first writes into a register the second reads."""
    torch.manual_seed(0)
    stack = nn.Sequential(*(regard.create("softmax", dim=16, num_heads=2) for _ in "12")).double()
    layer, x = Registers(stack, 16, num_registers=2, std=1.0).double(), normal(1, 1, 5, 16)
    both = torch.cat([layer.registers[None], x], 1)
    torch.testing.assert_close(layer(x), stack[1](stack[0](both))[:, 2:])


def test_refuses_what_it_cannot() -> None:
    layer, x = made("softmax"), normal(1, 1, 6, 16)
    with pytest.raises(ValueError, match="packs documents"):
        layer(x, mask=masks.packed(torch.tensor([0, 2, 6])))
    with pytest.raises(ValueError, match="mask can only hide keys"):
        layer(x, mask=masks.window(2))
    with pytest.raises(ValueError, match="dim is not the mixer's"):
        Registers(layer.mixer, 8)
    with pytest.raises(ValueError, match="num_registers"):
        Registers(layer.mixer, 16, num_registers=0)
    with pytest.raises(TypeError, match="mixer has the wrong type"):
        Registers(torch.relu, 16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no streaming form"):
        Registers(nn.Linear(16, 16), 16).init_state(1, 4)
    assert "16, num_registers=3" in repr(layer)
    assert float(Registers(layer.mixer, 16).registers.detach().abs().max()) < 1e-5

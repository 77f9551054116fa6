"""mLSTM against loops and the numbers of transformers' layer. The loops' author has read neither code nor test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_mlstm import cell, layer, parallel
from regard import masks
from regard.laws.agreement import close
from regard.linear import MLSTM, MatrixMemory, matrix_memory

VECTORS = Path(__file__).parents[1] / "vectors" / "S-mlstm.npz"
NAMES = {f"{n}_proj.weight": f"{n}.weight" for n in "qkv"}
NAMES |= {
    f"{own}_gate.{kind}": f"{own[0]}gate_preact.{kind}" for own in ("input", "forget") for kind in ("weight", "bias")
}
NAMES |= {"gate_proj.weight": "ogate_preact.weight", "o_proj.weight": "out_proj.weight"}
NAMES |= {"norm_weight": "multihead_norm.weight"}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> MLSTM:
    made = regard.create("mlstm", dim=8, num_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return made


def theirs(made: MLSTM) -> dict[str, Tensor]:
    held = dict(made.named_parameters())
    return {their: held[own] for own, their in NAMES.items()}


def given(scale: float = 1.0) -> list[Tensor]:
    """Queries, keys, values, gates."""
    gates = [scale * normal(n, 2, 2, 9) for n in (4, 5)]
    return [normal(1, 2, 2, 9, 3), normal(2, 2, 2, 9, 3), normal(3, 2, 2, 9, 4), *gates]


def test_gives_the_numbers_of_the_released_layer() -> None:
    with np.load(VECTORS) as file:
        z = {k: torch.from_numpy(file[k]) for k in file}
    made = MLSTM(8, 2).double()
    made.load_state_dict({own: z[their] for own, their in NAMES.items()})
    x = z["x"].clone().requires_grad_()
    out = made(x)
    close(out.detach(), z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, made.input_gate.weight])
    for g, name in zip(grads, ("gx", "gigate"), strict=True):
        close(g, z[name])
    h, state = matrix_memory(*(z[n] for n in ("q", "k", "v", "input_gate", "forget_gate")))
    close(h, z["h"])
    for mine, name in zip(state, ("state", "norm_state", "max_state"), strict=True):
        close(mine, z[name].view(mine.shape), name)


@pytest.mark.parametrize(
    "options", [{}, {"gate_cap": 0.7, "eps": 0.2, "norm_eps": 0.1}, {"key_expand": 1.0, "value_expand": 1.5}], ids=str
)
def test_equals_the_loops(options: dict) -> None:
    """Gradients too, of all parameters: through the running maximum as well, which eps makes count."""
    made, x = filled(1, **options), normal(1, 2, 5, 8).requires_grad_()
    direction = normal(2, 2, 5, 8)
    sizes = {"eps": options.get("eps", 1e-6), "norm_eps": options.get("norm_eps", 1e-6)}
    c = options.get("gate_cap", 15.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linear.naive_mlstm.cap", lambda z, _: c * torch.tanh(z / c))
        want = layer(x, theirs(made), 2, **sizes)[0]
    got = made(x)
    close(got.detach(), want.detach())
    leaves = [x, *made.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


@pytest.mark.parametrize("scale", [1.0, 40.0, 2000.0], ids=["small", "large", "huge"])
def test_the_scan_equals_the_recurrence_and_all_pairs(scale: float) -> None:
    """Gates of any size: nothing overflows, and the state is the recurrence's."""
    q, k, v, i, f = given(scale)
    got, want = matrix_memory(q, k, v, i, f), cell(q, k, v, i, f)
    close(got.out, want[0])
    for mine, other in zip(got.state, want[1], strict=True):
        close(mine, other)
    if scale == 1.0:
        close(got.out, parallel(q, k, v, i, f)[0])
    parts = [z.split([4, 5], 2) for z in (q, k, v, i, f)]
    first = matrix_memory(*(z[0] for z in parts))
    second = matrix_memory(*(z[1] for z in parts), state=first.state)
    close(torch.cat([first.out, second.out], 2), got.out)
    leaves = [z.float().requires_grad_() for z in (q, k, v, i, f)]
    single = matrix_memory(*leaves).out
    assert (single - got.out).abs().max() < 1e-4 * (1 + got.out.abs().max())
    assert all(g.isfinite().all() for g in torch.autograd.grad(single.sum(), leaves))


def test_gates_reset_and_take_over() -> None:
    """A shut forget gate makes later outputs those of what follows alone, and so does a huge input gate."""
    q, k, v, i, f = given()
    other = v.clone()
    other[:, :, :4] *= -3
    difference = (matrix_memory(q, k, v, i, f).out - matrix_memory(q, k, other, i, f).out)[:, :, 4:]
    assert difference.abs().amax((0, 1, 3)).min() > 1e-3, "with open gates the past is seen"
    for gate, size in ((f, -900.0), (i, 900.0)):
        held = gate[:, :, 4].clone()
        gate[:, :, 4] = size
        outs = [matrix_memory(q, k, z, i, f).out for z in (v, other)]
        close(outs[0][:, :, 4:], outs[1][:, :, 4:])
        assert outs[0].isfinite().all()
        gate[:, :, 4] = held


def test_weights_are_signed_and_never_over_less_than_one() -> None:
    """Little that was written is read as little: what is divided by is at least 1."""
    q, k, v, i, f = given()
    few = matrix_memory(q, k, v, i - 20, f, eps=0.0).out
    close(matrix_memory(q, k, v, i - 21, f, eps=0.0).out, few / torch.e)
    many = matrix_memory(q, k, v, i + 20, f, eps=0.0).out
    close(matrix_memory(q, k, v, i + 21, f, eps=0.0).out, many)
    assert (many.abs() > v.abs().amax(2, keepdim=True)).any(), "signed weights make no mean"


def test_hidden_tokens_and_documents_anywhere() -> None:
    made, x = filled(3), normal(1, 1, 9, 8)
    real = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0]]).bool()
    close(made(x, mask=real)[real].detach(), made(x[real][None])[0].detach())
    got = made(x, mask=masks.packed(torch.tensor([0, 3, 5, 7, 9])) & masks.padding(real))
    for first, last in ((0, 3), (3, 5), (5, 7), (7, 9)):
        here = real[0, first:last]
        close(got[0, first:last][here].detach(), made(x[:, first:last][:, here])[0].detach())


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    made, x, new = filled(6), normal(6, 4, 7, 8), normal(7, 4, 4, 8)
    lengths = (7, 4, 1, 0)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = made.step(x.masked_fill(~keep[..., None], 1e4), made.init_state(4, 9, dtype=torch.float64), mask=keep)
    got, _ = made.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), made(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values() -> None:
    torch.manual_seed(0)
    made = regard.create("mlstm", dim=64, num_heads=4, causal=True)
    assert made.input_gate.bias.eq(-10).all()
    assert made.forget_gate.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    for linear in (made.input_gate, made.forget_gate, made.gate_proj):
        assert linear.weight.eq(0).all()
    assert abs(float(made.v_proj.weight.detach().std()) / (2 / 320) ** 0.5 - 1) < 0.1
    assert made.q_proj.weight.shape == (32, 64)
    assert made.norm_weight.eq(1).all()


def test_bad_input() -> None:
    for option, value in (("gate_cap", 0.0), ("eps", -1.0), ("norm_eps", -1.0), ("key_expand", 0.3)):
        with pytest.raises(ValueError, match=f"MLSTM: {option} "):
            MLSTM(8, 2, **{option: value})
    made = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 8\)"):
        made(normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got tuple\); expected the MatrixMemory"):
        made.step(normal(1, 3, 1, 8), ())
    q, k, v, i, f = given()
    with pytest.raises(ValueError, match="matrix_memory: forget_gate"):
        matrix_memory(q, k, v, i, f[..., :3])
    with pytest.raises(ValueError, match="state"):
        matrix_memory(q, k, v, i, f, state=MatrixMemory(normal(1, 2, 2, 4, 4), normal(1, 2, 2, 4), normal(1, 2, 2)))

"""Input feeding against the steps written out, and without what is fed."""

import pytest
import torch
from torch import Tensor, nn

from regard.laws.agreement import close, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import LocalLuongAttention, LuongAttention, LuongDecoder


def build(local: bool) -> LuongDecoder:
    torch.manual_seed(3)
    attention = LocalLuongAttention(4, alignment="monotonic", half_width=1) if local else LuongAttention(4)
    model = LuongDecoder(3, attention).double()
    perturb(model)
    return model


def lstm(model: LuongDecoder, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    gates = x @ model.cell.weight_ih.T + model.cell.bias_ih + h @ model.cell.weight_hh.T + model.cell.bias_hh
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("local", [False, True])
def test_equals_the_steps_written_out(local: bool) -> None:
    model, x, context = build(local), tokens(2, 5, dim=3), tokens(2, 6, dim=4, seed=7)
    keep = torch.arange(6) < torch.tensor([[6], [4]])
    h = c = fed = torch.zeros(2, 4, dtype=torch.float64)
    want = []
    for t in range(5):
        h, c = lstm(model, torch.cat([x[:, t], fed], -1), h, c)
        if local:
            last = keep.sum(1) - 1
            centre = torch.minimum(torch.tensor(t), last)[:, None]
            seen = keep & ((torch.arange(6) - centre).abs() <= 1)
        else:
            seen = keep
        scores = (model.attention.score.q_proj(h)[:, None] @ context.mT)[:, 0].masked_fill(~seen, -torch.inf)
        looked = (scores.softmax(-1)[:, None] @ context)[:, 0]
        fed = torch.tanh(torch.cat([looked, h], -1) @ model.attention.c_proj.weight.T)
        want.append(fed)
    close(model(x, context, mask=keep), torch.stack(want, 1))


@pytest.mark.parametrize("local", [False, True])
def test_steps_are_the_full_pass(local: bool) -> None:
    model, x, context = build(local), tokens(2, 5, dim=3), tokens(2, 6, dim=4, seed=7)
    state, out = model.start(x), []
    for part in x.split([2, 0, 1, 2], 1):
        before = state
        y, state = model.step(part, context, state)
        same(model.step(part, context, before)[0], y)
        out.append(y)
    close(torch.cat(out, 1), model(x, context))


def test_without_feeding_it_is_attention_over_an_lstm() -> None:
    model, x, context = build(False), tokens(2, 5, dim=3), tokens(2, 6, dim=4, seed=7)
    with torch.no_grad():
        model.cell.weight_ih[:, 3:] = 0
    plain = nn.LSTM(3, 4, batch_first=True).double()
    with torch.no_grad():
        plain.weight_ih_l0.copy_(model.cell.weight_ih[:, :3])
        plain.weight_hh_l0.copy_(model.cell.weight_hh)
        plain.bias_ih_l0.copy_(model.cell.bias_ih)
        plain.bias_hh_l0.copy_(model.cell.bias_hh)
    close(model(x, context), model.attention(plain(x)[0], context))


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 5, 4\)\); expected \(B, T, E = 3\)"):
        build(False)(tokens(2, 5, dim=4), tokens(2, 6, dim=4))

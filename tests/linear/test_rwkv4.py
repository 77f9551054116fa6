"""RWKV-4 against loops and the numbers of transformers' layers. The loops' author has read neither code nor test."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_rwkv import channel_mix, initial, time_mix, wkv_recurrent
from linear.naive_rwkv import wkv as naive_wkv
from regard import masks
from regard.laws.agreement import close
from regard.linear import RWKV4, WKVState, wkv
from regard.linear._rwkv import ChannelMix

VECTORS = Path(__file__).parents[1] / "vectors" / "S-rwkv.npz"
NAMES = {
    "mix_k": "time_mix_key",
    "mix_v": "time_mix_value",
    "mix_r": "time_mix_receptance",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "r_proj.weight": "receptance.weight",
    "o_proj.weight": "output.weight",
    "log_rate": "time_decay",
    "bonus": "time_first",
}
MIXED = {
    "mix_k": "time_mix_key",
    "mix_r": "time_mix_receptance",
    "in_proj.weight": "key.weight",
    "gate_proj.weight": "receptance.weight",
    "out_proj.weight": "value.weight",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> RWKV4:
    layer = regard.create("rwkv4", dim=5, num_heads=1, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def theirs(module: torch.nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    held = dict(module.named_parameters())
    return {their: held[own] for own, their in names.items()}


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


@pytest.mark.parametrize("width", [5, 3])
def test_equals_the_loops(width: int) -> None:
    layer, x = filled(1, width=width), normal(1, 2, 6, 5).requires_grad_()
    direction = normal(2, 2, 6, 5)
    got, want = layer(x), time_mix(x, theirs(layer, NAMES))[0]
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_a_block_is_both_mixes_behind_norms() -> None:
    layer, x = filled(2, channel_mix=7), normal(1, 2, 6, 5)
    first, second = (lambda z, n=norm: F.layer_norm(z, (5,), n.weight, n.bias) for norm in layer.norms)
    h = x + time_mix(first(x), theirs(layer, NAMES))[0]
    want = h + channel_mix(second(h), theirs(layer.ffn, MIXED))[0]
    close(layer(x).detach(), want.detach())


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["small", "large"])
def test_the_sums_equal_the_softmax_and_the_recurrence(scale: float) -> None:
    """However large the keys: no weight overflows, and the state is the recurrence's."""
    k, v, u = scale * normal(1, 2, 9, 3), normal(2, 2, 9, 3), normal(3, 3)
    w = torch.tensor([1e-3, 0.4, 20.0], dtype=torch.float64)
    got = wkv(k, v, w, u)
    close(got.out, naive_wkv(k, v, w, u))
    for mine, other in zip(got.state, wkv_recurrent(k, v, w, u)[1], strict=True):
        close(mine, other)
    first = wkv(k[:, :4], v[:, :4], w, u)
    second = wkv(k[:, 4:], v[:, 4:], w, u, state=first.state)
    close(torch.cat([first.out, second.out], 1), got.out)
    single = wkv(*(z.float() for z in (k, v, w, u)))
    assert (single.out - got.out).abs().max() < 1e-5 * scale


def test_gives_the_numbers_of_the_released_layers() -> None:
    z = vectors("a_")
    layer = RWKV4(6, width=8).double()
    layer.load_state_dict({own: z[their].squeeze() for own, their in NAMES.items()})
    x = z["x"].clone().requires_grad_()
    out = layer(x)
    close(out.detach(), z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, layer.log_rate, layer.bonus])
    for g, name in zip(grads, ("gx", "gtime_decay", "gtime_first"), strict=True):
        close(g, z[name])
    z = vectors("c_")
    mix = ChannelMix(6, 24).double()
    mix.load_state_dict({own: z[their].squeeze() for own, their in MIXED.items()})
    x = z["x"].clone().requires_grad_()
    out = mix(x)[0]
    close(out.detach(), z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


def test_each_channel_forgets_at_its_own_rate() -> None:
    """Equal keys, one value of 1: what is read of it d tokens on, in terms of the last of all values' share."""
    layer = filled(1, width=4)
    rates = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.v_proj.weight.copy_(torch.eye(5)[:4])
        layer.o_proj.weight.copy_(2 * torch.eye(5)[:, :4])
        layer.mix_v.fill_(1.0)
        layer.log_rate.copy_(rates.log())
    x = torch.zeros(9, 9, 5, dtype=torch.float64)
    x.diagonal().fill_(1)  # row j: a value of 1 at token j
    weight = layer(x)[:, 8, :4].detach()
    close(weight.sum(0), torch.ones(4, dtype=torch.float64))
    close(weight[:7] / weight[1:8], (-rates).exp().expand(7, 4))
    close(weight[8] / weight[7], torch.ones(4, dtype=torch.float64))


def test_it_is_a_mean_that_no_shift_of_the_keys_changes() -> None:
    k, v, w, u = 3 * normal(1, 2, 7, 4), normal(2, 2, 7, 4), normal(3, 4).exp(), normal(4, 4)
    out = wkv(k, v, w, u).out
    assert (out <= v.cummax(1).values + 1e-12).all()
    assert (out >= v.cummin(1).values - 1e-12).all()
    close(wkv(k + 5 * normal(5, 4), v, w, u).out, out)


def test_hidden_tokens_and_documents_anywhere() -> None:
    """Hidden tokens first, last, between, and a document with none that is real; no time passes over them."""
    layer, x = filled(3, channel_mix=6), normal(1, 1, 9, 5)
    real = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0]]).bool()
    whole = layer(x, mask=real)[real]
    close(whole.detach(), layer(x[real][None])[0].detach())
    packed = masks.packed(torch.tensor([0, 3, 5, 7, 9]))
    got = layer(x, mask=packed & masks.padding(real))
    for first, last in ((0, 3), (3, 5), (5, 7), (7, 9)):
        here = real[0, first:last]
        close(got[0, first:last][here].detach(), layer(x[:, first:last][:, here])[0].detach())


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6, channel_mix=6), normal(6, 4, 7, 5), normal(7, 4, 4, 5)
    lengths = (7, 4, 1, 0)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(4, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values() -> None:
    layer = regard.create("rwkv4", dim=8, num_heads=1, causal=True, width=12, layers=5, layer=2, channel_mix=16)
    decay, m_k, m_v, m_r = initial(12, 8, 2, 5)
    for p, want in zip((layer.log_rate, layer.mix_k, layer.mix_v, layer.mix_r), (decay, m_k, m_v, m_r), strict=True):
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.ffn.mix_r.detach().double(), m_k, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bonus[:4].detach(), torch.tensor([0.0, 0.5, -0.5, 0.0]) + torch.tensor(0.3).log())
    assert regard.create("rwkv4", dim=8, num_heads=1, causal=True).norms is None


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"RWKV4: layer .*got 3"):
        RWKV4(5, layers=3, layer=3)
    with pytest.raises(ValueError, match=r"RWKV4: channel_mix is too small \(got -1\)"):
        RWKV4(5, channel_mix=-1)
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 5\)"):
        layer(normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got WKVState\); expected the RWKV4State"):
        layer.step(normal(1, 3, 1, 5), WKVState(*torch.zeros(3, 3, 5)))
    with pytest.raises(ValueError, match="wkv: "):
        wkv(normal(1, 2, 3, 4), normal(1, 2, 3, 5), normal(2, 4), normal(2, 4))

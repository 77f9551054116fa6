"""RWKV-6 against loops and the numbers of the official layer. The loops' author has read neither code nor test."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_rwkv import rwkv6
from regard import masks
from regard.laws.agreement import close
from regard.linear import RWKV6, RWKV6State, wkv6
from regard.linear._rwkv import ChannelMix

VECTORS = Path(__file__).parents[1] / "vectors"
NAMES = {
    "mix_x": "time_maa_x",
    "log_rate": "time_decay",
    "mix_up": "time_maa_w2",
    "bonus": "time_faaaa",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "r_proj.weight": "receptance.weight",
    "gate_proj.weight": "gate.weight",
    "o_proj.weight": "output.weight",
    "norm_weight": "ln_x.weight",
    "norm_bias": "ln_x.bias",
}
TURNED = {"mix_down.weight": "time_maa_w1", "decay_down.weight": "time_decay_w1", "decay_up.weight": "time_decay_w2"}
"""Matrices that theirs has inputs first."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, **options) -> RWKV6:
    layer = regard.create("rwkv6", dim=6, num_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.4 * normal(100 * seed + n, *p.shape))
    return layer


def vectors(file: str, case: str = "") -> dict[str, Tensor]:
    with np.load(VECTORS / file) as held:
        return {k.removeprefix(case): torch.from_numpy(held[k]) for k in held if k.startswith(case)}


def ours(z: dict[str, Tensor]) -> dict[str, Tensor]:
    """What theirs calls otherwise."""
    own = {mine: z[their].squeeze() for mine, their in NAMES.items()}
    own |= {mine: z[their].mT for mine, their in TURNED.items()}
    return own | {"mix": torch.stack([z[f"time_maa_{n}"].flatten() for n in "wkvrg"])}


def test_the_kernel_equals_the_loops_and_released_numbers() -> None:
    z = vectors("S-rwkv.npz", "f_")
    names = ("r", "k", "v", "log_decay", "u")
    given = {n: z[n].clone().requires_grad_() for n in names}
    out, state = wkv6(*given.values(), state=z["state0"])
    close(out.detach(), z["out"])
    close(state.detach(), z["state"])
    loss = (out * z["w"]).sum() + (state * z["ws"]).sum()
    for n, g in zip(names, torch.autograd.grad(loss, list(given.values())), strict=True):
        close(g, z[f"g{n}"])
    for mine, other in zip((out, state), rwkv6(*given.values(), z["state0"]), strict=True):
        close(mine.detach(), other.detach())


def test_gives_the_numbers_of_the_official_layer() -> None:
    """Values, and gradients of all parameters."""
    both = vectors("rwkv6_layer.npz")
    z = vectors("rwkv6_layer.npz", "t_")
    layer = RWKV6(8, 2).double()
    layer.load_state_dict(ours(z))
    x = both["x"].clone().requires_grad_()
    out = layer(x)
    close(out.detach(), z["out"])
    (out * both["w"]).sum().backward()
    close(x.grad, z["gx"])
    held = dict(layer.named_parameters())
    for name, g in ours({k.removeprefix("g_"): t for k, t in z.items() if k.startswith("g_")}).items():
        close(held[name].grad, g, name)
    z = vectors("rwkv6_layer.npz", "m_")
    mix = ChannelMix(8, 28).double()
    names = {"in_proj.weight": "key.weight", "gate_proj.weight": "receptance.weight", "out_proj.weight": "value.weight"}
    shares = {f"mix_{n}": 1 - z[f"time_maa_{n}"].flatten() for n in "kr"}
    mix.load_state_dict({own: z[their] for own, their in names.items()} | shares)
    close(mix(both["x"])[0].detach(), z["out"])


def test_a_block_is_both_mixes_behind_norms() -> None:
    layer, x = filled(2, channel_mix=7, layers=3, layer=1), normal(1, 2, 6, 6)
    alone = filled(2, layers=3, layer=1)
    alone.load_state_dict({k: t for k, t in layer.state_dict().items() if not k.startswith(("ffn", "norms"))})
    first, second = (lambda z, n=norm: F.layer_norm(z, (6,), n.weight, n.bias) for norm in layer.norms)
    h = x + alone(first(x))
    close(layer(x).detach(), (h + layer.ffn(second(h))[0]).detach())


def test_a_block_in_bfloat16_rounds_only_after_norm_and_mix() -> None:
    """Rounded in between, too, errors are larger: a head that gives nearly 0 is normed to 1, and they with it."""
    x, off, rounded = normal(1, 64, 6, 6).bfloat16(), 0.0, 0.0
    for seed in range(2, 6):
        layer = filled(seed, channel_mix=7, layers=3, layer=1).bfloat16()
        exact, early = copy.deepcopy(layer).double()(x.double()), copy.deepcopy(layer)
        for mix, own in ((early, "time_mix"), (early.ffn, "forward")):
            setattr(mix, own, of_bfloat16(getattr(mix, own)))
        off += (layer(x) - exact).abs().mean()
        rounded += (early(x) - exact).abs().mean()
    assert off < 0.95 * rounded


def of_bfloat16(run):
    return lambda z, *rest: run(z.bfloat16(), *rest)


def test_a_token_may_empty_the_memory() -> None:
    """A token whose first channel is 1 opens all decays: what follows it is the same after any past."""
    layer = filled(3)
    with torch.no_grad():
        for p in (layer.mix_x, layer.mix, layer.mix_up, layer.decay_down.weight):
            p.zero_()  # no token looks at the one before, but through the memory
        layer.decay_down.weight[:, 0] = 50
        layer.decay_up.weight.fill_(1.0)
        layer.log_rate.fill_(-10.0)
    x, other = normal(4, 2, 9, 6), normal(5, 2, 9, 6)
    other[:, 5:] = x[:, 5:]
    x[..., 0] = other[..., 0] = 0
    difference = (layer(x) - layer(other))[:, 6:].abs().amax((0, 2))
    assert difference.min() > 1e-3, "without such a token the past is seen"
    x[:, 5, 0] = other[:, 5, 0] = 1
    close(layer(x)[:, 6:].detach(), layer(other)[:, 6:].detach())
    assert (layer(x) - layer(other))[:, 5].abs().max() > 1e-3, "the token itself still reads it"


def test_keys_are_no_logits() -> None:
    """A shift of all keys, which changes nothing in RWKV-4, does here."""
    r, k, v, u = normal(1, 1, 2, 5, 3), normal(2, 1, 2, 5, 3), normal(3, 1, 2, 5, 4), normal(4, 2, 3)
    g = -normal(5, 1, 2, 5, 3).abs()
    assert (wkv6(r, k, v, g, u).out - wkv6(r, k + 1, v, g, u).out).abs().min() > 1e-3


def test_hidden_tokens_and_documents_anywhere() -> None:
    layer, x = filled(3, channel_mix=6, head_dim=4), normal(1, 1, 9, 6)
    real = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 0]]).bool()
    close(layer(x, mask=real)[real].detach(), layer(x[real][None])[0].detach())
    got = layer(x, mask=masks.packed(torch.tensor([0, 3, 5, 7, 9])) & masks.padding(real))
    for first, last in ((0, 3), (3, 5), (5, 7), (7, 9)):
        here = real[0, first:last]
        close(got[0, first:last][here].detach(), layer(x[:, first:last][:, here])[0].detach())


def test_decoding_goes_on_behind_padding_on_the_right() -> None:
    layer, x, new = filled(6, channel_mix=6), normal(6, 4, 7, 6), normal(7, 4, 4, 6)
    lengths = (7, 4, 1, 0)
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    _, state = layer.step(x.masked_fill(~keep[..., None], 1e4), layer.init_state(4, 9, dtype=torch.float64), mask=keep)
    got, _ = layer.step(new, state)
    for row, n in enumerate(lengths):
        close(got[row].detach(), layer(torch.cat([x[row, :n], new[row]])[None])[0, n:].detach())


def test_starting_values_are_the_official_ones() -> None:
    torch.manual_seed(0)
    layer = regard.create("rwkv6", dim=8, num_heads=2, causal=True, layers=5, layer=2, channel_mix=28)
    z = vectors("rwkv6_layer.npz", "s_")
    mix = torch.stack([z[f"time_maa_{n}"].flatten() for n in "wkvrg"])
    for got, want in ((layer.mix, mix), *((getattr(layer, n), z[NAMES[n]]) for n in ("mix_x", "log_rate", "bonus"))):
        torch.testing.assert_close(got.detach().double(), want.view(got.shape), rtol=1e-6, atol=1e-6)
    shares = vectors("rwkv6_layer.npz", "sc_")
    torch.testing.assert_close(
        layer.ffn.mix_k.detach().double(), 1 - shares["time_maa_k"].flatten(), rtol=1e-6, atol=1e-6
    )
    for down, up in ((layer.mix_down.weight, layer.mix_up), (layer.decay_down.weight, layer.decay_up.weight)):
        assert down.eq(0).all()
        assert 0.004 < up.abs().mean() < 0.006
    assert layer.mix_down.weight.shape == (160, 8)
    assert layer.decay_down.weight.shape == (64, 8)
    torch.testing.assert_close(layer.norm_weight.detach(), torch.full((8,), 0.6**0.7))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"RWKV6: layer .*got 3"):
        RWKV6(6, 2, layers=3, layer=3)
    with pytest.raises(ValueError, match=r"RWKV6: mix_rank is too small \(got 0\)"):
        RWKV6(6, 2, mix_rank=0)
    with pytest.raises(ValueError, match="RWKV6: "):
        RWKV6(6, 4)
    layer = filled(1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 6\)"):
        layer(normal(1, 2, 3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got tuple\); expected the RWKV6State"):
        layer.step(normal(1, 3, 1, 6), ())
    assert isinstance(layer.init_state(2, 5), RWKV6State)
    with pytest.raises(ValueError, match="wkv6: "):
        wkv6(*normal(1, 3, 1, 2, 4, 3), normal(2, 1, 2, 4, 2), normal(3, 2, 3))

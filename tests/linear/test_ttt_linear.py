"""TTT-Linear against loops (naive_ttt.py, whose author has read neither code nor tests), against numbers of the
authors' layer and of flash-linear-attention, and what it promises.

The last b of flash-linear-attention also holds gradients of the zeros that fill its last mini-batch, which no token of
the sequence has: it is compared where whole mini-batches end, and with such zeros as tokens.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_ttt as naive
from regard.kernels.delta_scan import delta_scan
from regard.laws.agreement import close
from regard.linear import TTTLinear, taught_linear

VECTORS = Path(__file__).parents[1] / "vectors"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors(name: str, case: str) -> dict[str, Tensor]:
    with np.load(VECTORS / name) as file:
        return {n[2:]: torch.from_numpy(file[n]) for n in file if n[:2] == f"{case}_"}


def layer(dim: int = 8, heads: int = 2, **options: Any) -> TTTLinear:
    torch.manual_seed(1)
    made = regard.create("ttt_linear", dim=dim, num_heads=heads, causal=True, dtype=torch.float64, **options)
    assert isinstance(made, TTTLinear)
    return made


def by_reader(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, w: Tensor, c: Tensor, n: int, **more: Any
) -> tuple[Tensor, Any]:
    """In the loops' form; all (B, H, T, D)."""
    return taught_linear(
        q / math.sqrt(q.shape[3]), k, v, eta, torch.ones_like(eta), (w, c), mini_batch=n, residual="output", **more
    )


def given(B: int, H: int, T: int, D: int) -> list[Tensor]:
    leaves = [normal(n, B, H, T, D) for n in range(3)]
    leaves += [0.1 + 0.3 * normal(4, B, H, T).sigmoid(), 1 + 0.2 * normal(5, H, D), 0.2 * normal(6, H, D)]
    return [z.requires_grad_() for z in leaves]


@pytest.mark.parametrize("sizes", [(2, 2, 7, 3, 3), (1, 1, 4, 2, 1), (1, 2, 3, 4, 8)], ids=str)
def test_equals_the_loops(sizes: tuple[int, ...]) -> None:
    """Outputs, last state and gradients, all at once and by pieces, from a start that is not 0."""
    *shape, n = sizes
    B, H, T, D = shape
    leaves = given(*shape)
    begin = normal(7, H, D + 1, D)
    first = (begin[None, :, :D].expand(B, -1, -1, -1), begin[None, :, D].expand(B, -1, -1))
    turned = [z.transpose(1, 2) for z in leaves[:3]]
    out, W, b = naive.ttt_linear(*turned, *leaves[4:], leaves[3].transpose(1, 2), n, state=first)
    want = [out.transpose(1, 2), W, b]

    def answer(pieces: list[int]) -> list[Tensor]:
        state, outs = None, []
        for q, k, v, eta in zip(*(z.split(pieces, 2) for z in leaves[:4]), strict=True):
            y, state = by_reader(q, k, v, eta, *leaves[4:], n, start=begin, state=state)
            outs.append(y)
        end = begin + state.learnt()
        return [torch.cat(outs, 2), end[:, :, :D], end[:, :, D]]

    for pieces in ([T], [1] * T, [1, T - 2, 1], [0, T - 1, 0, 1], [2] * (T // 2) + [T % 2]):
        for part, (g, x) in enumerate(zip(answer(pieces), want, strict=True)):
            close(g.detach(), x.detach())
            along, used = normal(9, *x.shape), leaves[1:] if part else leaves  # no query reads into the state
            for a, e in zip(*(torch.autograd.grad(z, used, along, retain_graph=True) for z in (g, x)), strict=True):
                close(a, e)


def test_the_inner_gradient_is_one() -> None:
    """The loops with gradients by autograd in place of the closed form."""
    leaves = [z.detach() for z in given(1, 2, 5, 3)]
    turned = [z.transpose(1, 2) for z in leaves[:3]]
    options: dict[str, Any] = {"gradient": naive.slope_by_autograd}
    want = naive.ttt_linear(*turned, *leaves[4:], leaves[3].transpose(1, 2), 2, **options)[0]
    close(by_reader(*leaves, 2)[0], want.transpose(1, 2))


def test_gives_the_numbers_of_flash_linear_attention() -> None:
    z = vectors("ttt_naive.npz", "t")
    q, k, v, eta = (z[n].transpose(1, 2) for n in ("q", "k", "v", "eta"))
    leaves = [k.requires_grad_(), v.requires_grad_(), z["ln_weight"].requires_grad_()]
    norm = (leaves[2], z["ln_bias"])
    out, state = by_reader(q, *leaves[:2], eta[..., 0], *norm, 3)
    assert (out.transpose(1, 2) - z["out"]).abs().max() < 1e-10
    end = state.learnt()
    assert (end[:, :, :3] - z["state"]).abs().max() < 1e-10
    grads = torch.autograd.grad((out.transpose(1, 2) * z["w"]).sum(), leaves)
    for g, n in zip(grads, ("gk", "gv", "gln_weight"), strict=True):
        want = z[n] if n == "gln_weight" else z[n].transpose(1, 2)
        assert (g - want).abs().max() < 1e-10 * (1 + want.abs().max())
    assert 1e-5 < (end[:, :, 3:] - z["state_bias"]).abs().max() < 1e-2, "theirs has gradients of what fills it up"
    last = eta[:, :, -1:, 0].expand(-1, -1, 2)
    zeros = torch.zeros_like(q[:, :, :2])
    filled = by_reader(*(torch.cat([x, zeros], 2) for x in (q, k, v)), torch.cat([eta[..., 0], last], 2), *norm, 3)[1]
    assert (filled.learnt()[:, :, 3:] - z["state_bias"]).abs().max() < 1e-10


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Their layer, values and gradients of everything: (a) by default, (b) with convolutions, gate and another rate."""
    z = vectors("ttt_official.npz", case)
    options = {"share_qk": True, "gate": True, "conv_size": 3, "base_rate": 0.7} if case == "b" else {}
    ours, x = layer(8, 2, mini_batch=4, **options), z["x"].requires_grad_()

    def theirs(pre: str) -> dict[str, Tensor]:
        found = {
            "place": z[f"{pre}learnable_token_idx"],
            "rate_proj.weight": z[f"{pre}learnable_ttt_lr_weight"][:, 0],
            "rate_proj.bias": z[f"{pre}learnable_ttt_lr_bias"][:, 0],
            "norm_weight": z[f"{pre}ttt_norm_weight"],
            "norm_bias": z[f"{pre}ttt_norm_bias"],
            "start": torch.cat([z[f"{pre}W1"], z[f"{pre}b1"]], 1),
            "out_weight": z[f"{pre}post_norm.weight"],
            "out_bias": z[f"{pre}post_norm.bias"],
        }
        names = ["q", "v", "o", *("k" if case == "a" else "")]
        found |= {f"{n}_proj.weight": z[f"{pre}{n}_proj.weight"] for n in names}
        if case == "b":
            found["gate_proj.weight"] = z[f"{pre}g_proj.weight"]
            found["taps"] = torch.cat([z[f"{pre}conv_{n}.weight"][:, 0] for n in "qk"])
            found["taps_bias"] = torch.cat([z[f"{pre}conv_{n}.bias"] for n in "qk"])
        return found

    ours.load_state_dict(theirs(""))
    out = ours(x)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["gx"]).abs().max() < 1e-10
    want = theirs("g_")
    for name, p in ours.named_parameters():
        assert (p.grad - want[name]).abs().max() < 1e-10, name


def test_the_layer_in_the_other_form() -> None:
    """Rates of readers, over D and by place, and no rotation."""
    ours, x = layer(form="fla", mini_batch=3, rotary_base=None, base_rate=2.0), normal(1, 2, 8, 8)
    q, k, v = (p(x).unflatten(-1, (2, 4)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    eta = 2 / 4 * ours.rate_proj(x).sigmoid() / (1 + torch.arange(8) % 3)[:, None]
    first = (ours.start[None, :, :4].expand(2, -1, -1, -1), ours.start[None, :, 4].expand(2, -1, -1))
    out, _, _ = naive.ttt_linear(q, k, v, ours.norm_weight, ours.norm_bias, eta, 3, state=first)
    close(ours(x), ours.o_proj(torch.nn.functional.layer_norm(out.flatten(2), (8,), eps=1e-6)))


def test_one_token_a_mini_batch_without_norm_is_the_delta_rule() -> None:
    """The target v - k is that of values with the keys added; b is the row of one more feature that is always 1."""
    q, k, v = (normal(n, 1, 2, 6, 3) for n in range(3))
    eta = normal(4, 1, 2, 6).sigmoid()
    out, state = taught_linear(q, k, v + k, torch.ones_like(eta), eta, None, mini_batch=1)
    ones = torch.ones_like(q[..., :1])
    want = delta_scan(torch.cat([q, ones], -1), torch.cat([k, ones], -1), v, eta)
    close(out - q, want.out)
    close(state.learnt(), want.state)


def test_what_comes_again_is_learnt() -> None:
    """Six pairs in turn, 80 times: the inner loss falls, by what the state learns while it reads them."""
    k = torch.nn.functional.normalize(normal(1, 1, 1, 6, 12), dim=-1) * 3
    v = torch.nn.functional.layer_norm(normal(2, 1, 1, 6, 12), (12,))
    keys, values = k.repeat(1, 1, 80, 1), (v + k).repeat(1, 1, 80, 1)
    norm, even = (torch.ones(1, 12).double(), torch.zeros(1, 12).double()), torch.ones(1, 1, 480).double()
    begin = 0.02 * normal(3, 1, 13, 12)
    out, _ = taught_linear(keys, keys, values, even, 0.01 * even, norm, start=begin, mini_batch=6)
    loss = (out - keys - values + keys).square().sum(-1)[0, 0].unflatten(0, (80, 6)).mean(1)
    assert loss[-1] < 0.1 * loss[0]
    assert (loss.diff() < 0).double().mean() > 0.9


def test_padding_anywhere_moves_no_mini_batch() -> None:
    """Also in steps, where rows stand at other places of their mini-batches."""
    ours, x = layer(mini_batch=3, share_qk=True, gate=True), normal(1, 2, 9, 8)
    keep = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 1, 1, 1, 1]]).bool()
    state, outs = ours.init_state(2, 9), []
    for piece, real in zip(x.split([2, 1, 5, 1], 1), keep.split([2, 1, 5, 1], 1), strict=True):
        out, state = ours.step(piece, state, mask=real)
        outs.append(out)
    for b in range(2):
        want = ours(x[b : b + 1, keep[b]])[0]
        close(ours(x, mask=keep)[b, keep[b]], want)
        close(torch.cat(outs, 1)[b, keep[b]], want)
    assert state.filled.tolist() == [6 % 3, 6 % 3]


def test_starting_values_and_refusals() -> None:
    torch.manual_seed(0)
    ours = regard.create("ttt_linear", dim=128, num_heads=2, causal=True)
    assert (ours.mini_batch, ours.base_rate, ours.form, ours.share_qk, ours.gate_proj) == (
        16,
        1,
        "official",
        False,
        None,
    )
    for p in (ours.start[:, :-1], ours.rate_proj.weight):
        assert 0.018 < float(p.detach().std()) < 0.022
    for p in (ours.start[:, -1], ours.place, ours.norm_bias, ours.out_bias, ours.rate_proj.bias):
        assert not p.any()
    assert (ours.norm_weight == 1).all()
    assert (ours.out_weight == 1).all()
    for options, words in (
        ({"mini_batch": 0}, "TTTLinear: mini_batch is too small"),
        ({"base_rate": 0.0}, "TTTLinear: base_rate is out of range"),
        ({"conv_size": 0}, "TTTLinear: conv_size is too small"),
        ({"form": "jax"}, "TTTLinear: form is unknown"),
        ({"head_dim": 3}, "TTTLinear: head_dim is no multiple of pair = 2"),
        ({"num_kv_heads": 1}, "TTTLinear: num_kv_heads differs"),
        ({"causal": False}, "TTTLinear: causal is off"),
    ):
        with pytest.raises(ValueError, match=words):
            TTTLinear(8, 2, **{"causal": True, **options})
    for option in ("share_qk", "gate"):
        with pytest.raises(TypeError, match=option):
            TTTLinear(8, 2, causal=True, **{option: 1})
    x, eta = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    norm = (torch.ones(2, 4), torch.zeros(2, 4))
    for wrong, words in (
        ((x, x, x, eta[:, :1], eta, norm), "reading"),
        ((x, x, x, eta, eta, (norm[0][:1], norm[1])), "norm weight"),
        ((x, x, x[..., :3], eta, eta, norm), "v has the wrong shape"),
    ):
        with pytest.raises(ValueError, match=f"taught_linear: {words}"):
            taught_linear(*wrong)

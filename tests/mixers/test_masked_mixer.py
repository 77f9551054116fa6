"""The masked mixer against loops, the author's numbers (B076), and its claims: causal, and nothing gets lost."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from mixers.naive_masked_mixer import (
    naive_masked_mixer,
    naive_masked_mixer_block,
    naive_masked_mixer_expanded,
    naive_masked_mixer_heads,
)
from regard import masks
from regard.laws.agreement import close
from regard.mixers.masked_mixer import MaskedMixer, masked_mix

VECTORS = Path(__file__).parents[1] / "vectors" / "B076.npz"
FORMS = [{"form": "flat"}, {"kernel_width": 3}, {"form": "expanded"}, {"form": "heads", "num_heads": 3}]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def module(N: int, **options: object) -> MaskedMixer:
    made = MaskedMixer(6, max_length=N, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def naive(made: MaskedMixer, x: Tensor) -> Tensor:
    weights = [(m.weight, m.bias) for m in made.maps]
    if made.form == "flat":
        return naive_masked_mixer(x, weights[0][0][0], weights[0][1][0], causal=made.causal)
    if made.form == "expanded":
        pairs = (z[0, ..., 0] if z.dim() == 4 else z[0] for pair in weights for z in pair)
        return naive_masked_mixer_expanded(x, *pairs, causal=made.causal)
    blocks = zip(*(z.chunk(made.num_heads) for z in (made.v_proj.weight, made.v_proj.bias)), strict=True)
    mixing = [(weights[0][0][h, ..., 0], weights[0][1][h]) for h in range(made.num_heads)]
    out = made.o_proj.weight, made.o_proj.bias
    return naive_masked_mixer_heads(x, list(blocks), mixing, out, causal=made.causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("length", [1, 4, 5])
def test_is_the_formula(length, options, causal):
    """Also for sequences shorter than the matrix."""
    made, x = module(5, causal=causal, **options), normal(2, length, 6).requires_grad_()
    got, want = made(x), naive(made, x)
    close(got, want)
    leaves, direction = [x, *made.parameters()], normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize("case", ["c1", "c2", "c3", "c4"])
def test_authors_numbers(case):
    """Whole blocks: flat, expanded, three heads, kernels of three taps."""
    with np.load(VECTORS) as file:
        given = {n.removeprefix(f"{case}_"): torch.from_numpy(file[n]) for n in file if n.startswith(case)}
    x = given["x"].requires_grad_()
    (_, T, M), options = x.shape, {"c2": {"form": "expanded"}, "c3": {"form": "heads", "num_heads": 3}}
    width = given["P_conv.weight"].shape[2] if "P_conv.weight" in given else 1
    made = MaskedMixer(M, max_length=T, kernel_width=width, **options.get(case, {})).double()
    if case == "c3":
        heads = {f"P_mixerhead.{part}.{h}": (part, h) for part in ("proj_head", "convs") for h in range(3)}
        parts = {part: [n for n, (p, _) in heads.items() if p == part] for part in ("proj_head", "convs")}
        stacked = {
            f"{part}.{kind}": torch.stack([given[f"{n}.{kind}"] for n in names])
            for part, names in parts.items()
            for kind in ("weight", "bias")
        }
        state = {f"v_proj.{kind}": stacked[f"proj_head.{kind}"].flatten(0, 1) for kind in ("weight", "bias")}
        state |= {f"maps.0.{kind}": stacked[f"convs.{kind}"] for kind in ("weight", "bias")}
        state |= {f"o_proj.{kind}": given[f"P_mixerhead.out_proj.{kind}"] for kind in ("weight", "bias")}
    else:
        names = ["P_conv.0", "P_conv.2"] if case == "c2" else ["P_conv"]
        state = {
            f"maps.{n}.{kind}": given[f"{p}.{kind}"][None] for n, p in enumerate(names) for kind in ("weight", "bias")
        }
    made.load_state_dict(state)
    norms = {n: (given[f"P_{n}_layernorm.weight"], given[f"P_{n}_layernorm.bias"]) for n in ("seq", "patch")}
    ff = tuple(given[f"P_patch_ff.{n}.{kind}"] for n in (0, 2) for kind in ("weight", "bias"))
    mixed = made(F.layer_norm(x, (M,), *norms["seq"]))
    out = naive_masked_mixer_block(x, mixed, norms["patch"], ff)
    close(out, given["out"])
    close(torch.autograd.grad(out, x, given["w"])[0], given["gx"])


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_no_token_sees_a_later_one(options):
    made = module(6, **options)
    seen = torch.autograd.functional.jacobian(lambda x: made(x).sum((0, 2)), normal(1, 6, 6))[:, 0].ne(0).any(-1)
    assert torch.equal(seen, torch.ones(6, 6, dtype=torch.bool).tril())
    for mixing in made.maps:
        (grad,) = torch.autograd.grad(made(normal(1, 6, 6)).square().sum(), mixing.weight)
        above = torch.ones(6, 6, dtype=torch.bool).triu(1)
        assert (grad[:, above] == 0).all()
        assert (grad[:, ~above] != 0).all()


def test_what_enters_can_be_recovered():
    """The paper's better input reconstruction, in small: with no zero on the diagonal the map is invertible."""
    made, x = module(7), normal(2, 7, 6)
    y = made(x)
    weight, bias = made.maps[0].weight[0, ..., 0].tril(), made.maps[0].bias[0]
    assert weight.diagonal().abs().min() > 1e-3
    recovered = torch.linalg.solve_triangular(weight, y - bias[:, None], upper=False)
    assert (recovered - x).abs().max() < 1e-9


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_streams(options):
    made, x = module(8, **options), normal(2, 7, 6)
    state, outs = made.init_state(2, 8), []
    for part in x.split([1, 0, 3, 2, 1], 1):
        y, state = made.step(part, state)
        outs.append(y)
    close(torch.cat(outs, 1), made(x))
    assert all(past.shape[2] == 7 for past in state.past)
    with pytest.raises(ValueError, match=r"x is too long \(got 9 tokens\); expected at most max_length = 8"):
        made.step(normal(2, 2, 6), state)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_hidden_tokens(options):
    """Whatever stands there, the others come out as if it were 0 on its way into each map."""
    made, x = module(6, causal=False, **options), normal(2, 6, 6)
    keep = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    other = x.masked_fill(~keep[..., None], float("nan"))
    got, again = made(x, mask=masks.padding(keep)), made(other, mask=keep)
    close(again[keep], got[keep])
    close(got[1], made(x)[1])
    short = made(x[:1, :2])
    only = torch.arange(6)[None] < 2
    close(made(x[:1], mask=only)[:, :2], short)


def test_function_rows():
    x, weight, bias = normal(2, 1, 5, 3), normal(1, 6, 6, 3), normal(1, 6)
    whole = masked_mix(x, weight, bias)
    for first in range(6):
        close(masked_mix(x, weight, bias, first=first), whole[:, :, first:])


def test_refusals():
    with pytest.raises(ValueError, match=r"form is unknown \(got 'deep'\); expected one of 'flat'"):
        MaskedMixer(6, form="deep")
    with pytest.raises(ValueError, match=r"kernel_width is even \(got 2\)"):
        MaskedMixer(6, kernel_width=2)
    with pytest.raises(ValueError, match=r"kernel_width does not go with form 'heads' \(got 3\); expected 1 unless"):
        MaskedMixer(6, form="heads", kernel_width=3)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 4 \(got 6\)"):
        MaskedMixer(6, num_heads=4)
    with pytest.raises(ValueError, match=r"x is too long \(got 9 tokens\); expected at most max_length = 8"):
        MaskedMixer(6, max_length=8)(torch.randn(1, 9, 6))
    with pytest.raises(ValueError, match="streaming needs causal=True"):
        MaskedMixer(6, causal=False).init_state(1, 4)
    made = MaskedMixer(6, max_length=8)
    with pytest.raises(ValueError, match=r"capacity is too large \(got 9\); expected an int from 0 to 8"):
        made.init_state(1, 9)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the MixerState"):
        made.step(torch.randn(1, 1, 6), None)
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 1\); expected 2"):
        made.step(torch.randn(1, 1, 6), made.init_state(2, 8))
    with pytest.raises(ValueError, match=r"head_dim is none of its options \(got 3\)"):
        regard.create("masked_mixer", dim=8, num_heads=2, head_dim=3, causal=True)

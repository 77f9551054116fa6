"""Optimised and efficient attention against loops, whose author saw the formulas only, and a third party's numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_sliced as naive
from regard import masks
from regard.cache import PagePool
from regard.laws.agreement import close
from regard.mixers.sliced import SlicedAttention
from regard.positions.rotary import Rotary

VECTORS = Path(__file__).parents[1] / "vectors" / "sliced.npz"
M, H = 12, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    layer = layer.double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return layer


def sliced(dim: int = M, heads: int = H, **options) -> SlicedAttention:
    return filled(regard.create("sliced", dim=dim, num_heads=heads, **options))


def oracle(layer: SlicedAttention, x: Tensor, **given) -> Tensor:
    weights = {f"W{n}": getattr(layer, f"{n}_proj").weight for n in "qo"}
    weights |= {f"b{n}": getattr(layer, f"{n}_proj").bias for n in "qo"}
    if layer.form == "optimised":
        weights |= {"Wk": layer.k_proj.weight, "bk": layer.k_proj.bias}
    run = naive.optimised if layer.form == "optimised" else naive.efficient
    return run(x, **weights, num_heads=layer.num_heads, causal=layer.causal, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["efficient", "optimised"])
def test_is_the_definition(form: str, bias: bool, causal: bool) -> None:
    layer, x = sliced(form=form, bias=bias, causal=causal), normal(1, 2, 5, M).requires_grad_()
    allowed = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    got, want = layer(x, mask=allowed[:, None]), oracle(layer, x, allowed=allowed)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("form", ["efficient", "optimised"])
def test_attends_to_other_tokens(form: str) -> None:
    layer = sliced(form=form)
    x, context = normal(1, 2, 3, M).requires_grad_(), normal(2, 2, 5, M).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    got, want = layer(x, context, mask=masks.padding(keep)), oracle(layer, x, context=context, keep=keep)
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize(("form", "heads"), [("optimised", 3), ("efficient", 2)])
def test_gives_a_third_partys_numbers(form: str, heads: int) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{form}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{form}_")}
    layer, x = sliced(12, heads, form=form, bias=True), z["x"].requires_grad_()
    with torch.no_grad():
        for (proj, kind), p in ((name.rsplit(".", 1), p) for name, p in layer.named_parameters()):
            p.copy_(of_third_party(z, "p_", proj, kind, heads))
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["grad_x"]).abs().max() < 1e-10
    for (proj, kind), p in ((name.rsplit(".", 1), p) for name, p in layer.named_parameters()):
        assert (p.grad - of_third_party(z, "g_", proj, kind, heads)).abs().max() < 1e-10, proj


def of_third_party(z: dict[str, Tensor], what: str, proj: str, kind: str, heads: int) -> Tensor:
    if proj == "o_proj":
        return z[f"{what}W_o.{kind}"]
    return torch.cat([z[f"{what}layers.Attention_Layer {h}.W_{proj[0]}.{kind}"] for h in range(heads)])


@pytest.mark.parametrize("form", ["efficient", "optimised"])
def test_is_attention_with_fewer_maps(form: str) -> None:
    plain = filled(regard.Attention(M, H, causal=True))
    layer = sliced(form=form, causal=True)
    with torch.no_grad():
        for name in ("v_proj", "k_proj")[: 1 if form == "optimised" else 2]:
            getattr(plain, name).weight.copy_(torch.eye(M))
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = normal(1, 2, 6, M)
    close(layer(x), plain(x), form)
    counts = [sum(p.numel() for p in made.parameters()) for made in (layer, plain)]
    assert counts == [(3 if form == "optimised" else 2) * M * M, 4 * M * M]


def test_a_head_sees_its_own_features_alone() -> None:
    """Other attention would take a permutation of features up in its projections."""
    layer, x = sliced(), normal(1, 1, 5, M)
    with torch.no_grad():
        layer.q_proj.weight.zero_()
        layer.o_proj.weight.copy_(torch.eye(M))
    close(layer(x), x.mean(1, keepdim=True).expand_as(x), "means of the tokens themselves")


@pytest.mark.parametrize("form", ["efficient", "optimised"])
@pytest.mark.parametrize("where", ["none", "rotary", "pages"])
def test_steps_equal_the_full_pass(form: str, where: str) -> None:
    position = Rotary(4) if where == "rotary" else None
    layer = filled(SlicedAttention(M, H, form=form, causal=True, position=position))
    x, outs = normal(1, 2, 7, M), []
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :2] = False
    pool = PagePool(8, page_size=3) if where == "pages" else None
    with torch.no_grad():
        want, state = layer(x, mask=masks.padding(keep)), layer.init_state(2, 7, pool=pool)
        for part in x.split((1, 3, 1, 2), 1):
            out, state = layer.step(part, state, mask=masks.padding(keep[:, : state.length + part.shape[1]]))
            outs.append(out)
    close(torch.cat(outs, 1), want, "steps")


def test_a_stream_keeps_tokens_once() -> None:
    layer = sliced(causal=True)
    sizes = {
        made.form: sum(b.numel() for b in made.init_state(2, 7).buffers.values())
        for made in (layer, sliced(form="optimised", causal=True))
    }
    assert sizes == {"efficient": 2 * 7 * M, "optimised": 2 * 2 * 7 * M}


def test_starting_values() -> None:
    for form in ("efficient", "optimised"):
        layer = regard.create("sliced", dim=64, num_heads=4, form=form, bias=True)
        for proj in (layer.q_proj, *([layer.k_proj] if form == "optimised" else [])):
            assert 0.9 * (6 / 128) ** 0.5 < float(proj.weight.detach().abs().max()) <= (6 / 128) ** 0.5
            assert not proj.bias.any()


@pytest.mark.parametrize(
    ("wrong", "told"), [({"form": "super"}, "form"), ({"heads": 5}, "num_heads"), ({"bias": 1}, "bias")]
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        sliced(**wrong)


def test_refuses_what_it_cannot_step_with() -> None:
    layer = sliced(causal=True)
    x, state = normal(0, 1, 1, M), layer.init_state(1, 3)
    with pytest.raises(TypeError, match="state"):
        layer.step(x, None)
    with pytest.raises(TypeError, match="mask"):
        layer.step(x, state, mask=torch.ones(1, 1).bool())

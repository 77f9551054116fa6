"""Multiple head embeddings against loops (naive_mhe.py), whose author saw the equations only."""

import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_mhe as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.mhe import MultipleHeadEmbeddings, embedded

M, H = 12, 3
FORMS = ("add", "multiply")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    layer = layer.double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return layer


def mhe(**options) -> MultipleHeadEmbeddings:
    return filled(regard.create("mhe", **{"dim": M, "num_heads": H, **options}))


def oracle(layer: MultipleHeadEmbeddings, x: Tensor, base: float | None = None, **given) -> Tensor:
    weights = [getattr(layer, f"{n}_proj").weight.mT for n in "qkvo"]
    biases = {f"b_{n}": getattr(layer, f"{n}_proj").bias for n in "qkvo"}
    embeddings = [getattr(layer, f"{n}_embedding") for n in "qkv"]
    rotate = None if base is None else halves(naive.rotary(base), layer.head_dim)
    return naive.multi_head_embedding_attention(
        x, *weights[:3], *embeddings, weights[3], layer.form, rotate=rotate, **biases, **given
    )


def halves(rotate, width: int):
    """The loops turn neighbouring features, the layer those half a head apart: the same but for their order."""
    order = torch.arange(width).view(2, -1).mT.flatten()
    return lambda vector, position: rotate(vector[order], position)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    theirs = torch.autograd.grad((want * g).sum(), of, allow_unused=True)
    for mine, other, z in zip(torch.autograd.grad((got * g).sum(), of), theirs, of, strict=True):
        close(mine, torch.zeros_like(z) if other is None else other, "gradient")


@pytest.mark.parametrize("base", [None, 50.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_definition(form: str, bias: bool, base: float | None) -> None:
    layer, x = mhe(form=form, bias=bias, base=base), normal(1, 2, 4, M).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    got, want = layer(x, mask=allowed[:, None]), oracle(layer, x, base, allowed=allowed)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("form", FORMS)
def test_sees_nothing_later(form: str) -> None:
    layer, x = mhe(form=form, causal=True, head_dim=5), normal(1, 1, 5, M)
    close(layer(x), oracle(layer, x, allowed=naive.causal(5)))


@pytest.mark.parametrize("form", FORMS)
def test_attends_to_other_tokens(form: str) -> None:
    layer = mhe(form=form, context_dim=7)
    x, context = normal(1, 2, 3, M).requires_grad_(), normal(2, 2, 5, 7).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    got = layer(x, context, mask=masks.padding(keep))
    want = oracle(layer, x, memory=context, allowed=keep[:, None].expand(2, 3, 5))
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_alone_set_heads_apart(form: str) -> None:
    """Without embeddings every head is the same one; with them, no two are. A stream keeps one head's past."""
    layer, x = mhe(form=form, causal=True), normal(1, 1, 6, M)
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(M))
        heads = layer(x).unflatten(-1, (H, -1)).transpose(1, 2)
        for embedding in (layer.q_embedding, layer.k_embedding, layer.v_embedding):
            embedding.zero_()
        alike = layer(x).unflatten(-1, (H, -1)).transpose(1, 2)
    close(alike[:, 1:], alike[:, :1].expand_as(alike[:, 1:]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (heads[:, one] - heads[:, other]).abs().max() > 0.1
    assert sum(b.numel() for b in layer.init_state(2, 7).buffers.values()) == 2 * 2 * 7 * M // H


def test_heads_differ_by_their_weights_too() -> None:
    """Values whose embeddings are equal still come out different: queries prefer other keys."""
    for form in FORMS:
        layer, x = mhe(form=form), normal(1, 1, 6, M)
        with torch.no_grad():
            layer.o_proj.weight.copy_(torch.eye(M))
            layer.v_embedding.zero_()
            heads = layer(x).unflatten(-1, (H, -1)).transpose(1, 2)
        assert (heads[:, 0] - heads[:, 1]).abs().max() > 0.02


@pytest.mark.parametrize(("heads", "width"), [(12, 64), (3, 4)])
def test_counts_parameters_as_the_paper(heads: int, width: int) -> None:
    with torch.device("meta"):
        layer = MultipleHeadEmbeddings(heads * width, heads)
        plain = regard.Attention(heads * width, heads)
    mine, theirs = (
        sum(p.numel() for n, p in made.named_parameters() if not n.startswith("o_")) for made in (layer, plain)
    )
    counts = naive.parameter_counts(heads, width)
    assert (mine, theirs) == (counts["mhe"], counts["mha"])
    assert mine - counts["single_head"] == 3 * heads * width
    assert theirs - mine == (3 * heads**2 - 3 * heads) * width**2 - 3 * heads * width


@pytest.mark.parametrize(
    ("form", "base", "counts"), [("add", None, False), ("multiply", None, True), ("add", 9.0, True)]
)
def test_a_keys_embedding_counts_where_it_is_no_shift_of_all_scores(
    form: str, base: float | None, counts: bool
) -> None:
    layer, x = mhe(form=form, base=base), normal(1, 2, 5, M)
    (layer(x) * normal(2, 2, 5, M)).sum().backward()
    size = float(layer.k_embedding.grad.abs().max())
    assert size > 1e-3 if counts else size < 1e-13


def test_adding_to_values_is_a_constant_in_the_output() -> None:
    layer, x = mhe(), normal(1, 2, 5, M)
    with torch.no_grad():
        before, e = layer(x), layer.v_embedding.clone()
        layer.v_embedding.zero_()
        close(before - layer(x), (layer.o_proj.weight @ e.flatten()).expand_as(before))


def test_a_row_that_sees_nothing_is_0() -> None:
    layer, x = mhe(), normal(1, 1, 3, M)
    seen = torch.ones(3, 3, dtype=torch.bool)
    seen[1] = False
    out = layer(x, mask=seen[None, None])
    assert not out[0, 1].any()
    assert out[0, 0].any()


@pytest.mark.parametrize("base", [None, 50.0])
@pytest.mark.parametrize("form", FORMS)
def test_steps_equal_the_full_pass(form: str, base: float | None) -> None:
    layer, x, outs = mhe(form=form, base=base, causal=True), normal(1, 2, 7, M), []
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :2] = False
    with torch.no_grad():
        want, state = layer(x, mask=masks.padding(keep)), layer.init_state(2, 7)
        for part in x.split((1, 3, 1, 2), 1):
            out, state = layer.step(part, state, mask=masks.padding(keep[:, : state.length + part.shape[1]]))
            outs.append(out)
    close(torch.cat(outs, 1), want, "steps")
    assert state.buffers["k"].shape[1] == (1 if base is None else H)


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("mhe", dim=256, num_heads=8)
    for name in ("q", "k", "v"):
        assert 0.017 < float(getattr(layer, f"{name}_embedding").detach().std()) < 0.023
    assert not regard.create("mhe", dim=12, num_heads=3, embedding_std=0.0).q_embedding.any()
    assert layer.form == "add"
    assert layer.position is None


def test_embedded_is_the_formula() -> None:
    z, e = normal(1, 2, 1, 4, 5), normal(2, 3, 5)
    for form in FORMS:
        close(embedded(z, e, form), naive.head_embeddings(z[:, 0], e, form))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"form": "both"}, "form"),
        ({"embedding_std": -1.0}, "embedding_std"),
        ({"base": 10.0, "head_dim": 3}, "head_dim is odd"),
        ({"bias": 1}, "bias"),
        ({"num_heads": 5}, "num_heads"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        mhe(**wrong)

"""Multiple head embeddings against loops; what the algebra says of each form."""

import math

import pytest
import torch
from torch import Tensor

import regard
from mixers.naive_head_embeddings import naive_head_embeddings
from regard import masks
from regard.laws.agreement import close
from regard.mixers.head_embeddings import MultiHeadEmbedding

FORMS = ("add", "multiply")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = 6, heads: int = 3, seed: int = 0, **options) -> MultiHeadEmbedding:
    layer = MultiHeadEmbedding(dim, heads, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer.eval()


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"bias": True, "head_dim": 5}])
def test_is_the_definition(options: dict, form: str) -> None:
    layer, x = filled(form=form, **options), normal(1, 2, 4, 6).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    want = naive_head_embeddings(x, dict(layer.named_parameters()), form=form, allowed=allowed)
    got = layer(x, mask=allowed[:, None])
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("form", FORMS)
def test_attends_to_other_tokens(form: str) -> None:
    layer = filled(form=form, context_dim=4)
    x, context = normal(1, 2, 3, 6).requires_grad_(), normal(2, 2, 5, 4).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    named = dict(layer.named_parameters())
    allowed = keep[:, None].expand(-1, 3, -1)
    want = naive_head_embeddings(x, named, form=form, context=context, allowed=allowed)
    got = layer(x, context, mask=masks.padding(keep))
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize("form", FORMS)
def test_heads_differ_by_their_embeddings_alone(form: str) -> None:
    """Without them y is one head's output times the sum of all heads' output projections; with them it is not."""
    layer, x = filled(8, 4, form=form, causal=True), normal(1, 2, 5, 8)
    before = layer(x)
    with torch.no_grad():
        for name in "qkv":
            getattr(layer, f"{name}_embedding").zero_()
    q, k, v = (getattr(layer, f"{name}_proj")(x) for name in "qkv")
    scores = (q @ k.mT / math.sqrt(2)).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    want = scores.softmax(-1) @ v @ layer.o_proj.weight.unflatten(1, (4, 2)).sum(1).T
    close(layer(x), want)
    assert (before - want).abs().max() > 0.1


@pytest.mark.parametrize(("heads", "width"), [(12, 64), (4, 8)])
def test_parameters_are_counted_as_in_the_paper(heads: int, width: int) -> None:
    """Beyond one head's 3 n d^2 only 3 n d, where multi-head attention has 3 n^2 d^2."""
    sizes = {"dim": heads * width, "num_heads": heads}
    mine, plain = (regard.create(name, **sizes) for name in ("head_embeddings", "softmax"))

    def count(layer: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("o_proj"))

    assert count(mine) == 3 * heads * width**2 + 3 * heads * width
    assert count(plain) - count(mine) == (3 * heads**2 - 3 * heads) * width**2 - 3 * heads * width


def test_added_key_embeddings_have_no_effect() -> None:
    """Their terms of a score are the same for all keys; multiplied, they count."""
    x = normal(1, 2, 5, 6)
    for form in FORMS:
        layer = filled(form=form)
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.k_embedding)
        assert (grad.abs().max() < 1e-12) == (form == "add")


def test_added_value_embeddings_are_a_constant() -> None:
    layer, x = filled(), normal(1, 2, 5, 6)
    with_them = layer(x)
    constant = layer.o_proj(layer.v_embedding.flatten())
    with torch.no_grad():
        layer.v_embedding.zero_()
    close(with_them - layer(x), constant.expand_as(with_them))
    nothing = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    assert torch.equal(filled()(x, mask=nothing), torch.zeros_like(x)), "but not where nothing may be seen"


def test_a_stream_keeps_one_head() -> None:
    layer = filled(8, 4, causal=True)
    state = layer.init_state(1, 16, dtype=torch.float64)
    assert {name: tuple(b.shape) for name, b in state.buffers.items()} == {"k": (1, 1, 16, 2), "v": (1, 1, 16, 2)}


def test_starts_with_embeddings_of_their_own() -> None:
    torch.manual_seed(0)
    layer = regard.create("head_embeddings", dim=512, num_heads=4)
    for name in "qkv":
        values = getattr(layer, f"{name}_embedding").detach()
        assert abs(values.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * values.numel())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="form is unknown"):
        MultiHeadEmbedding(8, 2, form="sum")
    with pytest.raises(ValueError, match="std is out of range"):
        MultiHeadEmbedding(8, 2, std=-1.0)

"""EIT against loops (naive_eit.py), whose author saw the equations only, and a reimplementation's numbers (eit.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.laws.agreement import close
from regard.scores.eit import ManyToManyScore, many_to_many_scores
from scores import naive_eit as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "eit.npz"
THEIRS = {
    "full": {
        "conv_inner_subspace_1": "inner_in",
        "conv_inner_subspace_2": "inner_out",
        "conv_cross_subspace_1": "cross_in",
        "conv_cross_subspace_2": "cross_out",
    },
    "efficient": {"conv_inner_subspace_1": "inner_in", "conv_cross_subspace_1": "cross_out"},
}
FORMS = ("full", "efficient")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: nn.Module) -> nn.Module:
    layer = layer.double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.7 * normal(100 + n, *p.shape))
    return layer


def eit(dim: int = 4, heads: int = 2, **options) -> regard.Attention:
    return filled(regard.create("eit", dim=dim, num_heads=heads, **options))


def oracle(layer: regard.Attention, x: Tensor, **given) -> Tensor:
    own = layer.score
    weights = [getattr(layer, f"{n}_proj").weight.mT for n in "qkvo"]
    biases = {f"b_{n}": getattr(layer, f"{n}_proj").bias for n in "qkvo"}
    inner_in, out = (own.inner_in.weight, own.inner_in.bias), (own.cross_out.weight, None)
    given = {"reach": "earlier", **biases, **given}
    if own.form == "efficient":
        return naive.efficient_attention(x, *weights, layer.num_heads, *inner_in, *out, **given)
    inner = (*inner_in, own.inner_out.weight, own.inner_out.bias)
    cross = (own.cross_in.weight, own.cross_in.bias, *out)
    return naive.enhanced_attention(x, *weights, layer.num_heads, inner, cross, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("case", ["full", "wide", "efficient"])
def test_gives_a_reimplementations_numbers(case: str) -> None:
    form = "efficient" if case == "efficient" else "full"
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    H = z["out"].shape[0]
    made = {"inner": len(z["P_conv_inner_subspace_1.bias"]) // H, "form": form}
    if form == "full":
        made["cross"] = len(z["P_conv_cross_subspace_1.bias"]) // H
    part = ManyToManyScore(H, **made).double()
    named = {
        f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in THEIRS[form].items() for kind in ("weight", "bias")
    }
    del named["cross_out.bias"]
    part.load_state_dict({ours: z[f"P_{theirs}"] for ours, theirs in named.items()})
    x = z["x"].transpose(0, 1).clone().requires_grad_()
    out = part.interact(x)
    assert (out - z["out"].transpose(0, 1)).abs().max() < 1e-10
    (out * z["w"].transpose(0, 1)).sum().backward()
    assert (x.grad - z["grad_x"].transpose(0, 1)).abs().max() < 1e-10
    for ours, theirs in named.items():
        assert (part.get_parameter(ours).grad - z[f"G_{theirs}"]).abs().max() < 1e-10, ours


@pytest.mark.parametrize(("kernel_size", "causal", "bias"), [(1, False, True), (1, True, False), (2, True, False)])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_definition(form: str, kernel_size: int, causal: bool, bias: bool) -> None:
    layer = eit(form=form, kernel_size=kernel_size, causal=causal, bias=bias, inner=3, cross=2)
    x = normal(1, 1, 4, 4).requires_grad_()
    allowed = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    if causal:
        allowed &= torch.tensor(naive.causal(4))
    allowed[0, 1] = False
    got, want = layer(x, mask=allowed[:, None]), oracle(layer, x, allowed=allowed)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


def test_attends_to_other_tokens() -> None:
    layer = eit(inner=2, cross=1)
    x, context = normal(1, 2, 2, 4), normal(2, 2, 3, 4)
    keep = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    close(
        layer(x, context, mask=masks.padding(keep)),
        oracle(layer, x, memory=context, allowed=keep[:, None].expand(2, 2, 3)),
    )


def test_all_pairs_of_heads_query_heads_outside() -> None:
    q, k = normal(1, 2, 3, 4, 5), normal(2, 2, 3, 6, 5)
    close(many_to_many_scores(q, k, 5**-0.5), naive.i_major(naive.many_to_many_scores(q, k)))
    shared = normal(3, 2, 1, 6, 5)
    close(many_to_many_scores(q, shared, 1.0), many_to_many_scores(q, shared.expand(2, 3, 6, 5), 1.0))


def test_a_query_head_finds_what_another_heads_keys_hold() -> None:
    """Queries are of head 0 and keys of head 1, so that each head's own scores are all 0."""
    T, D = 6, 8
    q, k = torch.zeros(2, 1, 2, T, D, dtype=torch.float64)
    k[0, 1] = 9 * nn.functional.normalize(normal(1, T, D), dim=-1)
    q[0, 0] = k[0, 1].flip(0)
    part = ManyToManyScore(2).double()
    part.start_neutral()
    with torch.no_grad():  # of the pairs of query head 0, that with key head 1 counts instead
        part.inner_in.weight[:8] = part.inner_in.weight[:8].flip(1)
        out = regard.attention(q, k, torch.eye(T, dtype=torch.float64).expand(1, 2, T, T), score=part)
    assert (out[0, 0].argmax(-1) == torch.arange(T).flip(0)).all()
    assert out[0, 0].flip(-1).diagonal().min() > 0.9


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_starts_as_plain_attention_where_that_is_asked(form: str, kernel_size: int) -> None:
    layer, x = eit(12, 3, form=form, kernel_size=kernel_size, causal=True), normal(1, 2, 6, 12)
    plain = regard.Attention(12, 3, causal=True).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("score")})
    assert (layer(x) - plain(x)).abs().max() > 0.1
    assert layer.score.start_neutral()
    close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in layer.named_parameters() if n.endswith(("_in.weight", "_out.weight")))
    assert not ManyToManyScore(3, inner=1).start_neutral()
    assert not ManyToManyScore(3, cross=1).start_neutral()
    assert ManyToManyScore(3, cross=1, form="efficient").start_neutral()


def test_order_of_key_heads_is_free() -> None:
    """Key heads and the inputs of the first convolution permuted alike change nothing."""
    part = filled(ManyToManyScore(3, inner=2, cross=2))
    q, k, v = normal(1, 1, 3, 5, 4), normal(2, 1, 3, 5, 4), normal(3, 1, 3, 5, 4)
    want, order = regard.attention(q, k, v, score=part), [2, 0, 1]
    with torch.no_grad():
        part.inner_in.weight.copy_(part.inner_in.weight[:, order])
    close(regard.attention(q, k[:, order], v, score=part), want)


@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_steps_and_chunks_equal_the_full_pass(form: str, kernel_size: int) -> None:
    layer = eit(12, 3, form=form, kernel_size=kernel_size, causal=True, inner=2, cross=1)
    x, outs = normal(1, 2, 21, 12), []
    keep = torch.ones(2, 21, dtype=torch.bool)
    keep[1, :2] = False
    with torch.no_grad():
        want, state = layer(x, mask=masks.padding(keep)), layer.init_state(2, 21)
        layer.kernel = "chunked"
        close(layer(x, mask=masks.padding(keep)), want, "chunks")
        layer.kernel = "auto"
        for part in x.split((1, 3, 1, 8, 1, 7), 1):
            out, state = layer.step(part, state, mask=masks.padding(keep[:, : state.length + part.shape[1]]))
            outs.append(out)
    close(torch.cat(outs, 1), want, "steps")


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_sees_nothing_later_and_no_other_document(kernel_size: int) -> None:
    layer, x = eit(12, 3, kernel_size=kernel_size, causal=True), normal(1, 1, 9, 12)
    changed = x.clone()
    changed[:, 5:] = normal(2, 1, 4, 12)
    close(layer(changed)[:, :5], layer(x)[:, :5])
    packed = layer(x, mask=masks.packed(torch.tensor([0, 4, 9])))
    close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1))


def test_pieces_of_rows_give_the_same(monkeypatch) -> None:
    part = filled(ManyToManyScore(2, inner=3, cross=2))
    given = [normal(n, 2, 2, 7, 4).requires_grad_() for n in range(3)]
    allowed = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    found = []
    for size in (16 * 2**20, 1):
        monkeypatch.setattr("regard.scores._pairs.TILE_BYTES", size)
        out = regard.attention(*given, mask=allowed, score=part, kernel="eager")
        found.append([out, *torch.autograd.grad((out * normal(5, *out.shape)).sum(), [*given, *part.parameters()])])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_starting_values_and_counts() -> None:
    torch.manual_seed(0)
    part = regard.create("eit", dim=96, num_heads=12).score
    assert sum(p.numel() for p in part.parameters()) == naive.parameter_count(12, 8, 48) - 12  # no bias at the end
    shapes = {n: tuple(m.weight.shape) for n, m in part.named_children()}
    assert shapes == {
        "inner_in": (96, 12, 1, 1),
        "inner_out": (12, 8, 1, 1),
        "cross_in": (48, 12, 1, 1),
        "cross_out": (12, 48, 1, 1),
    }
    for n, m in part.named_children():  # torch's: uniform within 1 / sqrt(inputs)
        bound = m.weight[0].numel() ** -0.5
        assert 0.9 * bound < float(m.weight.detach().abs().max()) <= bound, n
    assert part.cross_out.bias is None
    assert part.form == "full"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"form": "small"}, "form"),
        ({"inner": 0}, "inner"),
        ({"cross": 0}, "cross"),
        ({"kernel_size": 0}, "kernel_size"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        eit(**wrong)


def test_refuses_other_numbers_of_heads() -> None:
    q = normal(1, 1, 4, 3, 2)
    with pytest.raises(ValueError, match="another number of heads"):
        regard.attention(q, q, q, score=ManyToManyScore(2).double())

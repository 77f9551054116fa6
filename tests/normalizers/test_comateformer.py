"""Combined attention against loops by somebody who saw the equations only (B075)."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import regard
from normalizers import naive_comateformer as naive
from regard import masks
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.normalizers.comateformer import (
    DistanceGate,
    GateForm,
    combined_parts,
    combined_weights,
    compositional_pair,
    negative_distances,
)

FORMS: tuple[GateForm, ...] = get_args(GateForm)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(got: Tensor, want: Tensor, given: tuple[Tensor, ...]) -> None:
    """Values and gradients."""
    close(got.detach(), want.detach())
    direction = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    ours, theirs = (torch.autograd.grad((z * direction).sum(), given, retain_graph=True) for z in (got, want))
    for g, w in zip(ours, theirs):
        close(g, w)


def attend(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "auto", mask: Any = None, **options: Any) -> Tensor:
    return regard.attention(q, k, v, mask=mask, kernel=kernel, **combined_parts(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 7, 3), (1, 2, 2, 4, 4, 1), (1, 1, 1, 1, 6, 5)])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, 2.5)])
def test_equals_the_loops(form: GateForm, sizes: tuple[int, ...], factors: tuple[float, float]) -> None:
    (B, H, G, T, S, D), (alpha, beta) = sizes, factors
    given = normal(1, B, H, T, D), normal(2, B, G, S, D), normal(3, B, G, S, 4)
    want = naive.combined_attention(*given, form, alpha, beta, centre="row")
    compare(attend(*given, gate=form, alpha=alpha, beta=beta), want, given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_hidden_keys_and_causal(form: GateForm, kernel: str) -> None:
    """Keys hidden here and there, a row that sees nothing, a key that nobody sees."""
    given = normal(1, 2, 4, 5, 3), normal(2, 2, 2, 6, 3), normal(3, 2, 2, 6, 4)
    drawn = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(4)) < 0.6
    drawn[0, 2] = False
    drawn[1, :, 3] = False
    for allowed, mask in ((drawn, drawn[:, None]), (torch.tensor(naive.causal(5, 6)), masks.causal())):
        want = naive.combined_attention(*given, form, allowed=allowed, centre="row")
        compare(attend(*given, gate=form, mask=mask, kernel=kernel), want, given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean_over", ["row", "matrix"])
@pytest.mark.parametrize("hidden", [False, True])
def test_weights(form: GateForm, mean_over: Any, hidden: bool) -> None:
    e, n = normal(1, 2, 2, 4, 5), normal(2, 2, 2, 4, 5)
    allowed = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.6 if hidden else None
    want = naive.combine(e, n, form, allowed, mean_over)
    ours = None if allowed is None else allowed[:, None]
    compare(combined_weights(e, n, gate=form, allowed=ours, mean_over=mean_over), want, (e, n))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_pair(form: GateForm, projected: bool, padded: bool) -> None:
    a, b = normal(1, 2, 4, 3), normal(2, 2, 5, 3)
    keep_a = torch.tensor([[True] * 4, [True, True, True, False]]) if padded else None
    keep_b = torch.tensor([[True, False, True, True, False], [True] * 5]) if padded else None
    maps = [normal(n, 6, 3) for n in (3, 4)] + [normal(n, 6) for n in (5, 6)] if projected else [None] * 4
    (we, wn, be, bn), given = maps, (a, b, *(m for m in maps if m is not None))
    allowed = None if keep_a is None or keep_b is None else keep_a[:, :, None] & keep_b[:, None]
    want = naive.compositional_pair(a, b, we, be, wn, bn, form, 0.7, 1.3, allowed=allowed)[:2]
    similar, apart = (None if w is None else (lambda z, w=w, c=c: z @ w.mT + c) for w, c in ((we, be), (wn, bn)))
    got = compositional_pair(
        a, b, similar=similar, apart=apart, gate=form, alpha=0.7, beta=1.3, keep_a=keep_a, keep_b=keep_b
    )
    for g, w in zip(got, want):
        compare(g, w, given)


def test_distances_in_pieces() -> None:
    q, k = normal(1, 2, 4, 7, 3), normal(2, 2, 2, 5, 3)
    want = naive.dissimilarity(q, k, 1.0, scale=False)
    for rows in (None, 1, 3):
        compare(negative_distances(q, k, 1.0, rows=rows), want, (q, k))
    same = negative_distances(q, q.detach().clone()[:, :2], 1.0)
    assert torch.autograd.grad(same.diagonal(dim1=-2, dim2=-1).sum(), q)[0][:, 0].abs().max() == 0  # at equality


def test_layer_equals_the_loops() -> None:
    for form in FORMS:
        layer, x = of("comateformer").build(gate=form, causal=True), tokens(1, 6)
        q, k, v = (p(x).unflatten(-1, (6, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        want = naive.combined_attention(q, k, v, form, allowed=naive.causal(6), centre="row")
        close(layer(x).detach(), layer.o_proj(want.transpose(1, 2).flatten(2)).detach())


def test_a_bias_is_added_before_tanh() -> None:
    q, k, v = (normal(n, 1, 2, 4, 3) for n in (1, 2, 3))
    bias = normal(4, 1, 2, 4, 4)
    m = naive.combine(naive.similarity(q, k) + bias, naive.dissimilarity(q, k))
    compare(regard.attention(q, k, v, bias=bias, **combined_parts()), naive.values(m, v), (q, k, v, bias))  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "least"), [(1, -0.191), (4, -0.298), (16, -0.418), (64, -0.536)])
def test_adding_is_easy_and_subtracting_bounded(width: int, least: float) -> None:
    """The claim. One key with value 1, of a query that is equal, opposite or orthogonal to it."""
    key = torch.zeros(1, 1, 1, width, dtype=torch.float64)
    sizes = torch.linspace(0.0, 40.0, 4001, dtype=torch.float64)[:, None]
    e = torch.zeros(4001, width, dtype=torch.float64)
    e[:, :1] = sizes
    one = torch.ones(4001, 1, 1, 1, dtype=torch.float64)
    queries, keys = e[:, None, None], e[:, None, None]
    added = attend(queries, keys, one)
    assert added.max() > 0.999
    assert added.min() >= 0
    subtracted = attend(-queries, keys, one)
    assert abs(subtracted.min().item() - least) < 6e-4
    assert subtracted[-1].abs() < 0.02  # far apart: nothing
    assert attend(key, key, one[:1]).abs().max() == 0
    assert attend(queries, keys, one, gate="plain").max() < 0.5 + 1e-12


def test_learns_a_signed_sum() -> None:
    """The claim. Tokens carry a sign and four numbers; one query asks for their signed sum."""
    generator = torch.Generator().manual_seed(0)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        sign = torch.randint(2, (n, 8), generator=generator)
        values = torch.randn(n, 8, 4, generator=generator)
        flags = torch.nn.functional.one_hot(sign, 2).float()
        return torch.cat([flags, values], -1), ((2.0 * sign - 1)[..., None] * values).sum(1) / math.sqrt(8)

    torch.manual_seed(0)
    k, v, o = torch.nn.Linear(6, 16), torch.nn.Linear(6, 16), torch.nn.Linear(16, 4)
    query = torch.nn.Parameter(torch.randn(1, 1, 1, 16))
    learned = [query, *k.parameters(), *v.parameters(), *o.parameters()]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    loss = torch.tensor(torch.inf)
    for _ in range(500):
        x, want = batch(128)
        out = attend(query.expand(128, 1, 1, 16), k(x)[:, None], v(x)[:, None])
        loss = (o(out[:, 0, 0]) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_weights_lie_within_one_and_do_not_sum_to_it() -> None:
    q, k = (3 * normal(n, 1, 2, 30, 4).detach() for n in (1, 2))
    eye = torch.eye(30, dtype=torch.float64).expand(1, 2, 30, 30)
    weights = attend(q, k, eye)
    assert weights.abs().max() <= 1
    assert weights.min() < 0 < weights.max()
    assert (weights.sum(-1) - 1).abs().min() > 1e-3


def test_refusals() -> None:
    for option, value in (("gate", "triple"), ("alpha", 0.0), ("alpha", math.nan), ("beta", -1.0)):
        with pytest.raises(ValueError, match=option):
            combined_parts(**{option: value})
    z = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match="mean_over"):
        combined_weights(z, z, mean_over="column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n has the wrong shape"):
        combined_weights(z, torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match="b has the wrong shape"):
        compositional_pair(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    assert DistanceGate(gate="centered").sees == "rows"

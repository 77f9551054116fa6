"""SpAtten against loops whose author has read neither the code nor this test, and the authors' cache (A188)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_spatten as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers import Cascade, CascadeLayer, SpAtten, cache_keep, progressive, schedule
from regard.mixers.cascade import largest
from regard.mixers.spatten import run
from vision.shared import filled, leaves, normal, vectors


def layers_of(count: int, dim: int, heads: int, *, mlp: bool) -> list[nn.Module]:
    """Layers without norms or biases, as the loops have them."""
    found: list[nn.Module] = []
    for n in range(count):
        layer: Any = CascadeLayer(dim, (heads, heads, dim // heads), hidden=0, bias=False)
        layer.norm = nn.Identity()
        if mlp:
            layer.mlp = nn.Sequential(nn.Linear(dim, 5), nn.Tanh(), nn.Linear(5, dim))
        found.append(filled(layer, n + 1))
    return found


def looped(x: Tensor, layers: list[Any], **options: Any) -> tuple[Tensor, ...]:
    given = [(z.q_proj.weight, z.k_proj.weight, z.v_proj.weight, z.o_proj.weight, z.mlp) for z in layers]
    return naive.stack(x, given, heads=layers[0].num_heads, **options)


CASES: list[dict[str, Any]] = [
    {"token_ratio": 0.3, "head_ratio": 0.4, "value_ratio": 0.25},
    {"token_ratio": 0.3, "head_ratio": 0.4, "value_ratio": 0.25, "padded": True},
    {"token_ratio": 0.9, "head_ratio": 0.9},
    {},
]


@pytest.mark.parametrize("form", ["mask", "gather"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loops(case: dict[str, Any], form: Any) -> None:
    """Values and gradients, both scores, and what is alive."""
    case = dict(case)
    real = torch.ones(2, 7).bool()
    if case.pop("padded", False):
        real[0, 5:], real[1, :2] = False, False
    layers, (x,) = layers_of(3, 6, 3, mlp=True), leaves(normal(0, 2, 7, 6))
    want, *told = looped(x, layers, real=real, **case)
    ratios = [[case.get(name, 0.0)] * 3 for name in ("token_ratio", "head_ratio")]
    value = case.get("value_ratio", 0.0)
    start = Cascade.start(real, 3, dtype=x.dtype)
    added, cascade = run(x, layers, start, *ratios, value_ratio=value, form=form)
    close(x + added, want)
    for got, other in zip(cascade, told, strict=True):
        if other.dtype == torch.bool:
            assert torch.equal(got, other)
        else:
            close(got, other)
    wanted = [x, *layers[0].parameters()]
    g = normal(5, *want.shape)
    for one, other in zip(*(torch.autograd.grad((z * g).sum(), wanted) for z in (x + added, want)), strict=True):
        close(one, other)


def test_mutants_of_the_loops_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = layers_of(3, 6, 3, mlp=False), normal(0, 1, 7, 6)
    start = Cascade.start(torch.ones(1, 7).bool(), 3, dtype=x.dtype)
    added, _ = run(x, layers, start, [0.3] * 3, [0.4] * 3)
    close(x + added, looped(x, layers, token_ratio=0.3, head_ratio=0.4)[0])
    top = naive.top
    for mutant in (lambda s, a, n: top(-s, a, n), lambda s, a, n: top(s, a, n + 1)):
        monkeypatch.setattr(naive, "top", mutant)
        assert (looped(x, layers, token_ratio=0.3, head_ratio=0.4)[0] - x - added).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["a", "b"])
def test_keeps_what_the_authors_cache_keeps(case: str) -> None:
    z = vectors("A188", case)
    start, recent, important, coming = z["params"].tolist()
    for n in range(2 if case == "a" else 1):
        scores = z[f"scores_{n}"]
        kept = cache_keep(scores, start=start, recent=recent, important=important, coming=coming)
        rule = naive.cache_keep(scores, start=start, recent=recent, important=important, coming=coming)
        for h, places in enumerate(rule):
            assert kept[0, h].nonzero()[:, 0].tolist() == places == z[f"keep_{n}_{h}"].tolist()
            for name in "kv":
                assert torch.equal(z[f"{name}_{n}"][0, h][kept[0, h]], z[f"{name}_after_{n}"][0, h])


@pytest.mark.parametrize(("bits", "threshold"), [((3, 2), 0.3), ((4, 4), 0.0), ((2, 5), 1.0)])
def test_progressive_bits_equal_the_loops(bits: tuple[int, int], threshold: float) -> None:
    q, k = normal(1, 2, 4, 3), normal(2, 2, 6, 3)
    got, again = progressive(q, k, bits=bits, threshold=threshold)
    want, asked = naive.progressive(q, k, bits=bits, threshold=threshold)
    close(got, want)
    assert torch.equal(again, asked)


def test_more_bits_are_nearer() -> None:
    q, k = normal(1, 2, 4, 3), normal(2, 2, 6, 3)
    exact = (q @ k.mT / math.sqrt(3)).softmax(-1)
    far, near = ((progressive(q, k, bits=(4, low), threshold=1.0)[0] - exact).abs().max() for low in (1, 8))
    assert near < 1e-2 < far


@pytest.mark.parametrize(("layers", "target"), [(12, 0.4), (4, 0.5), (2, 0.1), (30, 1.0)])
def test_the_schedule(layers: int, target: float) -> None:
    got = schedule(layers, target)
    assert got == pytest.approx(naive.schedule(layers, target))
    assert got[-1] == (target if layers > 3 else 1)


def test_scores_sum_to_heads_times_queries() -> None:
    cascade = Cascade.start(torch.ones(2, 5).bool(), 3, dtype=torch.float64)
    cascade = cascade.add_token_scores(normal(0, 2, 3, 4, 5).softmax(-1)).add_token_scores(
        torch.full((2, 3, 1, 5), 0.2, dtype=torch.float64)
    )
    close(cascade.token_scores.sum(1), torch.full((2,), 15.0, dtype=torch.float64))
    assert cascade.keep_tokens(1.0).tokens.sum(1).tolist() == [1, 1]
    assert cascade.keep_heads(0.5).heads.tolist() == [[True, False, False]] * 2
    assert not largest(torch.ones(1, 3), torch.zeros(1, 3).bool(), 0.5).any()


@pytest.mark.parametrize("mask", [None, "padding"])
def test_gathered_equals_masked(mask: str | None) -> None:
    """Values and gradients, through `create`."""
    outs = []
    for form in ("mask", "gather"):
        layer = filled(regard.create("spatten", dim=8, num_heads=4, layers=5, keep_heads=0.5, form=form), 3)
        (x,) = leaves(normal(1, 2, 16, 8))
        y = layer(x, mask=None if mask is None else masks.padding(lengths=torch.tensor([16, 9])))
        outs.append([y, *torch.autograd.grad((y * normal(2, *y.shape)).sum(), [x, *layer.parameters()])])
    for one, other in zip(*outs, strict=True):
        close(one, other)


def test_empty_and_hidden() -> None:
    layer = filled(regard.create("spatten", dim=8, num_heads=4, layers=4))
    for shape in ((0, 5, 8), (2, 0, 8), (2, 1, 8)):
        assert layer(normal(1, *shape)).shape == shape
    x = normal(1, 2, 5, 8)
    assert not layer(x, mask=torch.zeros(2, 5).bool()).any()


def marked(seed: int, count: int = 64) -> tuple[Tensor, Tensor]:
    """16 tokens of colours, 4 of them marked; the class is the marked ones' colour."""
    g = torch.Generator().manual_seed(seed)
    colour = torch.randint(4, (count, 16), generator=g)
    colour[:, :4] = y = torch.randint(4, (count, 1), generator=g)
    x = torch.nn.functional.one_hot(colour, 8).float()
    x[:, :4, 6] = 1.0
    return x, y[:, 0]


def test_marked_tokens_survive_and_others_are_left_alone() -> None:
    """Trained to name the colour of marked tokens, with three quarters of 16 tokens pruned behind the first layer: the
    4 that the last layer works on are those, and another last layer changes nothing at the others."""
    torch.manual_seed(1)
    layer = regard.create("spatten", dim=8, num_heads=2, layers=2, keep_tokens=0.25, unpruned=1, mlp_ratio=0)
    head = nn.Linear(8, 4)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.03)
    for n in range(80):
        x, y = marked(n)
        loss = torch.nn.functional.cross_entropy(head((x + layer(x)).mean(1)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = marked(1000, 200)
    with torch.no_grad():
        before = layer(x)
        assert (head((x + before).mean(1)).argmax(-1) == y).float().mean() > 0.95
        nn.init.ones_(layer.layers[1].o_proj.bias)
        worked = (layer(x) != before).any(-1)
    assert (worked.sum(1) == 4).all()
    assert worked[:, :4].float().mean() > 0.9, "chance is 0.25"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"keep_tokens is out of range \(got 0\)"):
        SpAtten(8, 2, keep_tokens=0)
    with pytest.raises(ValueError, match=r"form is unknown \(got 'both'\)"):
        SpAtten(8, 2, form="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"schedule: unpruned is too small \(got 0\)"):
        SpAtten(8, 2, unpruned=0)
    with pytest.raises(ValueError, match=r"cache_keep: recent does not fit"):
        cache_keep(normal(0, 1, 1, 1, 5), start=2, recent=5, important=1, coming=1)
    with pytest.raises(ValueError, match=r"largest: ratio is out of range"):
        largest(torch.ones(1, 2), torch.ones(1, 2).bool(), 2.0)
    with pytest.raises(ValueError, match=r"x has the wrong shape"):
        SpAtten(8, 2)(normal(0, 2, 8))

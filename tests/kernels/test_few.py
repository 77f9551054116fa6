"""The C++ kernel for few queries. It computes in fp32, so the truth is the formula in float64, written out here."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import few
from regard.kernels.native import build
from regard.kernels.plan import _auto, choose
from regard.kernels.problem import Problem
from regard.laws.agreement import naive_precision, near
from regard.masks import Mask
from regard.positions import Alibi, Kerple, Rotary

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")

SIZES = {  # B, H, G, T, S, D, V
    "one key": (1, 8, 8, 1, 1, 64, 64),
    "grouped, over splits": (2, 8, 2, 1, 1100, 64, 32),
    "three rows a key head": (1, 6, 2, 1, 513, 32, 32),
    "one key head for all": (2, 8, 1, 16, 77, 32, 128),
    "more queries than keys": (1, 4, 4, 5, 3, 32, 32),
    "a few queries": (2, 3, 3, 8, 600, 32, 64),
    "eleven rows": (1, 11, 1, 1, 40, 32, 96),
    "half a step": (1, 4, 2, 2, 40, 16, 48),
    "half a step beyond": (2, 3, 3, 1, 700, 80, 16),
}
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(5),
    "window alone": masks.window(7),
    "dilated": masks.causal() & masks.dilated(9, 3),
    "padding": masks.causal() & masks.padding(torch.arange(1100)[None] % 5 != 2),
    "nothing": masks.nothing(),
}
DTYPES = [torch.float32, torch.bfloat16]


def tensors(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    B, H, G, T, S, D, V = sizes
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) for n in ((B, H, T, D), (B, G, S, D), (B, G, S, V))]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, bias: Tensor | None = None) -> Tensor:
    """Every query by itself, over the keys that it may see."""
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    allowed = (masks.full() if mask is None else mask).dense(T, S).expand(B, H, T, S)
    added = torch.zeros(1).double() if bias is None else bias.double()
    added = added.expand(B, H, T, S)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = (allowed[b, h, t] & (added[b, h, t] > -torch.inf)).nonzero().flatten()
                if len(seen):
                    g = h // (H // G)
                    scores = k[b, g, seen] @ q[b, h, t] / math.sqrt(D) + added[b, h, t, seen]
                    out[b, h, t] = scores.softmax(0) @ v[b, g, seen]
    return out


def agrees(given: list[Tensor], mask: Mask | None = None, bias: Tensor | None = None, **stages: object) -> None:
    got = regard.attention(*given, mask=mask, bias=bias, kernel="few", **stages)
    with naive_precision():
        plain = regard.attention(*given, mask=mask, bias=bias, kernel="eager", **stages)
    if "position" in stages:
        (q, k, _), position = given, stages["position"]
        i, j = torch.arange(k.shape[2] - q.shape[2], k.shape[2]), torch.arange(k.shape[2])
        rows = regard.stages.Rows(q=q.double(), k=k.double(), scores=q, i=i, j=j)
        bias = position.bias(rows)  # type: ignore[attr-defined]
    near(got, formula(*given, mask, bias), plain, "few")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(MASKS))
@pytest.mark.parametrize("size", list(SIZES))
def test_masks(size: str, case: str, dtype: torch.dtype) -> None:
    agrees(tensors(SIZES[size], dtype), MASKS[case])


@pytest.mark.parametrize("axes", ["BHTS", "1HTS", "11TS", "BHT1", "1111", "B11S"])
def test_biases(axes: str) -> None:
    B, H, G, T, S, D, V = SIZES["a few queries"]
    sizes = [n if axis != "1" else 1 for axis, n in zip(axes, (B, H, T, S), strict=True)]
    bias = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    agrees(tensors((B, H, G, T, S, D, V)), bias=bias.masked_fill(bias > 1.5, -torch.inf))
    agrees(tensors((B, H, G, T, S, D, V)), masks.causal() & masks.window(300), bias)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("make", [Alibi, Kerple])
@torch.no_grad()
def test_positions_by_distance(make: type, T: int) -> None:
    position = make(4)
    for S in (5, 300, 40, 700):
        agrees(tensors((2, 4, 2, T, S, 32, 32)), masks.causal(), position=position)


@torch.no_grad()
def test_a_kept_row_of_distances_is_what_the_position_says_now() -> None:
    given = tensors((1, 4, 4, 1, 50, 32, 32))
    position = Kerple(4)
    for change in (
        lambda: None,
        lambda: position.r1.data.mul_(3),  # seen by no version counter
        lambda: setattr(position, "most", 0.5),
        lambda: setattr(position.r2, "data", torch.tensor([0.1, 0.2, 0.3, 0.9])),
        lambda: position.double(),
    ):
        change()
        agrees(given, position=position)
    agrees([t.bfloat16() for t in given], position=position.float())


@pytest.mark.parametrize("T", [1, 3])
def test_memory_in_any_order(T: int) -> None:
    q, k, v = tensors((2, 4, 2, T, 70, 32, 64))
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [torch.stack((x, x), 4)[..., 0] for x in (q, k, v)]
    longer = [q, *(torch.cat((x, torch.full_like(x, torch.nan)), 2)[:, :, :70] for x in (k, v))]
    one = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    for given in (turned, apart, longer, one):
        agrees(given, masks.causal())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_exactly_the_rows_that_see_it(where: str, value: float, dtype: torch.dtype) -> None:
    given = dict(zip("qkv", tensors((2, 4, 2, 3, 600, 32, 32), dtype), strict=True))
    given[where][0, 0, 1 if where == "q" else 598, 3] = value
    given["k"][1, 1, 7], given["v"][1, 1, 7] = torch.nan, torch.inf  # hidden
    mask = masks.causal() & masks.padding(torch.arange(600)[None] != 7)
    out = regard.attention(*given.values(), mask=mask, kernel="few")
    hit = torch.zeros(2, 4, 3, dtype=torch.bool)
    if where == "q":
        hit[0, 0, 1] = True
    else:
        hit[0, :2, 1:] = True
    assert torch.equal(out.isnan().all(-1), hit)
    assert torch.equal(out.isnan().any(-1), hit)


@pytest.mark.parametrize("T", [1, 2])
def test_plain_calls_take_the_short_way_and_say_the_same(T: int) -> None:
    """`attention` asks little of small calls; what it cannot tell so goes the long way, and is refused there."""
    q, k, v = tensors((2, 4, 2, T, 9, 32, 32))
    for mask in (None, masks.causal()):
        want = regard.attention(q, k, v, mask=mask, kernel="few")
        assert torch.equal(few.quick(q, k, v, causal=mask is not None, scale=None), want)
        assert torch.equal(regard.attention(q, k, v, mask=mask), want)
    assert torch.equal(regard.attention(q, k, v, scale=0.5), regard.attention(q, k, v, scale=0.5, kernel="few"))
    learning = q.clone().requires_grad_()
    assert regard.attention(learning, k, v).requires_grad
    for wrong in ((q, k[:, :, :5], v), (q, k, v[:1]), (q[:, :3], k, v), (q, k.double(), v), (q[0], k, v), (q, [1], v)):
        with pytest.raises((ValueError, TypeError), match="attention: "):
            regard.attention(*wrong)
    for wrong_scale in (torch.nan, "1", True):
        with pytest.raises((ValueError, TypeError), match="scale"):
            regard.attention(q, k, v, scale=wrong_scale)
    negative = torch.complex(q, q).conj().imag  # -q, whose sign is still to be turned
    assert (regard.attention(negative, k, v) - regard.attention(-q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_batch_nor_threads_make_a_difference(threads: int) -> None:
    q, k, v = tensors((3, 4, 2, 1, 3000, 32, 32))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = regard.attention(q, k, v, kernel="few")
        torch.set_num_threads(1)
        alone = [regard.attention(q[n, None], k[n, None], v[n, None], kernel="few") for n in range(3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))


def test_very_many_keys_are_summed_well() -> None:
    q, v = torch.zeros(1, 1, 1, 32), torch.ones(1, 1, 1_000_000, 32)
    out = regard.attention(q, torch.zeros_like(v), v, kernel="few")
    assert (out - 1).abs().max() < 1e-6


def test_who_it_is_for() -> None:
    def problem(T: int = 1, dtype: torch.dtype = torch.float32, D: int = 32, **parts: object) -> Problem:
        q, k, v = tensors((1, 2, 2, T, 40, D, 32), dtype)
        return Problem(q=q, k=k, v=v, scale=0.25, **parts)  # type: ignore[arg-type]

    for p in (problem(), problem(mask=masks.causal() & masks.window(8)), problem(position=Alibi(2)), problem(3)):
        assert few.why_not(p) == []
        assert choose(p).kernel == "few"
        assert _auto(p) is few
    for p, reason in (
        (problem(17), "17 queries, more than 16"),
        (problem(dtype=torch.float64), "float64"),
        (problem(D=20), "widths 20 and 32"),
        (problem(dropout=0.5), "dropout"),
        (problem(normalizer=regard.normalizers.Entmax()), "Entmax is not softmax"),
        (problem(position=regard.positions.CoPE(32)), "no function of distance"),
        (problem(position=Kerple(2)), "gradients are wanted"),
    ):
        assert any(reason in said for said in few.why_not(p)), few.why_not(p)


@pytest.mark.parametrize("name", ["softmax", "rotary", "kerple", "alibi", "window"])
@torch.no_grad()
def test_steps_take_the_short_way_and_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = regard.create(name, dim=64, num_heads=2, causal=True)
    x = torch.randn(2, 80, 64)
    outs = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr("regard.pipeline.quick_step.step", lambda layer, x, state: None)
        state, found = layer.init_state(2, 80), []
        for n in range(80):
            y, state = layer.step(x[:, n : n + 1], state)
            found.append(y)
        outs.append(torch.cat(found, 1))
    assert (outs[0] - outs[1]).abs().max() < 1e-6
    assert (outs[0] - layer(x)).abs().max() < 1e-5


def test_queries_and_keys_turn_together_as_alone() -> None:
    position, (q, k, _) = Rotary(32), tensors((2, 4, 2, 3, 3, 32, 32))
    at = torch.tensor([5, 6, 9])
    for n, places in ((3, at), (1, at[:1]), (1, at[:1] + 10**6)):
        both = position.turn(q[:, :, :n], k[:, :, :n], places, places)
        for got, z in zip(both, (q, k), strict=True):
            assert (got - position.rotate(z[:, :, :n], places)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["softmax", "rotary", "kerple", "window"])
@torch.no_grad()
def test_a_step_is_one_call_where_it_can_be(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it meets NaN, whose place in the cache is written twice, the long way says what `forward` does."""
    layer = regard.create(name, dim=64, num_heads=2, causal=True)
    x = torch.randn(2, 9, 64)
    calls = []
    joined = few.joined
    monkeypatch.setattr(few, "joined", lambda *given, **options: calls.append(1) or joined(*given, **options))
    for poisoned in (False, True):
        x[1, 4] = torch.nan if poisoned else 0.0
        state, found = layer.init_state(2, 9), []
        for token in x.split(1, 1):
            y, state = layer.step(token, state)
            found.append(y)
        want, got = layer(x), torch.cat(found, 1)
        assert torch.equal(got.isnan(), want.isnan())
        assert (got - want).nan_to_num().abs().max() < 1e-5
    assert len(calls) == 18 or (name == "window" and len(calls) > 9), "a short window makes its memory now and then"


@torch.no_grad()
def test_a_step_writes_into_nobody_elses_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two continuations of one state, and projections that give what they are given."""
    layer = regard.create("rotary", dim=64, num_heads=2, causal=True)
    x = torch.randn(1, 5, 64)
    _, state = layer.step(x[:, :3], layer.init_state(1, 8))
    one, other = (layer.step(x[:, n : n + 1], state)[0] for n in (3, 4))
    assert (one - layer(x[:, :4])[:, -1:]).abs().max() < 1e-5
    assert (other - layer(x[:, [0, 1, 2, 4]])[:, -1:]).abs().max() < 1e-5
    monkeypatch.setattr(layer.q_proj, "forward", lambda x: x)
    token = x[:, 3:4].clone()
    layer.step(token, state)
    assert torch.equal(token, x[:, 3:4])


@pytest.mark.parametrize(("n", "S", "D", "V"), [(1, 1, 32, 32), (7, 600, 16, 48), (40, 70, 64, 32)])
def test_with_the_log_sum_exp(n: int, S: int, D: int, V: int) -> None:
    """Whatever lies between keys in memory; and not for who wants gradients, or has something that isn't finite."""
    q, k, v = torch.randn(3, n, D), torch.randn(3, S + 5, D + 8)[:, 2 : S + 2, :D], torch.randn(3, S, V)
    found = few.with_lse(q, k, v)
    assert found is not None
    scores = q.double() @ k.double().mT
    assert (found[0] - scores.softmax(-1) @ v.double()).abs().max() < 1e-5
    assert (found[1] - scores.logsumexp(-1)).abs().max() < 1e-5
    assert few.with_lse(q, k, v.clone().requires_grad_()) is None
    assert few.with_lse(q.double(), k.double(), v.double()) is None
    v[1, 0, 0] = torch.inf
    assert few.with_lse(q, k, v) is None

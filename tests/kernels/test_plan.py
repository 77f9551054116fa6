"""What the plan predicts: work that is counted rightly, choices that follow from it, and the price of planning."""

import gc
import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import masks
from regard.kernels import KERNELS, Problem, choose, cost, decode, problem
from regard.kernels.cost import RATES, Cost, rates, reached
from regard.kernels.plan import _auto
from regard.kernels.size import counted
from regard.normalizers import Entmax
from regard.positions import Alibi


def made(T: int, S: int | None = None, *, B: int = 1, H: int = 2, G: int | None = None, **parts: object) -> Problem:
    S, G = S or T, G or H
    torch.manual_seed(0)
    sizes = ((B, H, T, 16), (B, G, S, 16), (B, G, S, 16))
    q, k, v = (torch.randn(size) for size in sizes)
    return Problem(q=q, k=k, v=v, scale=0.25, **parts)


NEAR = masks.causal() & masks.window(64)
DOCUMENTS = masks.causal() & masks.documents(torch.arange(1024) // 200)
TILES = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3
CASES = {
    "full": made(1024),
    "causal": made(1024, mask=masks.causal()),
    "window": made(1024, mask=NEAR),
    "documents": made(1024, mask=DOCUMENTS),
    "blocks": made(1024, mask=masks.chosen(TILES, 1024, 1024, 64)),
    "neighborhood": made(1024, mask=masks.neighborhood((32, 32), 7)),
    "alibi": made(1024, mask=masks.causal(), position=Alibi(2)),
    "alibi in a window": made(1024, mask=NEAR, position=Alibi(2)),
    "entmax": made(1024, normalizer=Entmax()),
    "grouped": made(1024, H=4, G=2, mask=NEAR),
    "one query": made(1, 1024, mask=masks.causal()),
}


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused(q: torch.Size, k: torch.Size, v: torch.Size, *rest: object, **options: object) -> int:
    """Torch's counter lacks the CPU's fused kernel."""
    return 2 * q[:3].numel() * k[2] * (q[3] + v[3])


@pytest.mark.parametrize("case", list(CASES))
def test_predicted_products_are_those_that_run(case: str) -> None:
    """Torch's own counter is the judge. It knows nothing of a causal kernel's skipped half, nor of C++ of our own;
    a block of queries is filled up, which one query should not be charged for."""
    p = CASES[case]
    counter = {"sdpa", "window", "neighborhood", "block_sparse", "decode", "chunked", "eager"}
    plan = choose(p)
    assert set(plan.costs) == {name for name, module in KERNELS.items() if not module.why_not(p)}
    unlike = {"causal": {"sdpa"}, "one query": {"block_sparse"}}.get(case, set())
    for name in counter & set(plan.costs) - unlike:
        with FlopCounterMode(display=False, custom_mapping={FUSED: fused}) as seen, torch.no_grad():
            KERNELS[name].run(p)
        assert 0.8 * seen.get_total_flops() <= plan.costs[name].flops <= 1.25 * seen.get_total_flops(), name


def test_a_causal_square_is_half_the_work() -> None:
    costs = [choose(made(8192, mask=mask)).costs["sdpa"].flops for mask in (None, masks.causal())]
    assert 0.5 < costs[1] / costs[0] < 0.6


@pytest.mark.parametrize("mask", [None, masks.causal(), NEAR, masks.window(100)], ids=str)
@pytest.mark.parametrize(("T", "S", "rows"), [(1000, 1000, 100), (500, 1000, 50), (64, 64, 64)])
def test_reached_pairs_are_those_of_the_key_ranges(mask: masks.Mask | None, T: int, S: int, rows: int) -> None:
    p = made(T, S, mask=mask)
    chunks = [slice(start, start + rows) for start in range(0, T, rows)]
    ranges = [problem.key_range(p, chunk) for chunk in chunks]
    exact = sum(rows * (keys.stop - keys.start) for keys in ranges)
    assert exact <= 1.01 * reached(p, rows) <= 1.15 * exact


def test_masks_with_tensors_are_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are not kept alive by that."""
    looked = []
    real = masks.Mask.layout
    monkeypatch.setattr(masks.Mask, "layout", lambda self, *a, **k: looked.append(self) or real(self, *a, **k))
    ids = torch.arange(1024) // 100
    mask, memory = masks.documents(ids), StorageWeakRef(ids.untyped_storage())
    first = choose(made(1024, mask=mask)).costs
    once = len(looked)
    assert once
    assert choose(made(1024, mask=mask)).costs == first
    assert len(looked) == once
    looked.clear()
    del mask, ids
    gc.collect()
    assert memory.expired()


def test_a_mask_written_into_is_still_obeyed() -> None:
    ids = torch.arange(1024) // 256
    mask, p = masks.documents(ids), made(1024)
    x = (p.q, p.k, p.v)
    regard.attention(*x, mask=mask, kernel="block_sparse")
    choose(replace(p, mask=mask))
    ids.copy_(torch.arange(1024) // 512)
    got = regard.attention(*x, mask=mask, kernel="block_sparse")
    want = regard.attention(*x, mask=mask, kernel="eager")
    assert (got - want).abs().max() < 1e-5


def test_the_choice_is_the_cheapest() -> None:
    for case, p in CASES.items():
        plan = choose(p)
        seconds = {name: rates().seconds(cost) for name, cost in plan.costs.items()}
        assert plan.kernel == min(seconds, key=seconds.__getitem__), case


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("keys", [64, 65536])
def test_what_runs_is_what_is_planned(case: str, keys: int) -> None:
    """The shortcut for plain problems comes to the same."""
    p = CASES[case] if case != "one query" else made(1, keys, mask=masks.causal())
    assert _auto(p) is KERNELS[choose(p).kernel]


def test_scores_too_large_to_hold_are_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    p = made(64, normalizer=Entmax())
    free = Cost(1, 0, 0, "nothing")
    monkeypatch.setattr(KERNELS["eager"], "cost", lambda p: free)
    assert choose(p).kernel == "eager"
    monkeypatch.setattr("regard.kernels.plan.MATERIALISE", 0)
    plan = choose(p)
    assert plan.kernel == "chunked"
    assert plan.costs["eager"] == free
    assert choose(p, "eager").kernel == "eager"


def test_the_plan_prints_what_it_costs() -> None:
    plan = choose(CASES["window"])
    lines = str(plan).splitlines()
    assert lines[0].endswith(f"({plan.costs[plan.kernel]})")
    assert [line for line in lines if "FLOP, " in line and line.endswith("B)")] == [
        line for line in lines if any(line.startswith((name, f"  not {name}:")) for name in plan.costs)
    ]
    named = choose(CASES["window"], "eager")
    assert named.costs == plan.costs
    assert str(Cost(1.5e9, 2**20, 3, "", streamed=2**20)) == "1.5 GFLOP, 2 MB"


@pytest.mark.parametrize(("n", "text"), [(0, "0 FLOP"), (999, "999 FLOP"), (2e6, "2 MFLOP"), (3.21e14, "321 TFLOP")])
def test_operations_are_readable(n: float, text: str) -> None:
    assert counted(n) == text


def test_every_term_of_a_cost_takes_time() -> None:
    least = Cost(1e9, 1e9, 100, "", 1e9)
    for more in ({"flops": 2e9}, {"bytes": 2e9}, {"calls": 200}, {"streamed": 2e9}):
        assert rates().seconds(replace(least, **more)) > rates().seconds(least)
    for maker, found in json.loads(RATES.read_text()).items():
        assert set(found) == {"peak", "bytes", "streamed", "call", "work"}, maker
        assert found["work"].keys() >= {"fused", "unfused", "native"}, maker


def test_rates_are_those_of_the_processors_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    known = json.loads(RATES.read_text())
    for maker in (*known, "someone else"):
        monkeypatch.setattr(cost, "maker", lambda maker=maker: maker)
        rates.cache_clear()
        assert asdict(rates()) == known.get(maker, known[cost.OTHERS])
    rates.cache_clear()


def test_bf16_may_reach_another_share_of_the_peak() -> None:
    work = {"fused": 0.5, "native": 0.5, "native bf16": 1.0}
    found, product = cost.Rates(1e9, 1, 1, 0, work), Cost(1e9, 0, 0, "", products="native")
    assert found.seconds(product, torch.bfloat16) == 1
    assert found.seconds(product) == found.seconds(replace(product, products="fused"), torch.bfloat16) == 2


def _calls(p) -> int:
    """How many functions one choice calls: a measure of its time that no busy machine changes."""
    choose(p)
    seen = 0

    def count(frame: object, event: str, value: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        choose(p)
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("mask", [NEAR, DOCUMENTS], ids=["window", "documents"])
def test_planning_is_cheap(mask) -> None:
    """Some 0.25 ms of Python (1,000 calls): far below what it decides about."""
    assert _calls(made(1024, mask=mask)) < 1_300


# --- decode ---------------------------------------------------------------------------------------------------

DECODED = {
    "all": None,
    "causal": masks.causal(),
    "window": NEAR,
    "padded": masks.causal() & masks.padding(lengths=torch.tensor([300, 7])),
    "nothing": masks.padding(lengths=torch.tensor([300, 0])),
}


@pytest.mark.parametrize("case", list(DECODED))
def test_decode(case: str) -> None:
    p = made(1, 300, B=2, H=4, G=2, mask=DECODED[case])
    inputs = [t.double().requires_grad_() for t in (p.q, p.k, p.v)]
    results = []
    for kernel in ("decode", "eager"):
        out = regard.attention(*inputs, mask=p.mask, kernel=kernel)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v", "masked k", "masked v"])
def test_decode_hides_nothing(where: str, value: float) -> None:
    """What the first batch row holds at key 5 reaches its heads that see it, whatever the weights, and no others."""
    p = made(1, 64, B=2, H=4, G=2, mask=masks.padding(torch.arange(64).expand(2, -1) != 9))
    tensors: dict[str, Tensor] = {"q": p.q, "k": p.k * 1e3, "v": p.v}
    row = 0 if where == "q" else 9 if "masked" in where else 5
    tensors[where[-1]][0, 0, row, 3] = value
    out, want = (regard.attention(*tensors.values(), mask=p.mask, kernel=name) for name in ("decode", "chunked"))
    assert torch.equal(out.isnan(), want.isnan())
    heads = {"q": 1, "k": 2, "v": 2}.get(where, 0)
    assert out.isnan().any(-1).sum() == heads
    assert (out - want).nan_to_num().abs().max() < 1e-5


def test_zero_queries_do_not_hide_nan_keys() -> None:
    p = made(1, 64)
    p.q.zero_()
    p.k[0, 0, 5] = float("nan")
    out = regard.attention(p.q, p.k, p.v, kernel="decode")
    assert out[0, 0].isnan().all()
    assert not out[0, 1].isnan().any()


def test_decode_refuses_what_it_cannot_run() -> None:
    assert decode.why_not(made(1, 9)) == []
    for p, reason in (
        (made(2, 9), "2 queries, not one"),
        (made(1, 9, dropout=0.5), "plain softmax"),
        (made(1, 9, position=Alibi(2)), "plain softmax"),
        (replace(made(1, 9), q=torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)), "rounded to torch.bfloat16"),
    ):
        assert any(reason in said for said in decode.why_not(p))

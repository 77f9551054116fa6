"""FLOPs are those of the problem, whatever kernel runs: checked against the eager kernel's plain products."""

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import masks
from regard.cost import costs
from regard.kernels import Problem
from regard.kernels.flops import FlopCounter
from regard.kernels.linear_scan import linear_scan
from regard.kernels.plan import KERNELS, choose
from regard.pipeline import Attention
from regard.pipeline.function import problem

B, H, G, T, D, V = 2, 4, 2, 144, 8, 8
GRID = masks.neighborhood((12, 12), 5)
KEPT = torch.arange(T) < torch.tensor([[T], [T // 3]])
CHOSEN = masks.chosen(torch.rand(B, H, T, 2, generator=torch.Generator().manual_seed(0)) > 0.5, T, T, (1, 72))
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(7),
    "padding": masks.padding(KEPT),
    "grid": GRID,
    "chosen": CHOSEN,
}


def counts(call: Callable[[], Tensor], counter: Any) -> tuple[int, int]:
    """FLOPs of a call, and of backward through it."""
    with counter:
        out = call()
        forward = counter.get_total_flops()
        if out.requires_grad:
            out.sum().backward()
    return forward, counter.get_total_flops() - forward


def counted(call: Callable[[], Tensor]) -> tuple[int, int]:
    return counts(call, FlopCounter())


def plainly(call: Callable[[], Tensor]) -> tuple[int, int]:
    """What torch's own counter sees of torch's operators alone."""
    with patch("regard.kernels.plan.counting", lambda p: False):
        return counts(call, FlopCounterMode(display=False))


def hidden(p: Problem) -> int:
    """Pairs that the mask forbids, from the mask as a tensor."""
    if p.mask is None:
        return 0
    allowed = p.mask.at(p.i, p.j).expand(p.q.shape[0], p.q.shape[1], -1, -1)
    return int((~allowed).sum())


def drawn(*, grad: bool = True, length: int = T) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, n, length, w, requires_grad=grad) for n, w in ((H, D), (G, D), (G, V))]


@pytest.mark.parametrize(
    ("mask", "grad"),
    [
        pytest.param(mask, grad, marks=[] if (n + grad) % 2 else pytest.mark.slow)
        for n, mask in enumerate(MASKS)
        for grad in (False, True)
    ],
)
def test_every_kernel_costs_what_the_allowed_pairs_do(mask: str, grad: bool) -> None:
    given = drawn(grad=grad)
    p = problem(*given, mask=MASKS[mask])
    kernels = [name for name, reasons in choose(p, "eager").why_not.items() if reasons == ["not asked for"]]
    assert {"sdpa", "chunked"} <= set(kernels)
    full = plainly(lambda: regard.attention(*given, mask=MASKS[mask], kernel="eager"))
    assert full == (2 * B * H * T * T * (D + V), 2 * full[0] * grad)
    once = full[0] - 2 * (D + V) * hidden(p)
    for kernel in ["auto", "eager", *kernels]:
        found = counted(lambda kernel=kernel: regard.attention(*given, mask=MASKS[mask], kernel=kernel))
        assert found == (once, 2 * once * grad), kernel


def test_one_query_against_a_cache() -> None:
    q, k, v = torch.randn(B, H, 1, D), *torch.randn(2, B, G, 50, D)
    for kernel in ("auto", "decode", "eager"):
        assert counted(lambda kernel=kernel: regard.attention(q, k, v, mask=masks.causal(), kernel=kernel))[0] == (
            2 * B * H * 50 * 2 * D
        )


def test_gradients_that_nobody_wants_cost_nothing() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        given = [t.detach().requires_grad_(want) for t, want in zip(drawn(), wanted, strict=True)]
        want = plainly(lambda given=given: regard.attention(*given, kernel="eager"))
        for kernel in ("sdpa", "chunked", "eager"):
            assert counted(lambda given=given, kernel=kernel: regard.attention(*given, kernel=kernel)) == want


def test_what_stands_around_attention_is_counted_too() -> None:
    """Also behind it in backward, where counting goes on."""
    layer = Attention(32, 4, causal=True)
    x = torch.randn(1, 40, 32)
    pairs, weights = 40 * 41 // 2 * 4, 4 * 32 * 32
    forward, backward = counted(lambda: layer(x))
    assert forward == 2 * (40 * weights + pairs * 2 * 8)
    assert backward == 2 * (40 * weights * 2 + pairs * 4 * 8) - 2 * 40 * weights * 3 // 4, "x wants no gradient"


def test_modules_have_their_own() -> None:
    layer = torch.nn.Sequential(Attention(32, 4), Attention(32, 4))
    with FlopCounter() as counter:
        layer(torch.randn(1, 40, 32))
    found = counter.get_flop_counts()
    assert sum(found["Sequential.0"].values()) * 2 == sum(found["Sequential"].values()) == counter.get_total_flops()


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "native", "chunked", "eager"])
def test_the_counter_of_torch_is_told_of_attention_too(kernel: str) -> None:
    """Whose operators on CPUs it does not know; and both may count at once, one within the other."""
    p = problem(*drawn(), mask=masks.causal())
    if KERNELS[kernel].why_not(p) if kernel != "auto" else ():
        kernel = "auto"
    want = counted(lambda: regard.attention(*drawn(), mask=masks.causal(), kernel=kernel))
    assert want[0] > 0
    with FlopCounter() as outer:
        got = counts(
            lambda: regard.attention(*drawn(), mask=masks.causal(), kernel=kernel), FlopCounterMode(display=False)
        )
        after = torch.ones(2, 3) @ torch.ones(3, 4)
    assert got == want
    assert outer.get_total_flops() == sum(want) + 2 * after.numel() * 3


def test_nothing_is_added_once_the_counter_is_left() -> None:
    out = []
    with FlopCounter() as counter:
        out.append(regard.attention(*drawn()))
        with FlopCounter() as inner:
            regard.attention(*drawn())
    assert counter.get_total_flops() == 2 * inner.get_total_flops()
    before = counter.get_total_flops()
    out[0].sum().backward()
    assert counter.get_total_flops() == before


PARTS = [n for n in regard.mechanisms() if regard.card(n).is_part and regard.card(n).protocol == "TokenMixer"]


@pytest.mark.parametrize("length", [24, 96])
@pytest.mark.parametrize("name", PARTS)
def test_each_mechanism_costs_what_its_eager_kernel_does(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less the pairs that its mask forbids: 2 (D + V) for each, 2 V where its own scores replace dot products."""
    card = regard.card(name)
    options = {**card.example, **{n: length for n in ("max_positions", "max_length") if n in card.options}}
    problems: list[Problem] = []
    real = Attention._prepare
    monkeypatch.setattr(Attention, "_prepare", lambda *a: problems.append((found := real(*a))[0]) or found)
    for causal in [c for c, word in ((False, "bidirectional"), (True, "causal")) if word in card.supports]:
        torch.manual_seed(0)
        layer = regard.create(name, dim=24, num_heads=6, causal=causal, **options).eval()
        x = torch.randn(2, length, 24, requires_grad=True)
        found = counted(lambda layer=layer, x=x: layer(x))
        layer.kernel = "eager"
        full = plainly(lambda layer=layer, x=x: layer(x))
        p = problems[-1]
        dots = p.score is None or any("scores" in stage.needs for stage in p.stages)
        spared = 2 * (dots * p.q.shape[3] + p.v.shape[3]) * hidden(p)
        assert found == (full[0] - spared, full[1] - 2 * spared)
        assert causal <= bool(spared)


def per_token(name: str, length: int, **options: Any) -> float:
    layer = regard.create(name, dim=32, num_heads=4, causal=True, **options)
    return counted(lambda: layer(torch.randn(1, length, 32)))[0] / length


def test_work_grows_with_the_length_for_softmax_and_stays_for_what_is_linear() -> None:
    for name, options in (("softmax", {}), ("alibi", {}), ("kerple", {})):
        one, four = (per_token(name, n, **options) for n in (256, 1024))
        assert four - one == 4 * 32 * (1024 - 256) / 2, name
    assert per_token("window", 1024, window=32) < 1.02 * per_token("window", 256, window=32)
    for name in ("linear", "lightning", "fast", "performer"):
        # From where all but the first chunk or part ask what stood before.
        assert per_token(name, 4096) < 1.05 * per_token(name, 1024), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_torchs_fused_attention_called_directly(is_causal: bool) -> None:
    q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    seen = torch.rand(T, T) > 0.3
    for mask, pairs in ((None, T * (T + 1) // 2 if is_causal else T * T), (seen, int(seen.sum()))):
        if is_causal and mask is not None:
            continue
        terms = [mask] if mask is None else [mask, torch.zeros(T, T).masked_fill(~mask, -math.inf)]
        for term in terms:
            once = 2 * B * H * pairs * 2 * D
            found = counted(lambda term=term: F.scaled_dot_product_attention(q, k, v, term, is_causal=is_causal))
            assert found == (once, 2 * once)


@pytest.mark.parametrize("real", [False, True])
def test_ffts(real: bool) -> None:
    x = torch.randn(3, 64, dtype=torch.float32 if real else torch.complex64)
    there = torch.fft.rfft if real else torch.fft.fft
    back = torch.fft.irfft if real else torch.fft.ifft
    each = (2.5 if real else 5) * 3 * 64 * 6
    assert counted(lambda: there(x))[0] == each
    assert counted(lambda: back(there(x)))[0] == 2 * each
    assert counted(lambda: torch.fft.fft2(torch.randn(2, 8, 16, dtype=torch.complex64)))[0] == 5 * 2 * 128 * 7


def test_scans_cost_their_chunked_form() -> None:
    """On GPUs the Triton scan is an operator of its own: charged the same."""
    from regard.kernels.triton_scan import FORMULAS

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 100, 8, requires_grad=True).unbind(0)
    for g in (None, -torch.rand(1, 2, 100, 1), -torch.rand(1, 2, 100, 8)):
        decay = None if g is None else g.clone().requires_grad_()
        decayed = decay if decay is None or decay.shape[3] > 1 else decay[..., 0]
        state = torch.zeros(1, 2, 8, 8, requires_grad=True)

        def both(decayed: Tensor | None = decayed, state: Tensor = state) -> Tensor:
            out, last = linear_scan(q, k, v, decayed, state=state)
            return out.sum() + last.sum()

        given = {"q": q, "k": k, "v": v, "g": g, "state": state}
        found = tuple(FORMULAS[f"regard.triton_scan{name}"](given) for name in ("", "_backward"))
        assert found == plainly(both)


@pytest.mark.parametrize(
    "name", [n for n in PARTS if (card := regard.card(n)).made.slot != "selector" and "routed" not in card.traits]
)
def test_cards_of_the_pipeline_say_what_is_counted(name: str) -> None:
    """Within a tenth at heads of 64 and 4096 tokens: formulas may add elementwise work, which nobody counts."""
    card, length = regard.card(name), 4096
    options = {"max_positions": length} if name == "learned" else {}
    causal = "bidirectional" not in card.supports
    layer = regard.create(name, dim=256, num_heads=4, causal=causal, device="meta", **options)
    with torch.no_grad(), FlopCounter() as counter:
        layer(torch.empty(1, length, 256, device="meta"))
    weights = sum(p.weight.numel() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    said = costs(card, options, batch=1, heads=4, length=length, width=64)["time"]
    assert counter.get_total_flops() / 2 - length * weights == pytest.approx(said, rel=0.1)

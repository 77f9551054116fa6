"""Score mods and mask mods of one's own: torch's FlexAttention, the sheet's loops, and what they read."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.kernels import chunked, online
from regard.laws.agreement import close
from regard.pipeline.function import problem
from regard.scores import ScoreMod
from regard.scores.score_mod import from_score_mod
from scores import flex_mods
from scores.naive_score_mod import flex

VECTORS = np.load(Path(__file__).parent.parent / "vectors" / "B034.npz")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
B, H, G, T, S, D = 2, 4, 2, 5, 7, 4


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along each side, of queries and of keys."""
    monkeypatch.setattr(chunked, "_tile", lambda p: (4, 3))


def qkv(T: int = T, S: int = S, **how: object) -> list[Tensor]:
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, 3)
    made = [torch.randn(n, dtype=how.get("dtype", torch.float64)) for n in shapes]
    return [z.requires_grad_(bool(how.get("grad", True))) for z in made]


def gradients(out: Tensor, *given: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return list(torch.autograd.grad((out * weights).sum(), given, retain_graph=True))


@pytest.mark.parametrize("case", list(flex_mods.CASES))
def test_is_flex_attention(case: str, small_tiles: None) -> None:
    """Values are torch's own, and gradients those of loops over pairs, on every kernel that trains."""
    made = flex_mods.CASES[case]()
    want, slopes = made.torchs(), made.gradients(made.naive)
    for kernel in ("auto", "eager", "chunked", *(["block_sparse"] if made.mask_mod else [])):
        close(made.ours(*made.qkv(), kernel=kernel).detach(), want, kernel)
        for got, slope in zip(made.gradients(partial(made.ours, kernel=kernel)), slopes, strict=True):
            close(got, slope, kernel)
    with torch.no_grad():
        able = regard.plan(*made.qkv(), mask=made.mask_mod, score_mix=made.score_mod).costs
        assert {"eager", "chunked", "flex"} <= able.keys()
        for kernel in able:
            close(made.ours(*made.qkv(), kernel=kernel), want, kernel)


# --- golden numbers: torch 2.13, whose q_idx counts queries from 0 ------------------------------------------------

SLOPES, IDS = torch.tensor(VECTORS["alibi_slopes"]), torch.tensor(VECTORS["document_document"])
GOLDEN: dict[str, tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]] = {
    "alibi": (
        lambda score, b, h, q, k: score + SLOPES[h] * (k - q),
        lambda b, h, q, k: q >= k,
    ),
    "document": (
        None,
        lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k),
    ),
    "window_or_sink": (None, lambda b, h, q, k: (q >= k) & ((q - k < 4) | (k < 2))),
    "softcap": (lambda score, b, h, q, k: 3 * torch.tanh(score / 3), None),
    "empty": (None, lambda b, h, q, k: k < q - 2),
    "prefix": (None, lambda b, h, q, k: (q >= k) | (k < 5)),
}


@pytest.mark.parametrize("case", list(GOLDEN))
@pytest.mark.parametrize("kernel", ["auto", "eager", "chunked", "block_sparse", "flex"])
def test_golden_numbers(case: str, kernel: str, small_tiles: None) -> None:
    q, k, v, y = (torch.tensor(VECTORS[f"{case}_{name}"]) for name in ("q", "k", "v", "y"))
    score_mod, mask_mod = GOLDEN[case]
    mask = None if mask_mod is None else masks.from_mask_mod(mask_mod, q.shape[2], k.shape[2])
    if mask is None and kernel == "block_sparse":
        mask = masks.full()
    scale = 0.7 if case == "softcap" else None
    close(regard.attention(q, k, v, mask=mask, score_mix=score_mod, scale=scale, kernel=kernel), y)


@pytest.mark.parametrize("case", list(GOLDEN))
def test_the_loops_give_golden_numbers(case: str) -> None:
    q, k, v, y, lse = (torch.tensor(VECTORS[f"{case}_{name}"]) for name in ("q", "k", "v", "y", "lse"))
    got = flex(q, k, v, *GOLDEN[case], scale=0.7 if case == "softcap" else None)
    close(got[0], y)
    close(got[1], lse)


# --- where indices count from --------------------------------------------------------------------------------------


def by_place(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score * (1 + h) + torch.sin(1.0 + b + 3 * q_idx - kv_idx)


@pytest.mark.parametrize("kernel", ["eager", "chunked", "flex"])
@pytest.mark.parametrize(("T", "S"), [(5, 7), (7, 5), (1, 6), (4, 1)])
def test_positions_count_from_the_first_key(T: int, S: int, kernel: str, small_tiles: None) -> None:
    """The last query stands where the last key stands; `from_score_mod` counts queries from 0, as torch does."""
    q, k, v = qkv(T, S, grad=False)
    close(regard.attention(q, k, v, score_mix=by_place, kernel=kernel), flex(q, k, v, by_place, first=S - T)[0])
    close(
        regard.attention(q, k, v, score_mix=from_score_mod(by_place, T, S), kernel=kernel), flex(q, k, v, by_place)[0]
    )


def test_the_two_counts_differ() -> None:
    q, k, v = qkv(grad=False)
    theirs = regard.attention(q, k, v, score_mix=from_score_mod(by_place, T, S))
    assert (regard.attention(q, k, v, score_mix=by_place) - theirs).abs().max() > 0.01


def test_a_stream_is_asked_about_the_same_positions() -> None:
    table = torch.randn(2, 12, 12, dtype=torch.float64)
    layer = regard.Attention(
        8, 2, causal=True, score_mix=lambda score, b, h, q, k: score + table[h, q, k], dtype=torch.float64
    )
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    whole, state, outs = layer(x), layer.init_state(2, 12), []
    for part in x.split([5, 1, 1, 3, 2], 1):
        y, state = layer.step(part, state)
        outs.append(y)
    close(torch.cat(outs, 1), whole)


# --- what a function reads -----------------------------------------------------------------------------------------


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, 20, dtype=torch.float64))

    def forward(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.table[h, q_idx - kv_idx + 10]


def test_parameters_of_a_part_train_move_and_are_saved() -> None:
    table = nn.Parameter(torch.randn(H, 20, dtype=torch.float64))

    def looked_up(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *, table: Tensor, off: Tensor) -> Tensor:
        return score + table[h, q - k + 10] + off

    handed = ScoreMod(looked_up, table=table, off=torch.zeros((), dtype=torch.float64))
    assert set(dict(handed.named_parameters())) == {"table"}
    assert set(handed.state_dict()) == {"table", "off"}
    assert {z.dtype for z in handed.half().state_dict().values()} == {torch.float16}
    handed.double()
    module = ScoreMod(Learned())
    assert set(module.state_dict()) == {"function.table"}
    layer = regard.Attention(8, H, causal=True, score_mix=module, dtype=torch.float64)
    assert "score_mix.function.table" in layer.state_dict()
    layer(torch.randn(1, 6, 8, dtype=torch.float64)).sum().backward()
    assert module.function.table.grad.abs().max() > 0


@pytest.mark.parametrize("kernel", ["eager", "chunked", "block_sparse"])
def test_gradients_of_what_is_closed_over(kernel: str, small_tiles: None) -> None:
    """Leaves, what was computed of them and is read beside them, and queries themselves, each counted once."""
    q, k, v = qkv()
    raw = torch.randn(H, dtype=torch.float64, requires_grad=True)
    warm = raw.exp()
    inner = q.sum((1, 3))  # (B, T)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score * warm[h] + raw[h] * (i - j) + inner[b, i - (S - T)] * torch.cos(1.0 * j)

    out = regard.attention(q, k, v, score_mix=score_mod, mask=masks.causal(), kernel=kernel)
    want, _ = flex(q, k, v, score_mod, lambda b, h, i, j: i >= j, first=S - T)
    close(out, want)
    for got, slope in zip(gradients(out, q, k, v, raw), gradients(want, q, k, v, raw), strict=True):
        close(got, slope)


def test_second_derivatives(small_tiles: None) -> None:
    q, k, v = qkv(3, 4)
    raw = torch.randn(H, dtype=torch.float64, requires_grad=True)
    warm = raw.exp()

    def run(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> list[Tensor]:
        mod = lambda score, b, h, i, j: torch.tanh(score * warm[h]) + raw[h] * j  # noqa: E731
        out = regard.attention(q, k, v, score_mix=mod, kernel=kernel)
        first = torch.autograd.grad(out.square().sum(), (q, raw), create_graph=True)
        return list(torch.autograd.grad(sum(z.square().sum() for z in first), (q, k, v, raw), retain_graph=True))

    for got, want in zip(run(q, k, v, "chunked"), run(q, k, v, "eager"), strict=True):
        close(got, want)


class Doubled(torch.autograd.Function):
    """Past torch's functions: nobody sees what it is given."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


def test_what_cannot_be_seen_gets_its_gradient_too(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_BYTES", 1)
    q, k, v = qkv(20, 20)
    shift = torch.randn((), dtype=torch.float64, requires_grad=True)
    mod = lambda score, b, h, i, j: score + Doubled.apply(shift) * j  # noqa: E731
    assert online.reads(problem(q, k, v, score_mix=ScoreMod(mod))) is None
    got, want = (regard.attention(q, k, v, score_mix=mod, kernel=kernel) for kernel in ("chunked", "eager"))
    close(gradients(got, shift)[0], gradients(want, shift)[0])


def test_torch_func_goes_through(small_tiles: None) -> None:
    q, k, v = qkv(grad=False)
    slope = torch.randn(H, dtype=torch.float64)

    def total(slope: Tensor) -> Tensor:
        return regard.attention(q, k, v, score_mix=lambda s, b, h, i, j: s + slope[h] * j).square().sum()

    want = torch.autograd.functional.jacobian(total, slope)
    close(torch.func.grad(total)(slope), want)


# --- masks, NaN, dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["eager", "chunked", "block_sparse"])
def test_a_slope_that_is_nan_behind_the_mask_reaches_nobody(kernel: str, small_tiles: None) -> None:
    q, k, v = qkv()
    # At later keys the logarithm and its slope are NaN.
    mod = lambda score, b, h, i, j: score * (1.0 + i - j).log()  # noqa: E731
    out = regard.attention(q, k, v, score_mix=mod, mask=masks.causal(), kernel=kernel)
    want, _ = flex(q, k, v, mod, lambda b, h, i, j: i >= j, first=S - T)
    close(out, want)
    for got, slope in zip(gradients(out, q, k, v), gradients(want, q, k, v), strict=True):
        close(got, slope)


@pytest.mark.parametrize("kernel", ["eager", "chunked", "block_sparse"])
def test_rows_that_a_function_masks_whole_are_zero(kernel: str, small_tiles: None) -> None:
    q, k, v = qkv()
    mod = lambda score, b, h, i, j: torch.where((h == 1) | (i == 4), -math.inf, score)  # noqa: E731
    out = regard.attention(q, k, v, score_mix=mod, mask=masks.causal(), kernel=kernel)
    assert not out[:, 1].any()
    assert not out[:, :, 2].any()
    assert out[:, 0, [0, 1, 3, 4]].all()
    got = gradients(out, q, k, v)
    assert all(bool(z.isfinite().all()) for z in got)
    assert not got[0][:, 1].any()


def test_nan_stays_in_its_head_and_its_row() -> None:
    q, k, v = qkv(grad=False)
    q[0, 1, 2] = math.nan
    for kernel in ("eager", "chunked"):
        hit = regard.attention(q, k, v, score_mix=by_place, kernel=kernel).isnan()
        assert hit.nonzero()[:, :3].unique(dim=0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_scores_are_wide(dtype: torch.dtype, kernel: str, small_tiles: None) -> None:
    """A function is handed scores in float32 at least, and may answer in a wider dtype."""
    q, k, v = qkv(grad=False, dtype=dtype)
    seen = []

    def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen.append(score.dtype)
        return score.double() / 3

    out = regard.attention(q, k, v, score_mix=mod, kernel=kernel)
    assert set(seen) == {torch.float32}
    assert out.dtype == dtype
    want = regard.attention(q.double(), k.double(), v.double(), scale=D**-0.5 / 3)
    assert (out.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


def test_other_normalizers_see_the_mask_of_a_function() -> None:
    q, k, v = qkv()
    entmax = regard.normalizers.Entmax()
    by_score = lambda score, b, h, i, j: torch.where(i >= j, score, -math.inf)  # noqa: E731
    got = regard.attention(q, k, v, score_mix=by_score, normalizer=entmax)
    close(got, regard.attention(q, k, v, mask=masks.causal(), normalizer=entmax))


def test_a_trace_is_of_the_changed_scores() -> None:
    layer = regard.Attention(8, 2, score_mix=lambda score, b, h, i, j: torch.where(j == i, score, -math.inf))
    found = regard.trace(layer, torch.randn(1, 6, 8))
    weights = found.layers[0].weights if hasattr(found.layers[0], "weights") else None
    assert weights is not None
    got = weights() if callable(weights) else weights
    torch.testing.assert_close(got, torch.eye(6).expand_as(got))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_bad_functions() -> None:
    q, k, v = qkv()

    def branches(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if i > j else -score

    for function, message in (
        (branches, "PairMix: function can't be asked about many pairs .*without `if`"),
        (lambda score, b, h, i, j: 1.0, "PairMix: function can't be asked about many pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            regard.attention(q, k, v, score_mix=function)
    with pytest.raises(TypeError, match=r"PairMix: function gives no scores .*bool"):
        regard.attention(q, k, v, score_mix=lambda score, b, h, i, j: i >= j)
    with pytest.raises(TypeError, match="ScoreMod: function is none"):
        ScoreMod("alibi")
    with pytest.raises(TypeError, match="ScoreMod: table has the wrong type"):
        ScoreMod(by_place, table=3)
    with pytest.raises(ValueError, match="ScoreMod: training is a name of modules"):
        ScoreMod(by_place, training=torch.zeros(3))
    with pytest.raises(TypeError, match="score_mix has the wrong type"):
        regard.attention(q, k, v, score_mix=lambda score: score)
    with pytest.raises(TypeError, match=r"'score_mod'.*score_mix="):
        regard.attention(q, k, v, score_mod=by_place)
    with pytest.raises(ValueError, match="score_mod: function can't be found"):
        regard.create("score_mod", dim=8, num_heads=2, function="nowhere:at_all")


def test_on_cpus_torch_has_no_gradients_for_what_is_read() -> None:
    q, k, v = qkv(grad=False)
    table = torch.zeros(H, requires_grad=True)
    given = {"score_mix": lambda score, b, h, i, j: score + table[h]}
    with pytest.raises(ValueError, match="no gradients for FlexAttention on CPUs"):
        regard.attention(q, k, v, **given, kernel="flex")
    assert regard.plan(q, k, v, **given).kernel != "flex"

"""The linear scan: its forms against each other and against loops, far decays, long sequences, what it keeps."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linear.naive_linear_scan import naive_linear_scan
from regard.kernels.linear_scan import Scan, linear_scan
from regard.laws.agreement import close, near, same

B, H, K, V = 2, 3, 4, 5
DECAYS = ["none", "head", "time", "feature"]


def inputs(T: int, decay: str = "none", seed: int = 0, strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {"q": normal(B, H, T, K), "k": normal(B, H, T, K), "v": normal(B, H, T, V), "state": normal(B, H, K, V)}
    shapes = {"head": (H,), "time": (B, H, T), "feature": (B, H, T, K)}
    if decay != "none":
        made["decay"] = -strength * normal(*shapes[decay]).abs()
    return made


def factors(decay: Tensor | None, T: int) -> Tensor | None:
    """The logarithms as the oracle wants them: factors, by time."""
    if decay is None:
        return None
    return (decay[None, :, None].expand(B, H, T) if decay.dim() == 1 else decay).exp()


def run(scan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of all inputs, of a loss on both."""
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    out, state = scan(**leaves)
    g = torch.Generator().manual_seed(99)
    loss = sum((z * torch.randn(z.shape, generator=g, dtype=z.dtype)).sum() for z in (out, state))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(t) if d is None else d for d, t in zip(grads, leaves.values(), strict=True)]
    return {"out": out.detach(), "final": state.detach(), **dict(zip(leaves, filled, strict=True))}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["parallel", "step", "chunked"])
@pytest.mark.parametrize("T", [1, 2, 3, 9, 17])
def test_forms_are_the_loops(decay: str, form: str, T: int) -> None:
    given = inputs(T, decay)
    want = run(lambda q, k, v, state, decay=None: naive_linear_scan(q, k, v, factors(decay, T), state), given)
    for chunk in (1, 2, 4, 5, 64) if form == "chunked" else (64,):
        agree(run(lambda chunk=chunk, **leaves: linear_scan(**leaves, form=form, chunk=chunk), given), want)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [0.0, 1e-9, 1.0, 40.0, 3000.0], ids=str)
def test_decays_near_one_and_near_zero(decay: str, strength: float) -> None:
    """From factors of 1 to factors that underflow, more than a group of chunks long."""
    given = inputs(71, decay, strength=strength)
    want = run(lambda **leaves: linear_scan(**leaves, form="step"), given)
    for form, chunk in (("parallel", 64), ("chunked", 3), ("chunked", 16)):
        got = run(lambda form=form, chunk=chunk, **leaves: linear_scan(**leaves, form=form, chunk=chunk), given)
        assert all(t.isfinite().all() for t in got.values())
        agree(got, want)


@pytest.mark.parametrize("decay", ["time", "feature"])
def test_forgetting_everything_starts_a_new_sequence(decay: str) -> None:
    """exp(-inf) = 0: outputs and gradients of separate runs, and no NaN."""
    given, cut = inputs(23, decay), 9
    given["decay"][:, :, cut] = -torch.inf
    got = run(lambda **leaves: linear_scan(**leaves, chunk=4), given)
    assert all(t.isfinite().all() for t in got.values())
    early = {k: t if k == "state" else t[:, :, :cut] for k, t in given.items()}
    late = {k: t[:, :, cut:] for k, t in given.items() if k != "state"}
    one, other = linear_scan(**early), linear_scan(**late)
    close(got["out"], torch.cat([one.out, other.out], 2))
    close(got["final"], other.state)
    same(got["decay"][:, :, cut], torch.zeros_like(got["decay"][:, :, cut]), "gradient of a reset")


@pytest.mark.parametrize("decay", DECAYS)
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), chunk=st.integers(1, 12))
def test_split_equals_whole(decay: str, cuts: list[int], chunk: int) -> None:
    given = inputs(40, decay)
    whole, state, outs = linear_scan(**given), given["state"], []
    for a, b in itertools.pairwise([0, *sorted(cuts), 40]):
        part = {k: t if t.dim() == 1 else t[:, :, a:b] for k, t in given.items() if k != "state"}
        out, state = linear_scan(**part, state=state, chunk=chunk)
        outs.append(out)
    close(torch.cat(outs, 2), whole.out)
    close(state, whole.state)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [0.05, 25.0])
def test_single_precision_is_as_exact_as_the_recurrence(decay: str, strength: float) -> None:
    """No worse than ten times the step form in float32, by the mean error from float64."""
    given = inputs(700, decay, strength=strength)
    low = {k: t.float() for k, t in given.items()}
    want = run(lambda **leaves: linear_scan(**leaves, form="step"), {k: t.double() for k, t in low.items()})
    naive = run(lambda **leaves: linear_scan(**leaves, form="step"), low)
    got = run(lambda **leaves: linear_scan(**leaves), low)
    for key in want:
        if key not in ("decay", "state"):  # their gradients are sums over all tokens
            near(got[key], want[key], naive[key], key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["chunked", "parallel"])
def test_half_inputs_are_summed_in_single_precision(dtype: torch.dtype, form: str) -> None:
    """Thousands of equal terms: a half-precision sum would stop growing at 256 or 2048."""
    T = 4096
    q = k = torch.ones(1, 1, T, 1, dtype=dtype)
    v = torch.full((1, 1, T, 1), 0.5, dtype=dtype)
    out, state = linear_scan(q, k, v, form=form)
    want = 0.5 * torch.arange(1, T + 1, dtype=torch.float32)
    assert out.dtype == dtype
    same(out.flatten(), want.to(dtype))
    assert state.dtype == torch.float32
    assert state.item() == 0.5 * T


def test_autocast_narrows_nothing() -> None:
    given = {k: t.float() for k, t in inputs(50, "time").items()}
    want = linear_scan(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_scan(**given)
    same(got.out, want.out)
    same(got.state, want.state)


@pytest.mark.parametrize("decay", DECAYS)
def test_memory_is_linear_in_training(decay: str) -> None:
    """Four times the tokens: what is kept for backward grows four times, and no kept tensor is T x T."""

    def kept(T: int) -> tuple[int, int]:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        given = {k: t.requires_grad_() for k, t in inputs(T, decay).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = linear_scan(**given, chunk=16)  # keeps `out`, so that no storage is used twice
        assert out.out.shape[2] == T
        return sum(sizes.values()), max(sizes.values())

    (small, _), (large, largest) = kept(512), kept(2048)
    assert 3.5 < large / small < 4.2
    assert largest < 8 * B * H * 2048 * 2048 / 4


@pytest.mark.parametrize("decay", DECAYS)
def test_the_future_changes_nothing(decay: str) -> None:
    """Bit for bit, in the same chunk and in later ones."""
    given = inputs(30, decay)
    want = linear_scan(**given, chunk=8).out
    for t in (0, 3, 8, 20):
        changed = {k: v.clone() for k, v in given.items()}
        for key in ("q", "k", "v", *(["decay"] if decay in ("time", "feature") else [])):
            changed[key][:, :, t + 1 :] *= 100
        same(linear_scan(**changed, chunk=8).out[:, :, : t + 1], want[:, :, : t + 1])


@pytest.mark.parametrize("decay", DECAYS)
def test_derivatives(decay: str) -> None:
    given = {k: t.requires_grad_() for k, t in inputs(5, decay).items()}

    def f(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None = None) -> Scan:
        return linear_scan(q, k, v, decay, state=state, chunk=2)

    assert torch.autograd.gradcheck(f, tuple(given.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens_no_batch(decay: str) -> None:
    given = inputs(0, decay)
    out, state = linear_scan(**given)
    assert out.shape == (B, H, 0, V)
    same(state, given["state"])
    given = {k: t if t.dim() == 1 else t[:0] for k, t in inputs(7, decay).items()}
    assert linear_scan(**given, chunk=2).out.shape == (0, H, 7, V)


def test_the_state_is_left_alone() -> None:
    given = inputs(20, "time")
    before = given["state"].clone()
    for form in ("step", "parallel", "chunked"):
        state = linear_scan(**given, form=form).state
        assert state.data_ptr() != given["state"].data_ptr()
    same(given["state"], before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 7, 4)}, r"q, k and v have the wrong shapes \(got \(2, 7, 4\)"),
        ({"k": torch.zeros(B, 1, 7, K, dtype=torch.float64)}, ".*repeat grouped keys"),
        ({"v": torch.zeros(B, H, 6, V, dtype=torch.float64)}, ".*and .batch, heads, tokens, V"),
        ({"v": torch.zeros(B, H, 7, V)}, "q, k and v have the wrong dtypes .*float64, torch.float64 and torch.float32"),
        ({"decay": torch.zeros(B, H, 6)}, "decay has the wrong shape"),
        ({"decay": torch.zeros(B)}, "decay has the wrong shape"),
        ({"state": torch.zeros(B, H, V, K)}, "state has the wrong shape"),
        ({"form": "blocks"}, r"form is unknown \(got 'blocks'\)"),
        ({"chunk": 0}, r"chunk is too small \(got 0\); expected an int >= 1"),
        ({"chunk": True}, r"chunk has the wrong type \(got True\)"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^linear_scan: " + words):
        linear_scan(**{**inputs(7), **change})


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_are_the_whole(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences go on from segment to segment, the last one shorter and no multiple of the chunk."""
    given = inputs(45, decay)
    want = run(lambda **leaves: linear_scan(**leaves, chunk=4), given)
    monkeypatch.setattr("regard.kernels.linear_scan.NUMBERS", 8 * B * H * (K + V))
    agree(run(lambda **leaves: linear_scan(**leaves, chunk=4), given), want)

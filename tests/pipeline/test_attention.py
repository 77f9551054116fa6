"""`regard.attention` and `regard.Attention` themselves: what they refuse, and bugs of other libraries."""

import re
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import masks
from regard.normalizers import Entmax
from regard.positions import Alibi, Rotary
from regard.stages import Normalizer, Position


def qkv(B=2, H=4, T=5, D=6, *, G=None, S=None, V=None, dtype=torch.float64) -> list[Tensor]:
    G, S, V = G or H, T if S is None else S, V or D
    return [torch.randn(B, h, n, w, dtype=dtype) for h, n, w in ((H, T, D), (G, S, D), (G, S, V))]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-10 * (1 + want.abs().max())


# --- bad inputs ---------------------------------------------------------------------------------------------

Q = torch.zeros(2, 4, 5, 6)
BAD = {
    "rank": (
        {"q": torch.zeros(2, 5, 6)},
        ValueError,
        r"q has the wrong shape \(got \(2, 5, 6\)\); expected \(batch, heads, tokens, width\)",
    ),
    "not a tensor": ({"k": [1.0]}, TypeError, r"k has the wrong type \(got list\); expected a Tensor"),
    "head width": (
        {"k": torch.zeros(2, 4, 5, 8)},
        ValueError,
        r"k has another head width than q \(got 8\); expected 6",
    ),
    "no width": (
        {"q": torch.zeros(2, 4, 5, 0), "k": torch.zeros(2, 4, 5, 0)},
        ValueError,
        r"q has heads of no width \(got 0\)",
    ),
    "lengths": ({"v": torch.zeros(2, 4, 3, 6)}, ValueError, r"v has another length than k \(got 3\); expected 5"),
    "batch": (
        {"k": torch.zeros(1, 4, 5, 6)},
        ValueError,
        r"different batch sizes \(got q 2, k 1, v 2\); .*sizes of 1 are not repeated",
    ),
    "groups": (
        {"k": torch.zeros(2, 3, 5, 6), "v": torch.zeros(2, 3, 5, 6)},
        ValueError,
        r"q has heads that are no multiple of the 3 key heads \(got 4\)",
    ),
    "more key heads": (
        {"k": torch.zeros(2, 8, 5, 6), "v": torch.zeros(2, 8, 5, 6)},
        ValueError,
        r"q has heads that are no multiple of the 8 key heads \(got 4\)",
    ),
    "one value head": (
        {"v": torch.zeros(2, 1, 5, 6)},
        ValueError,
        r"v has another number of heads than k \(got 1\); expected 4",
    ),
    "mixed dtypes": ({"k": Q.half()}, TypeError, r"different dtypes .*float16.*never promoted"),
    "integers": (
        {"q": Q.int(), "k": Q.int(), "v": Q.int()},
        TypeError,
        r"wrong dtype \(got torch.int32\); expected floating point",
    ),
    "bool": (
        {"q": Q.bool(), "k": Q.bool(), "v": Q.bool()},
        TypeError,
        r"wrong dtype \(got torch.bool\); expected floating point",
    ),
    "complex": (
        {"q": Q.cfloat(), "k": Q.cfloat(), "v": Q.cfloat()},
        TypeError,
        r"wrong dtype \(got torch.complex64\); expected floating point",
    ),
    "devices": ({"k": Q.to("meta")}, ValueError, "different devices .*meta.*move them together"),
    "integer mask": (
        {"mask": torch.ones(1, 1, 5, 5, dtype=torch.int64)},
        TypeError,
        r"mask has the wrong dtype .*torch.int64.*mask\.bool\(\)",
    ),
    "float mask": ({"mask": torch.ones(1, 1, 5, 5)}, TypeError, "mask has the wrong dtype .*torch.float32.*bias="),
    "flat mask": (
        {"mask": torch.ones(5, 5, dtype=torch.bool)},
        ValueError,
        r"ambiguous shape \(got \(5, 5\)\).*padding",
    ),
    "wrong mask": (
        {"mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)},
        ValueError,
        r"does not fit in S \(got \(2, 1, 5, 4\)\); .*S=5; only B and H may be 1",
    ),
    "row mask": ({"mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)}, ValueError, r"does not fit in T "),
    "not a mask": (
        {"mask": "causal"},
        TypeError,
        r"mask has the wrong type \(got str\); expected a regard.masks.Mask or a bool Tensor",
    ),
    "mask of another batch": (
        {"mask": masks.padding(lengths=torch.tensor([1, 2, 3]))},
        ValueError,
        "batch 3 .*expected batch 2",
    ),
    "bias rank": ({"bias": torch.zeros(5, 5) + 0.5}, ValueError, r"does not broadcast to the scores \(got \(5, 5\)\)"),
    "bias shape": ({"bias": torch.zeros(1, 3, 5, 5) + 0.5}, ValueError, "does not broadcast"),
    "bool bias": (
        {"bias": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
        TypeError,
        "boolean masks go into mask=",
    ),
    "boolean bias": ({"bias": torch.eye(5)[None, None]}, ValueError, "looks boolean.*may attend"),
    "NaN in bias": ({"bias": torch.full((1, 1, 5, 5), float("nan"))}, ValueError, r"NaN or \+inf"),
    "inf in bias": ({"bias": torch.full((1, 1, 5, 5), float("inf"))}, ValueError, r"NaN or \+inf"),
    "scale 0": ({"scale": 0.0}, ValueError, r"scale is out of range \(got 0.0\); expected a finite number > 0"),
    "negative scale": ({"scale": -1.0}, ValueError, r"scale is out of range \(got -1.0\)"),
    "NaN scale": ({"scale": float("nan")}, ValueError, r"scale is out of range \(got nan\)"),
    "dropout": ({"dropout": 2.0}, ValueError, r"dropout is out of range \(got 2.0\)"),
    "kernel": (
        {"kernel": "flsh"},
        ValueError,
        r"kernel is unknown \(got 'flsh'\); expected one of 'auto', 'paged'",
    ),
    "stage in the wrong slot": (
        {"position": Entmax()},
        TypeError,
        r"position has the wrong type \(got Entmax\); expected a Position of regard.stages",
    ),
    "a class": (
        {"normalizer": Entmax},
        TypeError,
        "normalizer has the wrong type .*expected a Normalizer of regard.stages",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_inputs_are_refused_before_any_work(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.kernels import KERNELS

    bad, error, message = BAD[case]
    for module in KERNELS.values():
        monkeypatch.setattr(module, "run", lambda *a: pytest.fail("computed something"))
    given = {"q": Q, "k": Q, "v": Q, **bad}
    started = time.perf_counter()
    with pytest.raises(error, match=message):
        regard.attention(**given)
    with pytest.raises(error, match=message):
        regard.plan(**given)
    assert time.perf_counter() - started < 1


LAYERS = {
    "heads": ({"dim": 10, "num_heads": 4}, r"dim is no multiple of num_heads = 4 \(got 10\)"),
    "groups": (
        {"dim": 12, "num_heads": 4, "num_kv_heads": 3},
        r"num_heads is no multiple of num_kv_heads = 3 \(got 4\)",
    ),
    "no heads": ({"dim": 12, "num_heads": 0}, r"num_heads is too small \(got 0\); expected an int >= 1"),
    "bool": ({"dim": 12, "num_heads": True}, r"num_heads has the wrong type \(got True\); expected an int >= 1"),
    "float": ({"dim": 12.0, "num_heads": 4}, r"dim has the wrong type \(got 12.0\); expected an int >= 1"),
    "dropout": ({"dim": 12, "num_heads": 4, "dropout": -0.1}, r"dropout is out of range \(got -0.1\)"),
    "context": ({"dim": 12, "num_heads": 4, "context_dim": -1}, r"context_dim is too small \(got -1\)"),
    "scale": ({"dim": 12, "num_heads": 4, "scale": float("inf")}, r"scale is out of range \(got inf\)"),
}


@pytest.mark.parametrize("case", list(LAYERS))
def test_bad_layers(case: str) -> None:
    options, message = LAYERS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        regard.Attention(**options)


def test_bad_calls_of_a_layer() -> None:
    layer = regard.Attention(12, 4)
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=re.escape("x has the wrong shape (got (2, 5, 8)); expected (B, T, M = 12)")):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="x has the wrong shape"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"context has another batch than x \(got 1\); expected 2 sequences"):
        layer(x, x[:1])
    with pytest.raises(ValueError, match=r"positions don't fit x .*integers of shape .5,. or .2, 5."):
        layer(x, positions=torch.arange(4))
    with pytest.raises(ValueError, match=r"positions don't fit x .*float32"):
        layer(x, positions=torch.arange(5.0))
    with pytest.raises(TypeError, match=r"mask has the wrong type .*Tensor.*expected a Mask of regard.masks"):
        regard.Attention(12, 4, mask=torch.ones(5, 5, dtype=torch.bool))
    causal = regard.Attention(12, 4, causal=True)
    with pytest.raises(TypeError, match=r"mask has the wrong type .*Tensor.*expected a Mask"):
        causal.step(x, causal.init_state(2, 8), mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


# --- bugs that other libraries have shipped silently --------------------------------------------------------


def test_causal_with_fewer_queries_than_keys_is_bottom_right() -> None:
    """pytorch#108108: is_causal was top-left for T != S."""
    q, k, v = qkv(T=3, S=7)
    for kernel in ("auto", "sdpa", "eager", "chunked", "block_sparse"):
        got = regard.attention(q, k, v, mask=masks.causal(), kernel=kernel)
        close(got[:, :, -1:], F.scaled_dot_product_attention(q[:, :, -1:], k, v))
        close(got[:, :, :1], F.scaled_dot_product_attention(q[:, :, :1], k[:, :, :5], v[:, :, :5]))


def test_decoding_one_token_sees_the_whole_cache() -> None:
    """The same with T = 1."""
    q, k, v = qkv(T=1, S=7)
    close(regard.attention(q, k, v, mask=masks.causal()), regard.attention(q, k, v))


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager", "chunked", "block_sparse"])
def test_rows_that_are_all_masked_are_zero(kernel: str) -> None:
    """pytorch#103963: bool rows of False gave NaN; #110213: 0 in one version and a mean in the next."""
    q, k, v = (t.requires_grad_() for t in qkv())
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[0, 0, 2] = False
    out = regard.attention(q, k, v, mask=allowed, kernel=kernel)
    assert torch.equal(out[0, :, 2], torch.zeros(4, 6, dtype=torch.float64))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][0, :, 2], torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nan_queries_are_not_hidden(kernel: str, dtype: torch.dtype) -> None:
    """pytorch#141128: the CPU kernel turned NaN into 0."""
    q, k, v = qkv(dtype=dtype)
    q[0, 1, 2] = float("nan")
    bad = ~regard.attention(q, k, v, kernel=kernel).isfinite().all(-1)
    assert bad.nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager", "chunked", "block_sparse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_slots_may_hold_anything(kernel: str, bad: float) -> None:
    """pytorch#101967: NaN in a masked value slot reached the output, as 0 * NaN."""
    q, k, v = qkv()
    mask = masks.padding(lengths=torch.tensor([5, 3]))
    want = regard.attention(q, k, v, mask=mask, kernel=kernel)
    k[1, :, 3:], v[1, :, 4:] = bad, bad
    k, v = k.requires_grad_(), v.requires_grad_()
    out = regard.attention(q, k, v, mask=mask, kernel=kernel)
    assert torch.equal(out, want)
    for g in torch.autograd.grad(out.sum(), (k, v)):
        assert torch.equal(g[1, :, 4:], torch.zeros_like(g[1, :, 4:]))
        assert g.isfinite().all()


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager", "chunked", "block_sparse"])
def test_strides(kernel: str) -> None:
    """pytorch#112577: garbage for some memory layouts."""
    x = torch.randn(5, 2, 3, 4, 6, dtype=torch.float64)  # tokens outermost, q, k and v interleaved
    q, k, v = (x[:, :, n].permute(1, 2, 0, 3) for n in range(3))
    want = regard.attention(*(t.contiguous() for t in (q, k, v)), mask=masks.causal(), kernel="eager")
    close(regard.attention(q, k, v, mask=masks.causal(), kernel=kernel), want)
    one = torch.randn(1, 1, 5, 6, dtype=torch.float64).expand(2, 4, 5, 6)  # stride 0
    close(
        regard.attention(q, one, one, mask=masks.causal(), kernel=kernel),
        regard.attention(q, one.contiguous(), one.contiguous(), mask=masks.causal(), kernel="eager"),
    )


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "chunked", "block_sparse"])
def test_the_mask_survives_dropout(kernel: str) -> None:
    """keras#23038: with dropout > 0 the mask was dropped too."""
    q, k, _ = qkv(B=1, H=1, T=6)
    one_hot = torch.eye(6, dtype=torch.float64)[None, None]
    weights = regard.attention(q, k, one_hot, mask=masks.causal(), dropout=0.3, kernel=kernel)[0, 0]
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    assert (weights == 0).sum() > 15 or kernel == "block_sparse"
    assert weights.ne(0).any()


def test_full_and_streamed_agree_across_the_window() -> None:
    """fla#494 (full and chunked differ with a cache), transformers#37574 (a window cache at its size)."""
    layer = regard.Attention(12, 2, causal=True, mask=masks.window(4), position=Rotary(6)).double().eval()
    x = torch.randn(1, 11, 12, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        for first in range(1, 11):
            y, state = layer.step(x[:, :first], layer.init_state(1, 4))
            outs = [y]
            for n in range(first, 11):
                y, state = layer.step(x[:, n : n + 1], state)
                outs.append(y)
                assert state.kept == min(n + 1, 3)
            close(torch.cat(outs, 1), want)


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager", "chunked"])
def test_grouped_keys_stand_side_by_side(kernel: str) -> None:
    """onnx PR#7274: tiled instead of interleaved."""
    q, k, v = qkv(H=6, G=2)
    want = torch.cat([regard.attention(q[:, h : h + 1], k[:, h // 3, None], v[:, h // 3, None]) for h in range(6)], 1)
    close(regard.attention(q, k, v, kernel=kernel), want)


@pytest.mark.parametrize("kernel", ["eager", "chunked", "sdpa", "block_sparse"])
def test_every_key_chunk_gets_its_own_gradient(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers#14265: backward reused the first chunk's keys and values."""
    from regard.kernels import block_sparse, chunked

    monkeypatch.setattr(chunked, "KEYS", 3)
    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    monkeypatch.setattr(block_sparse, "BLOCK", 3)
    given = [t.requires_grad_() for t in qkv(T=20)]
    out = regard.attention(*given, mask=masks.causal(), kernel=kernel)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), given)
    q, k, v = given
    scores = (q @ k.mT / 6**0.5).masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    want = torch.autograd.grad(((scores.softmax(-1) @ v) * weight).sum(), given)
    for g, w in zip(got, want, strict=True):
        close(g, w)


def test_eval_means_no_dropout() -> None:
    """pytorch#124464: dropout was applied in eval."""
    layer = regard.Attention(12, 4, dropout=0.9, kernel="auto")
    x = torch.randn(2, 5, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- slots --------------------------------------------------------------------------------------------------


def test_slots_mix_freely() -> None:
    """Position, normalizer, grouped keys, static mask and kernel in one layer; each changes the output."""
    from regard.heads import SigmoidGate

    def make(**changed: object) -> regard.Attention:
        torch.manual_seed(0)
        slots = {
            "position": Alibi(4),
            "normalizer": Entmax(),
            "gate": SigmoidGate(24, 4),
            "mask": masks.window(5),
        }
        return regard.Attention(24, 4, num_kv_heads=2, causal=True, **{**slots, **changed}).double().eval()

    x = torch.randn(2, 9, 24, dtype=torch.float64)
    want = make()(x)
    assert want.shape == x.shape
    for slot in ("position", "normalizer", "gate", "mask"):
        assert not torch.allclose(make(**{slot: None})(x), want), slot
    with torch.no_grad():
        layer = make()
        state, outs = layer.init_state(2, 9), []
        for token in x.split(1, 1):
            y, state = layer.step(token, state)
            outs.append(y)
        close(torch.cat(outs, 1), want)


def test_every_slot_empty_is_torch() -> None:
    layer = regard.Attention(24, 4).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    close(layer(x), layer.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


def test_a_users_own_stages() -> None:
    """A position and a normalizer written on the spot run on every kernel that can run them."""

    class Distance(Position):
        def bias(self, rows):
            return -0.1 * (rows.i[:, None] - rows.j).abs().to(rows.q.dtype)[None, None]

    class Relu(Normalizer):
        def forward(self, scores, allowed):
            return scores.relu() if allowed is None else scores.relu().masked_fill(~allowed, 0)

    q, k, v = qkv(T=9)
    distance = -0.1 * (torch.arange(9.0)[:, None] - torch.arange(9)).abs().double()
    want = ((q @ k.mT / 6**0.5 + distance).relu().tril()) @ v
    for kernel in ("auto", "eager", "chunked", "block_sparse"):
        close(
            regard.attention(q, k, v, mask=masks.causal(), position=Distance(), normalizer=Relu(), kernel=kernel),
            want,
        )
    with pytest.raises(ValueError, match=r"normalizer Relu is not softmax.*these can: block_sparse, chunked, eager"):
        regard.attention(q, k, v, mask=masks.causal(), normalizer=Relu(), kernel="sdpa")


POSITIONS = [n for n in regard.mechanisms("positions") if "streaming" in regard.card(n).supports]


@pytest.mark.parametrize("name", POSITIONS)
def test_left_padded_rows_are_decoded_as_alone(name: str) -> None:
    """A prompt behind padding, then token by token, in one batch with a longer prompt."""
    torch.manual_seed(0)
    card = regard.card(name)
    layer = regard.create(name, dim=24, num_heads=6, causal=True, dtype=torch.float64, **card.example).eval()
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    kept = torch.ones(2, 10, dtype=torch.bool)
    kept[0, :4] = False
    mask, where = regard.masks.padding(kept), (kept.cumsum(1) - 1).clamp(min=0)
    x[0, :4] = torch.nan
    with torch.no_grad():
        alone, longer = layer(x[:1, 4:]), layer(x[1:])
        out, state = layer.step(x[:, :6], layer.init_state(2, 10), mask=mask, positions=where[:, :6])
        outs = [out]
        for n in range(6, 10):
            out, state = layer.step(x[:, n : n + 1], state, mask=mask, positions=where[:, n : n + 1])
            outs.append(out)
        got = torch.cat(outs, 1)
        torch.testing.assert_close(got[:1, 4:], alone)
        torch.testing.assert_close(got[1:], longer)
        full = layer(x, mask=mask, positions=where)
        torch.testing.assert_close(got[kept], full[kept])


def test_positions_of_a_step_must_fit_it() -> None:
    layer = regard.create("rotary", dim=16, num_heads=2, causal=True)
    state = layer.init_state(2, 8)
    with pytest.raises(ValueError, match=r"positions don't fit x .*\(8,\).*integers of shape .3,. or .2, 3."):
        layer.step(torch.randn(2, 3, 16), state, positions=torch.arange(8))


def test_positions_of_a_step_count_on_by_default() -> None:
    torch.manual_seed(0)
    layer = regard.create("rotary", dim=16, num_heads=2, causal=True).eval()
    x = torch.randn(2, 6, 16)
    _, told = layer.step(x[:, :4], layer.init_state(2, 6), positions=torch.arange(4))
    _, untold = layer.step(x[:, :4], layer.init_state(2, 6))
    want, _ = layer.step(x[:, 4:], untold)
    assert torch.equal(layer.step(x[:, 4:], told, positions=torch.arange(4, 6))[0], want)
    assert not torch.allclose(layer.step(x[:, 4:], told, positions=torch.arange(7, 9))[0], want)


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "eager", "chunked", "sdpa", "native", "block_sparse"])
def test_tokens_may_stand_before_heads(kernel: str) -> None:
    """As flash-attn has them: the same numbers and gradients, for grouped heads and other lengths of keys."""
    given = [t.requires_grad_() for t in qkv(H=4, G=2, T=5, S=7, V=3, dtype=torch.float32)]
    turned = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in given]
    if kernel != "auto" and regard.plan(*given, mask=masks.causal()).why_not.get(kernel):
        kernel = "auto"
    want = regard.attention(*given, mask=masks.causal(), kernel=kernel)
    got = regard.attention(*turned, mask=masks.causal(), kernel=kernel, layout="bnhd")
    assert torch.equal(got, want.transpose(1, 2))
    want.sin().sum().backward()
    got.sin().sum().backward()
    for a, b in zip(turned, given, strict=True):
        torch.testing.assert_close(a.grad, b.grad.transpose(1, 2))


def test_plans_know_the_layout() -> None:
    q, k, v = torch.empty(1, 8, 1024, 64, device="meta"), *torch.empty(2, 1, 2, 1024, 64, device="meta")
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    assert regard.plan(*turned, layout="bnhd").kernel == regard.plan(q, k, v).kernel
    assert regard.plan(turned[0], v=turned[2], k=turned[1], layout="bnhd").costs == regard.plan(q, k, v).costs


def test_other_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention: layout is unknown \(got 'thd'\)|layout .*'thd'"):
        regard.attention(*qkv(), layout="thd")
    with pytest.raises(ValueError, match="q has the wrong shape"):
        regard.attention(torch.zeros(2, 5, 6), *qkv()[1:], layout="bnhd")

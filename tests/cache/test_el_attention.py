"""EL-attention against loops, torch's own multi-head attention and the authors' code (B163); what its state costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from cache.naive_el_attention import naive_el_attention
from regard import KVCache, masks
from regard.cache.el_attention import ELAttention, fold_keys, unfold_values
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[1] / "vectors" / "B163.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, seed: int = 0, **options) -> ELAttention:
    layer = ELAttention(dim, heads, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def projections(layer: ELAttention) -> list[Tensor]:
    parts = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    return [p.weight for p in parts] + [p.bias for p in parts]


@pytest.mark.parametrize("folded", [0, 99])
@pytest.mark.parametrize(("T", "S", "causal"), [(1, 7, False), (4, 4, True), (3, 5, False), (6, 6, True)])
def test_is_the_definition(T: int, S: int, causal: bool, folded: int) -> None:
    """Both forms, folded and with keys built for the moment."""
    layer = filled(6, 3, seed=T, causal=causal, bias=True, folded=folded)
    x, context = normal(1, 2, T, 6).requires_grad_(), normal(2, 2, S, 6).requires_grad_()
    keep = torch.arange(S) < torch.tensor([[S], [S - 2]])
    mask = masks.padding(keep)
    given = (x,) if causal else (x, context)
    got = layer(*given, mask=mask)
    want = naive_el_attention(x, given[-1], *projections(layer), heads=3, keep=keep, causal=causal)
    close(got, want, "out")
    g = normal(3, 2, T, 6)
    wanted = [*given, *layer.parameters()]
    for mine, theirs in zip(
        *(torch.autograd.grad((o * g).sum(), wanted, materialize_grads=True) for o in (got, want)), strict=True
    ):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_the_authors_numbers(case: str) -> None:
    """All beams of a sentence are its queries, over one copy of its hidden states."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    B, _, M = z["X"].shape
    layer = ELAttention(M, int({"a": 3, "b": 2}[case]), bias=True, folded=99).double()
    with torch.no_grad():
        for name in "qkvo":
            for kind in ("weight", "bias"):
                getattr(getattr(layer, f"{name}_proj"), kind).copy_(z[f"W{name}_{kind}"])
    beams = z["q"].view(B, -1, M).clone().requires_grad_()
    X = z["X"].clone().requires_grad_()
    mask = masks.padding(lengths=z["len"]) if "len" in z else None
    out = layer(beams, X, mask=mask)
    close(out.detach(), z["out"].view(out.shape))
    grads = torch.autograd.grad((out * z["w"].view(out.shape)).sum(), (beams, X))
    close(grads[0], z["grad_q"].view(out.shape), "gradient of the queries")
    close(grads[1], z["grad_X"], "gradient of the hidden states")


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_is_torchs_multi_head_attention(heads: int) -> None:
    layer = filled(8, heads, bias=True, folded=99)
    theirs = nn.MultiheadAttention(8, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        theirs.out_proj.load_state_dict(layer.o_proj.state_dict())
    x, context = normal(1, 3, 5, 8), normal(2, 3, 9, 8)
    keep = torch.arange(9) < torch.tensor([[9], [4], [1]])
    want, _ = theirs(x, context, context, key_padding_mask=~keep, need_weights=False)
    close(layer(x, context, mask=masks.padding(keep)), want)


def test_a_query_that_sees_nothing_gives_the_output_bias_alone() -> None:
    layer, x = filled(6, 2, bias=True, folded=99), normal(1, 2, 3, 6)
    out = layer(x, mask=masks.padding(torch.tensor([[True] * 3, [False] * 3])))
    close(out[1], layer.o_proj.bias.expand(3, 6))


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("folded", [None, 0, 99])
@torch.no_grad()
def test_streams_exactly(kv_heads: int | None, folded: int | None) -> None:
    """Single tokens go over the hidden states, prompts build keys; both are what the plain layer gives."""
    layer = filled(24, 6, causal=True, num_kv_heads=kv_heads, folded=folded, bias=True)
    plain = regard.Attention(24, 6, causal=True, num_kv_heads=kv_heads, bias=True, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = normal(1, 2, 17, 24)
    state, outs = layer.init_state(2, 17), []
    for piece in x.split([6, 1, 1, 2, 5, 1, 1], 1):
        y, state = layer.step(piece, state)
        outs.append(y)
    close(torch.cat(outs, 1), plain(x))


@torch.no_grad()
def test_the_state_is_half_of_a_key_value_cache() -> None:
    layer = filled(24, 6, causal=True)
    x = normal(1, 3, 10, 24)
    _, state = layer.step(x, layer.init_state(3, 64))
    plain = regard.Attention(24, 6, causal=True, dtype=torch.float64)
    _, cache = plain.step(x, plain.init_state(3, 64))
    assert list(state.buffers) == ["x"]
    assert state.nbytes == 3 * 10 * 24 * 8
    assert cache.nbytes == 2 * state.nbytes
    assert state.buffers["x"].untyped_storage().nbytes() == 3 * 64 * 24 * 8


@torch.no_grad()
def test_the_state_is_a_cache_like_any_other() -> None:
    """Forked, cropped, reordered, full."""
    layer, x, other = filled(12, 2, causal=True), normal(1, 2, 8, 12), normal(2, 2, 8, 12)
    _, state = layer.step(x[:, :5], layer.init_state(2, 8))
    y, _ = layer.step(other[:, 5:7], state.fork())
    close(y, layer(torch.cat([x[:, :5], other[:, 5:7]], 1))[:, 5:])
    close(layer.step(x[:, 5:], state)[0], layer(x)[:, 5:])
    y, _ = layer.step(x[[1, 0, 1], 5:], state.reorder(torch.tensor([1, 0, 1])))
    close(y, layer(x[[1, 0, 1]])[:, 5:])
    y, _ = layer.step(other[:, 3:6], state.crop(3))
    close(y, layer(torch.cat([x[:, :3], other[:, 3:6]], 1))[:, 3:])
    with pytest.raises(ValueError, match="capacity"):
        layer.step(x[:, :4], state)


@torch.no_grad()
def test_padded_keys_stay_hidden_in_the_stream() -> None:
    layer, x = filled(12, 2, causal=True, bias=True), normal(1, 2, 9, 12)
    mask = masks.padding(torch.arange(9) >= torch.tensor([[0], [4]]))
    want, state, outs = layer(x, mask=mask), layer.init_state(2, 9), []
    for piece in x.split([2, 1, 1, 5], 1):
        y, state = layer.step(piece, state, mask=mask)
        outs.append(y)
    close(torch.cat(outs, 1), want)


def test_no_key_is_built_for_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = filled(24, 6, causal=True), normal(1, 2, 5, 24)
    _, state = layer.step(x, layer.init_state(2, 8))

    def forbidden(*_: object) -> Tensor:
        raise AssertionError("a projection of the past ran")

    monkeypatch.setattr(layer.k_proj, "forward", forbidden)
    monkeypatch.setattr(layer.v_proj, "forward", forbidden)
    layer.step(x[:, :1], state)
    with pytest.raises(AssertionError, match="ran"):
        layer.step(x[:, : layer.folded + 1], layer.init_state(2, 8))


def test_folding_moves_the_projections() -> None:
    q, x, weight, bias = normal(0, 2, 4, 3, 5), normal(1, 2, 7, 6), normal(2, 2, 5, 6), normal(3, 2, 5)
    keys = torch.einsum("gdc,bsc->bgsd", weight, x)
    close(fold_keys(q, weight) @ x[:, None].mT, q @ keys.repeat_interleave(2, 1).mT)
    weights = normal(4, 2, 4, 3, 7).softmax(-1)
    r = weights @ torch.cat([x, torch.ones(2, 7, 1).double()], -1)[:, None]
    close(unfold_values(r, weight, bias), weights @ (keys + bias[:, None]).repeat_interleave(2, 1))


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [(-1, ValueError, "is too small"), (True, TypeError, "has the wrong type"), (1.5, TypeError, "has the wrong type")],
)
def test_refuses_options(bad: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"folded {words} \(got {bad}\); expected an int >= 0"):
        ELAttention(8, 2, folded=bad)


def test_refuses_states() -> None:
    layer, x = filled(8, 2, causal=True), normal(0, 1, 1, 8)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the KVCache of init_"):
        layer.step(x, None)
    with pytest.raises(ValueError, match=r"holds \['k', 'v'\]"):
        layer.step(x, KVCache({n: torch.zeros(1, 2, 4, 4).double() for n in "kv"}))
    with pytest.raises(TypeError, match=r"mask has the wrong type \(got Tensor\); expected a regard\.masks\.Mask"):
        layer.step(x, layer.init_state(1, 4), mask=torch.ones(1, 1, dtype=torch.bool))
    for call in (lambda m: m.init_state(1, 4), lambda m: m.step(x, layer.init_state(1, 4))):
        with pytest.raises(ValueError, match="causal=True"):
            call(filled(8, 2))

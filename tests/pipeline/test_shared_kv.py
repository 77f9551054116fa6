"""Layers that read an earlier layer's keys and values, against the same layers told them as a context."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.pipeline import KeyValues, SharedKV, step_with_kv, with_kv
from regard.pipeline.page_pool import PagePool
from regard.stages import Mix, Stage

SPECS = [
    "softmax",
    "rotary",
    "alibi+memory_kv",
    "memory_kv+rotary",
    "rotary+window(window=3)",
    "sink_softmax+rotary",
    "entmax",
    "sinusoidal",
    "gated+rotary",
    "cope",
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(spec: str, *, causal: bool = True, G: int = 2) -> tuple[nn.Module, SharedKV, nn.Module]:
    """A layer, one that reads its keys and values, and the latter with the former's projections as its own."""
    torch.manual_seed(0)
    first, other = (regard.create(spec, dim=16, num_heads=4, num_kv_heads=G, causal=causal).double() for _ in "12")
    other.k_proj, other.v_proj = first.k_proj, first.v_proj
    return first, SharedKV.of(copy.deepcopy(other)), other


def test_is_the_formula() -> None:
    """Queries of one sequence of features, keys and values of another, one row at a time."""
    first, second, _ = pair("softmax")
    x, z = normal(1, 2, 5, 16), normal(2, 2, 5, 16)
    _, kv = with_kv(first, x)
    q, k, v = second.q_proj(z), first.k_proj(x), first.v_proj(x)
    heads = torch.zeros(2, 5, 16, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            at, own = slice(4 * (h // 2), 4 * (h // 2) + 4), slice(4 * h, 4 * h + 4)
            for t in range(5):
                e = [math.exp(float((q[b, t, own] @ k[b, s, at]).detach()) / 2) for s in range(t + 1)]
                heads[b, t, own] = sum(w / sum(e) * v[b, s, at].detach() for s, w in enumerate(e))
    torch.testing.assert_close(second(z, kv), second.o_proj(heads))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_equals_a_layer_told_the_other_tokens(spec: str, causal: bool) -> None:
    """With gradients: those of the projections that both read add up."""
    first, second, naive = pair(spec, causal=causal)
    x, z = normal(1, 2, 7, 16).requires_grad_(), normal(2, 2, 7, 16).requires_grad_()
    y, kv = with_kv(first, x)
    torch.testing.assert_close(y, first(x))
    got, want = second(z, kv), naive(z, x)
    torch.testing.assert_close(got, want)
    given = [x, z, first.k_proj.weight, first.v_proj.weight, first.q_proj.weight]
    w = torch.randn_like(got)
    ours = torch.autograd.grad(((y + got) * w).sum(), given)
    for a, b in zip(ours, torch.autograd.grad(((first(x) + want) * w).sum(), given), strict=True):
        torch.testing.assert_close(a, b)
    names = dict(second.named_parameters())
    assert "k_proj.weight" not in names
    assert "v_proj.weight" not in names


def test_its_own_norm_is_of_queries() -> None:
    """Keys come normalised by the layer that made them; what is for keys alone is no parameter to train."""
    first, second, _ = pair("qk_norm+rotary")
    with torch.no_grad():
        second.heads.q_weight.copy_(normal(3, 4))
    x, z = normal(1, 2, 6, 16), normal(2, 2, 6, 16)
    _, kv = with_kv(first, x)
    at = torch.arange(6)
    q = second.q_proj(z).view(2, 6, 4, 4).transpose(1, 2)
    q = second.position.rotate(nn.functional.rms_norm(q, (4,), second.heads.q_weight, second.heads.eps), at)
    out = regard.attention(q, kv.k, kv.v, mask=masks.causal())
    torch.testing.assert_close(second(z, kv), second.o_proj(out.transpose(1, 2).flatten(2)))
    second(z, kv).sum().backward()
    assert second.heads.q_weight.requires_grad
    assert not second.heads.k_weight.requires_grad
    assert all(w.grad is not None for w in second.parameters() if w.requires_grad)


def test_padding_positions_documents_and_nan() -> None:
    """What the layer was told holds for who reads it, too."""
    first, second, naive = pair("rotary", causal=False)
    x, z = normal(1, 2, 6, 16), normal(2, 2, 6, 16)
    keep = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    at = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    spoilt, other = x.clone(), z.clone()
    spoilt[1, :2], other[1, :2] = math.nan, math.nan
    _, kv = with_kv(first, spoilt, mask=masks.padding(keep), positions=at)
    got = second(other, kv)
    torch.testing.assert_close(got[1, 2:], naive(z[1:, 2:], x[1:, 2:])[0])
    assert got[1, :2].isnan().all()
    ends = masks.packed(torch.tensor([0, 2, 6]))
    _, kv = with_kv(first, x, mask=ends)
    apart = [naive(z[:, cut], x[:, cut]) for cut in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(second(z, kv), torch.cat(apart, 1))
    spoilt = x.clone()
    spoilt[0, 3] = math.nan
    first, second, _ = pair("rotary")
    _, kv = with_kv(first, spoilt)
    got = second(z, kv).isnan()
    assert got[0, 3:].all()
    assert got.sum() == 3 * 16


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_steps_are_the_full_pass(spec: str) -> None:
    """One cache for both, also in pages."""
    first, second, _ = pair(spec)
    x, z = normal(1, 2, 12, 16), normal(2, 2, 12, 16)
    y, kv = with_kv(first, x)
    want = second(z, kv)
    for pool in (None, PagePool(64, page_size=2)):
        state, ours, theirs = first.init_state(2, 12, pool=pool), [], []
        for piece in torch.arange(12).split([1, 4, 1, 5, 1]):
            made, state, kv = step_with_kv(first, x[:, piece], state)
            ours.append(made)
            theirs.append(second(z[:, piece], kv))
        torch.testing.assert_close(torch.cat(ours, 1), y)
        torch.testing.assert_close(torch.cat(theirs, 1), want)


@torch.no_grad()
def test_sequences_of_other_lengths_in_pages() -> None:
    first, second, _ = pair("rotary")
    x, z = normal(1, 2, 9, 16), normal(2, 2, 9, 16)
    pool = PagePool(64, page_size=2)
    states = [step_with_kv(first, x[b : b + 1, :n], first.init_state(1, 9, pool=pool))[1] for b, n in ((0, 7), (1, 4))]
    new = torch.stack([x[0, 7:9], x[1, 4:6]]), torch.stack([z[0, 7:9], z[1, 4:6]])
    _, _, kv = step_with_kv(first, new[0], states[0].join(states[1]))
    got = second(new[1], kv)
    for b, n in ((0, 9), (1, 6)):
        alone = second(z[b : b + 1, :n], with_kv(first, x[b : b + 1, :n])[1])
        torch.testing.assert_close(got[b], alone[0, -2:])


def test_float32_takes_the_quick_kernels() -> None:
    first, second, _ = (layer.float() for layer in pair("rotary"))
    x, z = normal(1, 2, 40, 16).float(), normal(2, 2, 40, 16).float()
    with torch.no_grad():
        want = second(z, with_kv(first, x)[1])
        _, state, kv = step_with_kv(first, x[:, :39], first.init_state(2, 40))
        _, state, kv = step_with_kv(first, x[:, 39:], state)
        torch.testing.assert_close(second(z[:, 39:], kv), want[:, 39:])


class ReadsTokens(Mix):
    needs = frozenset({"tokens"})

    def forward(self, z, rows):
        return z


class Earlier(Mix):
    halo = 1
    sees: str = "rows"  # type: ignore[assignment]

    def forward(self, z, rows):
        return z


def test_refuses_what_it_cannot() -> None:
    assert issubclass(Earlier, Stage)
    for part in (ReadsTokens(), Earlier()):
        with pytest.raises(ValueError, match="SharedKV: slots read tokens behind keys, or earlier queries"):
            SharedKV(16, 4, score_mix=part)
    with pytest.raises(ValueError, match=r"or earlier queries .got ShortConv"):  # it would read others in each step
        SharedKV.of(regard.create("short_conv", dim=16, num_heads=4, causal=True))
    with pytest.raises(ValueError, match=r"can't read another's keys and values .got MultiHeadLatent"):
        SharedKV.of(regard.create("mla(absorb=True)", dim=16, num_heads=4))
    with pytest.raises(ValueError, match="makes no keys and values that others could read"):
        with_kv(regard.create("linear", dim=16, num_heads=4), normal(0, 1, 3, 16).float())
    first, second, _ = pair("rotary")
    x = normal(1, 2, 5, 16)
    _, kv = with_kv(first, x)
    with pytest.raises(TypeError, match="kv has the wrong type"):
        second(x, x)
    with pytest.raises(ValueError, match="kv does not fit"):
        second(x[:1], kv)
    with pytest.raises(ValueError, match="kv does not fit"):
        second(normal(1, 2, 6, 16), kv)
    for call in (second.init_state, second.step, second.plan):
        with pytest.raises(ValueError, match="keeps nothing of its own"):
            call(1, 4)
    near = pair("rotary+window(window=3)")[0]
    state = near.init_state(2, 9)
    with torch.no_grad():
        for n in range(5):
            _, state, kv = step_with_kv(near, x[:, n : n + 1], state)
    assert isinstance(kv, KeyValues)
    with pytest.raises(ValueError, match="kv have lost some that this layer sees"):
        second(x[:, :1], kv)

"""Persistent memory against loops in Python floats, torch's add_bias_kv and x-transformers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.cache import PagePool
from regard.heads import Memories, MemoryKV
from regard.heads.qk_norm import QKNorm
from regard.kernels.native import build
from regard.normalizers import Entmax, SinkSoftmax, SoftmaxOne
from regard.positions import Alibi, Rotary, Shaw
from regard.scores import SoftCap
from regard.stages import Mix

VECTORS = Path(__file__).parents[1] / "vectors" / "memory_kv.npz"
compiled = pytest.mark.skipif(bool(build.why_not()), reason="no compiler")
HOLE = masks.causal() & masks.window(3) & ~masks.blocks(1)
"""Of which the first query sees nothing."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(T: int = 7, S: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, and a memory's keys and values."""
    made = normal(0, 2, 4, T, 4), normal(1, 2, 2, S, 4), normal(2, 2, 2, S, 4), normal(3, 2, 3, 4), normal(4, 2, 3, 4)
    return [z.to(dtype).requires_grad_() for z in made]


def oracle(q: Tensor, k: Tensor, v: Tensor, m: Tensor, u: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the keys that are seen and all of the memory, one row at a time."""
    B, H, T, D = q.shape
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // k.shape[1])
            for t in range(T):
                pairs = [(k[b, g, s], v[b, g, s]) for s in range(k.shape[2]) if allowed[t, s]]
                pairs += [(m[g, n], u[g, n]) for n in range(m.shape[1])]
                e = [math.exp(float(q[b, h, t] @ key) / math.sqrt(D)) for key, _ in pairs]
                out[b, h, t] = sum(w / sum(e) * value for w, (_, value) in zip(e, pairs, strict=True))
    return out


def joined(q: Tensor, k: Tensor, v: Tensor, m: Tensor, u: Tensor, allowed: Tensor, *, asks: Tensor | None = None):
    """The same as tensors, with gradients; `asks` meets the memory in place of q."""
    H, G = q.shape[1], k.shape[1]
    k, v = (z.repeat_interleave(H // G, 1) for z in (k, v))
    m, u = (z.repeat_interleave(H // G, 0)[None].expand(len(q), -1, -1, -1) for z in (m, u))
    scores = (q @ k.mT).masked_fill(~allowed, -torch.inf)
    scores = torch.cat([scores, (q if asks is None else asks) @ m.mT], -1) / math.sqrt(q.shape[3])
    return scores.softmax(-1) @ torch.cat([v, u], 2)


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_is_the_formula(kernel: str) -> None:
    given = inputs()
    q, k, v, m, u = given
    allowed = HOLE.dense(7, 7)
    got = regard.attention(q, k, v, mask=HOLE, memory=Memories(m, u), kernel=kernel)
    torch.testing.assert_close(got, oracle(*(z.detach() for z in given), allowed[0, 0]), rtol=1e-12, atol=1e-12)
    alone = (q[:, :, 0].unflatten(1, (2, 2)) @ m.mT / 2).softmax(-1) @ u
    torch.testing.assert_close(got[:, :, 0], alone.flatten(1, 2))
    w = torch.randn_like(got)
    want = joined(*given, allowed)
    for a, b in zip(*(torch.autograd.grad((z * w).sum(), given) for z in (got, want)), strict=True):
        assert float(b.abs().max()) > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel", ["chunked", pytest.param("native", marks=compiled), "eager"])
@pytest.mark.parametrize("mask", [None, HOLE, masks.causal()], ids=["none", "hole", "causal"])
def test_kernels_merge_what_softmax_gives(kernel: str, mask: masks.Mask | None) -> None:
    """In float32 and bf16, with every gradient."""
    for dtype, tight in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
        given, exact = inputs(40, 40, dtype), inputs(40, 40)
        allowed = torch.ones(40, 40, dtype=torch.bool) if mask is None else mask.dense(40, 40)
        got = regard.attention(*given[:3], mask=mask, memory=Memories(*given[3:]), kernel=kernel)
        want = joined(*exact, allowed)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tight, atol=tight)
        w = torch.randn_like(want)
        ours = torch.autograd.grad((got * w.to(dtype)).sum(), given)
        for a, b in zip(ours, torch.autograd.grad((want * w).sum(), exact), strict=True):
            assert (a.double() - b).norm() < tight * b.norm()


def test_the_plan_says_why() -> None:
    q, k, v, m, u = inputs()
    plan = regard.plan(q, k, v, memory=Memories(m, u))
    assert "memory Memories is merged by log-sum-exps, which it does not tell" in plan.why_not["sdpa"]
    for kernel in ("sdpa", "block_sparse", "window", "decode", "few"):
        if kernel != "block_sparse":
            with pytest.raises(ValueError, match=f"kernel '{kernel}' can't run this"):
                regard.attention(q, k, v, memory=Memories(m, u), kernel=kernel)
    got = regard.attention(q, k, v, mask=HOLE, memory=Memories(m, u), kernel="block_sparse")
    torch.testing.assert_close(got, joined(q, k, v, m, u, HOLE.dense(7, 7)))


def test_without_any_key_the_memory_is_read() -> None:
    q, _, _, m, u = inputs()
    none = torch.zeros(2, 2, 0, 4, dtype=torch.float64)
    got = regard.attention(q, none, none, memory=Memories(m, u))
    torch.testing.assert_close(got, joined(q, none, none, m, u, torch.ones(7, 0, dtype=torch.bool)))


def test_without_any_memory_it_is_softmax() -> None:
    q, k, v, m, u = inputs()
    for kernel in ("eager", "chunked"):
        got = regard.attention(q, k, v, mask=HOLE, memory=Memories(m[:, :0], u[:, :0]), kernel=kernel)
        torch.testing.assert_close(got, regard.attention(q, k, v, mask=HOLE))
        assert all(z.isfinite().all() for z in torch.autograd.grad(got.sum(), (q, k, v)))


def test_second_derivatives() -> None:
    q, k, v, m, u = (z.detach() for z in inputs())
    given = [z.clone().requires_grad_() for z in (q[:1, :2, :3, :2], k[:1, :1, :3, :2], v[:1, :1, :3, :2])]
    given += [z[:1, :2, :2].clone().requires_grad_() for z in (m, u)]
    for kernel in ("eager", "chunked"):

        def run(*z: Tensor, kernel: str = kernel) -> Tensor:
            return regard.attention(*z[:3], mask=masks.causal(), memory=Memories(*z[3:]), kernel=kernel)

        assert torch.autograd.gradcheck(run, given)
        assert torch.autograd.gradgradcheck(run, given)


def test_beside_sinks_a_cap_and_biases() -> None:
    """A sink's logit stands in the one sum of all; a cap holds for all scores; a bias for those of the sequence."""
    q, k, v, m, u = given = inputs()
    allowed = HOLE.dense(7, 7)
    part = SinkSoftmax(4).double()
    zero = torch.zeros(4, 1, 4, dtype=torch.float64)
    for kernel in ("eager", "chunked"):
        got = regard.attention(q, k, v, mask=HOLE, memory=Memories(m, u), normalizer=part, kernel=kernel)
        scores = torch.cat([(q @ k.repeat_interleave(2, 1).mT).masked_fill(~allowed, -torch.inf),
                            q @ m.repeat_interleave(2, 0).mT], -1) / 2  # fmt: skip
        weights = torch.cat([scores, part.sinks[:, None, None].expand(2, 4, 7, 1)], -1).softmax(-1)
        values = torch.cat([v.repeat_interleave(2, 1), u.repeat_interleave(2, 0).expand(2, -1, -1, -1)], 2)
        torch.testing.assert_close(got, weights @ torch.cat([values, zero.expand(2, 4, 1, 4)], 2))
        one = regard.attention(q, k, v, mask=HOLE, memory=Memories(m, u), normalizer=SoftmaxOne(), kernel=kernel)
        none = torch.zeros(2, 4, 4, dtype=torch.float64)
        more = torch.cat([m, none[:, :1]], 1), torch.cat([u, none[:, :1]], 1)
        torch.testing.assert_close(one, joined(q, k, v, *more, allowed))
        capped = regard.attention(q, k, v, memory=Memories(m, u), score_mix=SoftCap(cap=0.5), kernel=kernel)
        z = torch.cat([q @ k.repeat_interleave(2, 1).mT, q @ m.repeat_interleave(2, 0).mT], -1) / 2
        torch.testing.assert_close(capped, (0.5 * (z / 0.5).tanh()).softmax(-1) @ values)
        bias = normal(9, 1, 4, 7, 7)
        added = regard.attention(q, k, v, bias=bias, memory=Memories(m, u), kernel=kernel)
        z = z + torch.cat([bias.expand(2, -1, -1, -1), torch.zeros(2, 4, 7, 3).double()], -1)
        torch.testing.assert_close(added, z.softmax(-1) @ values)
    shaw = Shaw(4, 4, max_distance=2).double()
    got = regard.attention(q, k, v, memory=Memories(m, u), position=shaw, kernel="eager")
    torch.testing.assert_close(regard.attention(q, k, v, memory=Memories(m, u), position=shaw, kernel="chunked"), got)
    assert all(g is not None for g in torch.autograd.grad(got.sum(), given))


def test_rotation_does_not_reach_it() -> None:
    """The memory meets queries as they are before rotation: where the sequence stands makes no difference."""
    q, k, v, m, u = inputs()
    turn = Rotary(4)
    i = torch.arange(7)
    got = regard.attention(q, k, v, mask=masks.causal(), position=turn, memory=Memories(m, u))
    want = joined(turn.rotate(q, i), turn.rotate(k, i), v, m, u, masks.causal().dense(7, 7), asks=q)
    torch.testing.assert_close(got, want)
    layer = regard.create("memory_kv+rotary", dim=8, num_heads=2, causal=True, num_memories=2).double()
    x = normal(5, 2, 6, 8)
    torch.testing.assert_close(layer(x, positions=torch.arange(6) + 9), layer(x))


SPECS = [
    "memory_kv",
    "memory_kv(num_memories=2)+rotary",
    "window(window=3)+memory_kv+alibi",
    "memory_kv+sink_softmax+rotary",
    "qk_norm+memory_kv+window(window=4)+rotary",
    "memory_kv+soft_cap+gated",
]


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_steps_are_the_full_pass(spec: str) -> None:
    """Also in pages, with sequences of other lengths."""
    torch.manual_seed(0)
    layer = regard.create(spec, dim=24, num_heads=4, num_kv_heads=2, causal=True).double()
    x = normal(1, 2, 12, 24)
    want = layer(x)
    for pool in (None, PagePool(64, page_size=2)):
        state, outs = layer.init_state(2, 12, pool=pool), []
        for piece in torch.arange(12).split([1, 4, 1, 5, 1]):
            y, state = layer.step(x[:, piece], state)
            outs.append(y)
        torch.testing.assert_close(torch.cat(outs, 1), want)
    plain = regard.create(spec.replace("memory_kv(num_memories=2)", "memory_kv"), dim=24, num_heads=4, num_kv_heads=2,
                          causal=True, num_memories=50).double()  # fmt: skip
    assert plain.init_state(2, 12).buffers["k"].shape == layer.init_state(2, 12).buffers["k"].shape


def test_padding_documents_and_nan() -> None:
    torch.manual_seed(0)
    layer = regard.create("memory_kv+rotary", dim=8, num_heads=2, num_memories=2).double()
    x = normal(0, 1, 6, 8)
    keep = torch.tensor([[True] * 4 + [False] * 2])
    spoilt = x.clone()
    spoilt[:, 4:] = math.nan
    torch.testing.assert_close(layer(spoilt, mask=masks.padding(keep))[:, :4], layer(x[:, :4]))
    ends = masks.packed(torch.tensor([0, 2, 6]))
    torch.testing.assert_close(layer(x, mask=ends), torch.cat([layer(x[:, :2]), layer(x[:, 2:])], 1))
    q, k, v, m, u = (z.detach() for z in inputs())
    q[0, 0, 0] = math.nan  # a query that sees the memory alone
    for kernel in ("eager", "chunked"):
        out = regard.attention(q, k, v, mask=HOLE, memory=Memories(m, u), kernel=kernel)
        assert out[0, 0, 0].isnan().all()
        assert out.isnan().sum() == 4


def test_dropout_reaches_it() -> None:
    q, k, v, m, u = inputs()
    torch.manual_seed(0)
    outs = [regard.attention(q, k, v, memory=Memories(m, u), dropout=0.5) for _ in range(500)]
    mean = torch.stack([z.detach() for z in outs]).mean(0)
    torch.testing.assert_close(mean, joined(q, k, v, m, u, torch.ones(7, 7) > 0), rtol=0, atol=0.3)
    only = regard.attention(q, k[:, :, :0], v[:, :, :0], memory=Memories(m, u), dropout=1.0)
    assert (only == 0).all()


def test_is_torchs_bias_kv() -> None:
    """torch.nn.MultiheadAttention has one such key and value a head, as it is."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True, bias=False).double()
    x = normal(0, 2, 5, 8)
    layer = regard.create("memory_kv", dim=8, num_heads=2, num_memories=1).double()
    with torch.no_grad():
        for proj, w in zip((layer.q_proj, layer.k_proj, layer.v_proj), theirs.in_proj_weight.chunk(3), strict=True):
            proj.weight.copy_(w)
        layer.o_proj.weight.copy_(theirs.out_proj.weight)
        layer.memory.keys.copy_(theirs.bias_k.view(2, 1, 4) / 2)
        layer.memory.values.copy_(theirs.bias_v.view(2, 1, 4))
    torch.testing.assert_close(layer(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
@pytest.mark.parametrize("case", ["plain", "causal"])
def test_gives_the_golden_numbers(kernel: str, case: str) -> None:
    """x-transformers' attention with attn_num_mem_kv: outputs and every gradient."""
    z = {name.removeprefix(f"{case}_"): torch.from_numpy(a) for name, a in np.load(VECTORS).items() if case in name}
    layer = regard.create(
        "memory_kv", dim=12, num_heads=4, num_kv_heads=2, head_dim=4, num_memories=3, causal=case == "causal",
        kernel=kernel,
    ).double()  # fmt: skip
    with torch.no_grad():
        for name in ("q", "k", "v", "o"):
            getattr(layer, f"{name}_proj").weight.copy_(z[f"{name}_proj"])
        layer.memory.keys.copy_(z["mem_k"] / 4**0.5)
        layer.memory.values.copy_(z["mem_v"] / 3**0.5)
    x = z["x"].requires_grad_()
    out = layer(x, mask=masks.padding(z["keep"]))
    kept = z["keep"]  # it gives 0 for padded queries
    torch.testing.assert_close(out[kept], z["out"][kept], rtol=1e-10, atol=1e-10)
    held = {"x": x, "mem_k": layer.memory.keys, "mem_v": layer.memory.values}
    held |= {f"{n}_proj": getattr(layer, f"{n}_proj").weight for n in "qkvo"}
    grads = torch.autograd.grad((out * z["w"]).sum(), list(held.values()))
    for name, got in zip(held, grads, strict=True):
        got = got / {"mem_k": 4**0.5, "mem_v": 3**0.5}.get(name, 1.0)
        torch.testing.assert_close(got, z[f"grad_{name}"], rtol=1e-10, atol=1e-10)


def test_starts_as_the_authors_code() -> None:
    torch.manual_seed(0)
    part = regard.create("memory_kv", dim=256, num_heads=8, num_kv_heads=4, num_memories=500).memory
    assert part.keys.shape == part.values.shape == (4, 500, 32)
    assert abs(float(part.keys.detach().std()) * 32**0.5 - 1) < 0.01
    assert abs(float(part.values.detach().std()) * 500**0.5 - 1) < 0.01
    for z in map(Tensor.detach, part()):
        assert abs(float(z.std()) - 1) < 0.01
        assert abs(float(z.mean())) < 0.02


def test_a_token_alone_learns_the_exclusive_or() -> None:
    """What attention gives for one key is linear in the token; with a memory it is no more."""

    def loss(spec: str, **options: int) -> float:
        torch.manual_seed(0)
        layer = regard.create(spec, dim=8, num_heads=2, **options)
        x = torch.zeros(4, 1, 8)
        x[:, 0, :2] = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        x[:, 0, 2] = 1.0
        want = torch.tensor([0.0, 1.0, 1.0, 0.0])
        adam = torch.optim.Adam(layer.parameters(), lr=0.02)
        for _ in range(250):
            adam.zero_grad()
            now = (layer(x)[:, 0, 0] - want).square().mean()
            now.backward()
            adam.step()
        return float(now.detach())

    assert loss("softmax") > 0.249
    assert loss("memory_kv", num_memories=4) < 1e-3


class Talking(Mix):
    def forward(self, z, rows):
        return z.flip(1)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"normalizer": Entmax()}, "normalizer does not go with a memory.*got Entmax"),
        ({"weight_mix": Talking()}, "weight_mix does not go with a memory.*got Talking"),
        ({"score_mix": Talking()}, "score_mix does not go with a memory.*got Talking"),
    ],
)
def test_refuses_what_has_no_sum_of_exponentials(slots: dict[str, nn.Module], words: str) -> None:
    q, k, v, m, u = inputs()
    with pytest.raises(ValueError, match=f"attention: {words}"):
        regard.attention(q, k, v, memory=Memories(m, u), **slots)
    with pytest.raises(ValueError, match=f"Attention: {words}"):
        regard.Attention(8, 2, memory=MemoryKV(2, 4), **slots)


def test_refuses_what_does_not_fit() -> None:
    q, k, v, m, u = inputs()
    with pytest.raises(ValueError, match="normalizer does not go with a memory"):
        regard.create("memory_kv+entmax", dim=8, num_heads=2)
    for keys, values in ((m[:1], u[:1]), (m[..., :2], u)):
        with pytest.raises(ValueError, match="attention: memory does not fit q, k and v"):
            regard.attention(q, k, v, memory=Memories(keys, values))
    with pytest.raises(ValueError, match="keys are no memory"):
        Memories(m[0], u)
    with pytest.raises(ValueError, match="differ in heads or number"):
        Memories(m[:, :2], u)
    with pytest.raises(ValueError, match="num_memories"):
        MemoryKV(2, 4, num_memories=0)
    assert repr(MemoryKV(2, 4, num_memories=5)) == "MemoryKV(heads=2, num_memories=5)"


def test_weights_tell_of_the_sequence() -> None:
    """What a trace and `effective_weights` show is the sequence's part of each row."""
    torch.manual_seed(0)
    layer = regard.create("memory_kv+rotary", dim=8, num_heads=2, num_memories=2, causal=True).double()
    x = normal(0, 1, 6, 8)
    weights = regard.inspect.effective_weights(layer, x)
    traced = regard.trace(layer, x).layers[0].weights()
    torch.testing.assert_close(weights, traced.to(weights.dtype))
    assert (weights.sum(-1) < 1).all()


def test_parts_stand_in_the_layer() -> None:
    made = regard.Attention(8, 2, memory=MemoryKV(2, 4, num_memories=3), heads=QKNorm(4), position=Alibi(2))
    assert {"memory.keys", "memory.values"} <= dict(made.named_parameters()).keys()
    assert made(torch.randn(1, 5, 8)).shape == (1, 5, 8)


def test_in_trained_models() -> None:
    """Where the model doesn't rotate, it is swapped in; where it does, queries come rotated, and it is refused."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=2)).eval()
    ids = torch.arange(10)[None]
    before = gpt(ids).logits
    with regard.swap(gpt, "memory_kv(num_memories=2)"):
        got = gpt(ids).logits
        assert (got - before).abs().max() > 1e-3
        kept = gpt(ids[:, :6], use_cache=True)
        more = gpt(ids[:, 6:], past_key_values=kept.past_key_values).logits
        torch.testing.assert_close(more, got[:, 6:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gpt(ids).logits, before)
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_attention_heads=2)).eval()
    with (
        pytest.raises(ValueError, match="its memory is read by queries before rotation"),
        regard.swap(llama, "memory_kv"),
    ):
        pass

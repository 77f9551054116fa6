"""Multi-DConv-head attention against loops, torch's Conv1d and the convolution of transformers' Qwen3-Next; streams,
padding, documents and caches that are cropped, joined and kept in pages."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import masks
from regard.cache import PagePool
from regard.heads import ShortConv

B, T, M, H, G, D = 2, 11, 16, 4, 2, 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(module: Any) -> Any:
    """With random parameters."""
    module = module.double()
    with torch.no_grad():
        for n, p in enumerate(module.parameters()):
            p.copy_(normal(100 + n, *p.shape) * (0.4 if p.dim() == 2 else 1.0))
    return module


def made(name: str = "short_conv", **options: Any) -> Any:
    return moved(regard.create(name, dim=M, num_heads=H, num_kv_heads=G, causal=True, **options)).eval()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def convolved(z: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sees: Any = None) -> Tensor:
    """Channel by channel, token by token. sees(b, t, s): whether token t reads the one at s."""
    out = torch.zeros_like(z)
    K = weight.shape[2]
    for b in range(z.shape[0]):
        for h in range(z.shape[1]):
            for t in range(z.shape[2]):
                for d in range(z.shape[3]):
                    total = 0.0 if bias is None else float(bias[h, d])
                    for back in range(K):
                        if t - back >= 0 and (back == 0 or sees is None or sees(b, t, t - back)):
                            total += float(weight[h, d, K - 1 - back]) * float(z[b, h, t - back, d])
                    out[b, h, t, d] = total / (1 + math.exp(-total)) if silu else total
    return out


def layer_by_loops(layer: Any, x: Tensor, sees: Any = None) -> Tensor:
    """Projections, loops for the convolution, and attention query by query."""
    part: ShortConv = layer.heads
    p = {name: value.detach() for name, value in layer.state_dict().items()}
    found = {}
    for name, heads in (("q", H), ("k", G), ("v", G)):
        z = (x @ p[f"{name}_proj.weight"].T).unflatten(-1, (heads, D)).transpose(1, 2)
        if name in part.on:
            z = convolved(z, p[f"heads.{name}_weight"], p.get(f"heads.{name}_bias"), part.activation == "silu", sees)
        found[name] = z
    out = torch.zeros(*x.shape[:2], H, D, dtype=torch.float64)
    for b in range(x.shape[0]):
        for h in range(H):
            for t in range(x.shape[1]):
                seen = [s for s in range(t + 1) if sees is None or sees(b, t, s)]
                if seen:
                    k, v = found["k"][b, h // (H // G), seen], found["v"][b, h // (H // G), seen]
                    out[b, t, h] = torch.softmax(k @ found["q"][b, h, t] / math.sqrt(D), 0) @ v
    return out.flatten(2) @ p["o_proj.weight"].T


FORMS = [
    {},
    {"kernel_size": 4, "activation": "silu"},
    {"kernel_size": 2, "bias": True},
    {"kernel_size": 1, "bias": True},
    {"kernel_size": 14},
    *({"on": on} for on in ("q", "k", "v", "qk", "qv", "kv")),
]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_layer_is_the_formula(options: dict[str, Any]) -> None:
    layer, x = made(**options), normal(1, B, T, M)
    close(layer(x).detach(), layer_by_loops(layer, x))


def test_hidden_and_other_documents_tokens_are_zeros() -> None:
    layer, x = made(kernel_size=4, activation="silu"), normal(1, B, T, M)
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, :3] = keep[1, 5] = keep[1, 9:] = False
    got = layer(x.masked_fill(~keep[..., None], torch.nan), mask=masks.padding(keep)).detach()
    want = layer_by_loops(layer, x, lambda b, t, s: bool(keep[b, s]))
    close(got[keep], want[keep])
    ids = torch.tensor([0] * 4 + [1] + [2] * 6)
    want = layer_by_loops(layer, x, lambda b, t, s: bool(ids[t] == ids[s]))
    close(layer(x, mask=masks.documents(ids)).detach(), want)
    close(layer(x, mask=masks.packed(torch.tensor([0, 4, 5, T], dtype=torch.int32))).detach(), want)


def test_a_mask_of_pairs_says_what_is_read() -> None:
    """In whichever form it comes; a pattern of the layer's own says only what is attended to."""
    layer, x = made(kernel_size=4), normal(1, B, T, M)
    allowed = (torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(3)) < 0.5) | torch.eye(T).bool()
    want = layer_by_loops(layer, x, lambda b, t, s: bool(allowed[b, 0, t, s]))
    for mask in (allowed, masks.dense(allowed), masks.dense(allowed) & masks.causal()):
        close(layer(x, mask=mask).detach(), want)
    one, two = made(kernel_size=4, mask=masks.window(2)), x.clone()
    two[:, 0] += 1
    moved_by = (one(two) - one(x)).detach().abs().amax((0, 2))
    assert moved_by[:5].gt(1e-6).all()  # key 3 reads token 0, and query 4 sees it
    assert moved_by[5:].eq(0).all()
    two[:, 0] = torch.nan
    assert torch.equal(one(two).isnan().any(-1), (torch.arange(T) < 5).expand(B, T))


@pytest.mark.parametrize("on", ["qkv", "k", "qv"])
def test_under_autocast_all_are_of_one_dtype(on: str) -> None:
    layer, x = made(on=on, bias=True).float(), normal(3, B, T, M).float()
    want = layer(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, state, steps = layer(x), layer.init_state(B, T), []
        for n in range(T):
            step, state = layer.step(x[:, n : n + 1], state)
            steps.append(step)
    for y in (got, torch.cat(steps, 1)):
        assert y.dtype == torch.bfloat16
        assert (y - want).abs().max() <= 0.05 * want.abs().max()


def test_is_torchs_convolution() -> None:
    """Values and every gradient, of channels as torch's depthwise Conv1d has them, padded on the left."""
    part = moved(ShortConv(D, H, G, kernel_size=4, bias=True))
    given = [normal(n, B, heads, T, D).requires_grad_() for n, heads in enumerate((H, G, G))]
    got = part(*given)
    for name, z, ours in zip("qkv", given, got, strict=True):
        C = z.shape[1] * D
        conv = nn.Conv1d(C, C, 4, groups=C).double()
        weight, bias = (getattr(part, f"{name}_{what}") for what in ("weight", "bias"))
        with torch.no_grad():
            conv.weight.copy_(weight.reshape(C, 1, 4))
            conv.bias.copy_(bias.flatten())  # type: ignore[union-attr]
        theirs = conv(F.pad(z.transpose(2, 3).flatten(1, 2), (3, 0))).unflatten(1, (-1, D)).transpose(2, 3)
        close(ours, theirs)
        direction = normal(9, *ours.shape)
        a = torch.autograd.grad((ours * direction).sum(), (z, weight, bias))
        b = torch.autograd.grad((theirs * direction).sum(), (z, *conv.parameters()))
        for g, w in zip(a, b, strict=True):
            close(g, w.reshape(g.shape))


def test_is_the_convolution_of_qwen3_next() -> None:
    """Theirs is one over the channels of all heads of queries, keys and values, with SiLU."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=M, linear_num_key_heads=G, linear_num_value_heads=H, linear_key_head_dim=D,
        linear_value_head_dim=D, linear_conv_kernel_dim=4,
    )  # fmt: skip
    theirs = moved(qwen.Qwen3NextGatedDeltaNet(config, 0).conv1d)
    part = ShortConv(D, G, G, kernel_size=4, activation="silu").double()
    wide = ShortConv(D, H, H, kernel_size=4, activation="silu", on="v").double()
    q, k, v, w = theirs.weight.detach()[:, 0].split([G * D, G * D, G * D, (H - G) * D])
    with torch.no_grad():
        for name, weight in (("q", q), ("k", k)):
            getattr(part, f"{name}_weight").copy_(weight.unflatten(0, (G, D)))
        wide.v_weight.copy_(torch.cat([v, w]).unflatten(0, (H, D)))
    z = [normal(n, B, heads, T, D) for n, heads in enumerate((G, G, H))]
    mixed = torch.cat([a.transpose(1, 2).flatten(2) for a in z], -1).mT
    want = F.silu(theirs(mixed)[..., :T]).mT
    got = (*part(z[0], z[1], z[1])[:2], wide(z[2], z[2], z[2])[2])
    close(torch.cat([a.transpose(1, 2).flatten(2) for a in got], -1).detach(), want.detach())


def test_starts_as_the_authors_code_and_can_start_as_the_layer_without() -> None:
    part = regard.create("short_conv", dim=M, num_heads=H, num_kv_heads=G, causal=True).heads
    for weight, heads in ((part.q_weight, H), (part.k_weight, G), (part.v_weight, G)):
        assert torch.equal(weight.detach(), torch.tensor([0.5 / 3, 0.5 / 3, 0.5]).expand(heads, D, 3))
    assert part.q_bias is None
    given = [normal(n, B, heads, T, D) for n, heads in enumerate((H, G, G))]
    other = ShortConv(D, H, G, bias=True).double()
    assert other.start_neutral()
    assert all(map(torch.equal, other(*given), given))
    silu = ShortConv(D, H, G, activation="silu")
    before = {name: p.clone() for name, p in silu.named_parameters()}
    assert not silu.start_neutral()
    assert all(torch.equal(p, before[name]) for name, p in silu.named_parameters())


# --- streams --------------------------------------------------------------------------------------------------


JOINED = [
    "short_conv",
    "rotary+short_conv",
    "short_conv+alibi+gated",
    "window(window=2)+short_conv(kernel_size=4)",
    "window(window=5)+short_conv+rotary",
    "mta+short_conv",
    "learned(max_positions=16)+short_conv",
    "entmax+short_conv(on='kv')",
    "short_conv(kernel_size=14, activation='silu', bias=True)",
    "cope+short_conv(on='q')",
]


def streamed(layer: Any, x: Tensor, state: Any, sizes: list[int], mask: Any = None, where: Any = None) -> Tensor:
    outs, done = [], 0
    for size in sizes:
        at = slice(done, done + size)
        told = {} if where is None else {"positions": where[:, at]}
        out, state = layer.step(x[:, at], state, mask=mask, **told)
        outs.append(out)
        done += size
    return torch.cat(outs, 1)


@torch.no_grad()
@pytest.mark.parametrize("pages", [False, True])
@pytest.mark.parametrize("name", JOINED)
def test_beside_other_parts_a_stream_is_the_full_pass(name: str, pages: bool) -> None:
    layer, x = made(name), normal(1, B, T, M)
    want = layer(x)
    for sizes in ([1] * T, [1, 3, 0, 2, T - 6], [T], [5, T - 5]):
        pool = PagePool(64, page_size=3) if pages else None
        close(streamed(layer, x, layer.init_state(B, T, pool=pool), sizes), want)


@torch.no_grad()
@pytest.mark.parametrize("name", ["short_conv(kernel_size=4)", "rotary+short_conv", "window(window=3)+short_conv"])
def test_left_padding_is_as_if_cut_away(name: str) -> None:
    """In the full pass and in streams, whatever the pads hold."""
    layer, x, pads = made(name), normal(1, B, T, M), 3
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, :pads] = False
    alone = layer(x[:1, pads:])[0], layer(x[1:])[0]
    mask, where = masks.padding(keep), (keep.cumsum(1) - 1).clamp(min=0)
    for hold in (7.0, torch.nan):
        given = x.masked_fill(~keep[..., None], hold)
        got = [layer(given, mask=mask, positions=where)]
        for sizes in ([1] * T, [2, 2, T - 4], [T]):
            got.append(streamed(layer, given, layer.init_state(B, T), sizes, mask, where))
        for out in got:
            close(out[0, pads:], alone[0])
            close(out[1], alone[1])


@torch.no_grad()
@pytest.mark.parametrize("pages", [False, True])
def test_a_cropped_state_goes_on_as_one_that_never_held_more(pages: bool) -> None:
    layer, x, other = made("rotary+short_conv(kernel_size=4)"), normal(1, B, T, M), normal(2, B, T, M)
    for name in ("crop", "twice"):
        pool = PagePool(64, page_size=2) if pages else None
        _, state = layer.step(x[:, :8], layer.init_state(B, 2 * T, pool=pool))
        for length in (8, 7, 6, 2, 1, 0) if name == "crop" else (3,):
            cropped = state.crop(length)
            if name == "twice":
                _, cropped = layer.step(other[:, 3:7], cropped)
                cropped = cropped.crop(5)
            held = torch.cat([x[:, :length], other[:, length:]], 1)
            start = cropped.length
            close(layer.step(held[:, start : start + 3], cropped)[0], layer(held[:, : start + 3])[:, start:])


@torch.no_grad()
def test_sequences_of_unequal_lengths_go_on_as_each_alone() -> None:
    layer, x = made("rotary+short_conv(kernel_size=4)"), normal(1, B, T, M)
    empty = layer.init_state(1, T, pool=PagePool(64, page_size=3))
    one, two = layer.step(x[:1, :7], empty)[1], layer.step(x[1:, :1], empty)[1]
    both = one.join(two)
    for t in (1, 2):
        new = torch.stack([x[b, n : n + t] for b, n in enumerate(both.lengths)])
        ends = [n + t for n in both.lengths]
        got, both = layer.step(new, both)
        for b, end in enumerate(ends):
            close(got[b], layer(x[b : b + 1, :end])[0, -t:])


def test_a_window_keeps_the_tokens_that_are_read() -> None:
    layer = made("window(window=2)+short_conv(kernel_size=5)")
    with torch.no_grad():
        _, state = layer.step(normal(1, B, T, M), layer.init_state(B, 1))
    assert state.window == state.kept == 4
    assert state.buffers.keys() == {"k", "v", "x"}


# --- what is not taken ----------------------------------------------------------------------------------------


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(ValueError, match="'short_conv' does not support bidirectional"):
        regard.create("short_conv", dim=M, num_heads=H)
    with pytest.raises(ValueError, match=r"Attention: causal is off, and ShortConv reads the tokens before each"):
        regard.Attention(M, H, heads=ShortConv(D, H))
    regard.Attention(M, H, heads=ShortConv(D, H, kernel_size=1))
    layer = regard.Attention(M, H, heads=ShortConv(D, H), causal=True)
    with pytest.raises(ValueError, match="context is not taken: ShortConv reads tokens in their order"):
        layer(torch.zeros(B, T, M), torch.zeros(B, T, M))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size is too small"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size has the wrong type"),
        ({"on": "vk"}, ValueError, "on is unknown"),
        ({"activation": "gelu"}, ValueError, "activation is unknown"),
        ({"bias": 1}, TypeError, "bias has the wrong type"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ShortConv(D, H, **options)


def test_tensors_of_different_tokens_are_refused() -> None:
    q, k = torch.zeros(B, H, 3, D), torch.zeros(B, H, 4, D)
    with pytest.raises(ValueError, match=r"are not of the same tokens \(got 3, 4 and 4\)"):
        ShortConv(D, H)(q, k, k)


@torch.no_grad()
def test_another_layers_state_is_refused() -> None:
    layer, plain, x = made(), made("softmax"), normal(1, B, 2, M)
    _, state = plain.step(x, plain.init_state(B, T))
    with pytest.raises(ValueError, match=r"holds \['k', 'v'\], got \['k', 'v', 'x'\]"):
        layer.step(x[:, :1], state)
    _, state = layer.step(x, layer.init_state(B, T))
    with pytest.raises(ValueError, match="must match"):
        layer.step(x[:1], state)


def test_a_trained_model_whose_cache_holds_no_tokens_refuses_it() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=M, n_head=H, vocab_size=9))
    with pytest.raises(ValueError, match="reads queries, keys and values of the tokens before, which a model's c"):
        regard.swap(model.eval(), "short_conv")


# --- the claim ------------------------------------------------------------------------------------------------


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k1 v1 ... k8 v8, and the keys again in another order; the value of each."""

    def drawn() -> Tensor:
        return torch.rand(count, 16, generator=generator).argsort(1)[:, :8]

    keys, values = drawn(), 16 + drawn()
    order = torch.rand(count, 8, generator=generator).argsort(1)
    return torch.cat([torch.stack([keys, values], -1).flatten(1), keys.gather(1, order)], 1), values.gather(1, order)


def learned(**options: Any) -> float:
    """How often one layer without positions names what followed each key, after 80 steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    layer = regard.create("short_conv", dim=32, num_heads=1, causal=True, **options)
    model = nn.Sequential(nn.Embedding(32, 32), layer, nn.Linear(32, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        tokens, values = pairs(64, generator)
        F.cross_entropy(model(tokens)[:, -8:].flatten(0, 1), values.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens, values = pairs(256, generator)
    return float((model(tokens)[:, -8:].argmax(-1) == values).double().mean())


def test_one_layer_looks_up_what_followed() -> None:
    """Keys must tell which token came before them; of queries that know, or of no convolution, there is no use."""
    assert learned() > 0.95
    assert learned(on="q") < 0.3
    assert learned(kernel_size=1) < 0.3

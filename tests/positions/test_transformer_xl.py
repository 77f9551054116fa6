"""Transformer-XL against loops, whose author read neither code nor test, and the numbers of XLNet's layer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from naive import may, softmax
from positions.naive import close
from regard import masks
from regard.kernels import KERNELS
from regard.mixers.segment_memory import SegmentMemory
from regard.positions.transformer_xl import RelativeXL, sinusoids

VECTORS = Path(__file__).parents[1] / "vectors" / "xlnet_relative.npz"


def project(x: Tensor, w: Tensor) -> Tensor:
    """x (M), w (M, H, D) -> (H, D)."""
    return sum(x[c] * w[c] for c in range(x.shape[0]))


def sinusoid(offset: int, m: int) -> Tensor:
    f = [10000.0 ** (-2 * c / m) for c in range(m // 2)]
    return torch.tensor([math.sin(offset * a) for a in f] + [math.cos(offset * a) for a in f], dtype=torch.float64)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = x.sum() / x.shape[0]
    return (x - mean) / torch.sqrt(((x - mean) ** 2).sum() / x.shape[0] + eps) * weight + bias


def oracle(
    x: Tensor,
    memory: Tensor | None,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    wr: Tensor,
    u: Tensor,
    w: Tensor,
    allowed: Tensor | None = None,
    causal: bool = True,
    layer_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """x (B, T, M), memory (B, R, M); wq, wk, wv, wr, wo (M, H, D); u, w (H, D) -> out (B, T, M).

    layer_norm (weight, bias): LN(x + Wo o) as in XLNet; None: Wo o alone. allowed (T, S) or (B, T, S), besides causal.
    """
    batch, length, m = x.shape
    heads, d = u.shape
    past = 0 if memory is None else memory.shape[1]
    outs = []
    for b in range(batch):
        context = ([] if memory is None else [t.detach() for t in memory[b]]) + list(x[b])
        k, v = [project(t, wk) for t in context], [project(t, wv) for t in context]
        for i in range(length):
            q = project(x[b, i], wq)
            seen = [j for j in range(past + length) if may(allowed, b, i, j) and (j <= past + i or not causal)]
            r = {j: project(sinusoid(past + i - j, m), wr) for j in seen}
            y = x.new_zeros(m)
            for h in range(heads):
                logits = [
                    (((q[h] + u[h]) * k[j][h]).sum() + ((q[h] + w[h]) * r[j][h]).sum()) / math.sqrt(d) for j in seen
                ]
                o = torch.zeros(d, dtype=x.dtype)
                for p, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    o = o + p * v[j][h]
                y = y + torch.stack([(wo[c, h] * o).sum() for c in range(m)])
            outs.append(y if layer_norm is None else norm(x[b, i] + y, *layer_norm, eps))
    return torch.stack(outs).reshape(batch, length, m)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(**options: Any) -> regard.Attention:
    layer = regard.create("transformer_xl", **{"dim": 6, "num_heads": 2, "causal": True, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    return layer


def weights_of(layer: regard.Attention) -> tuple[Tensor, ...]:
    """As the oracle takes them, with a map of keys and values for each query head."""
    H, G = layer.num_heads, layer.num_kv_heads
    q, r = (p.weight.unflatten(0, (H, -1)).permute(2, 0, 1) for p in (layer.q_proj, layer.position.offset_proj))
    k, v = (
        p.weight.unflatten(0, (G, -1)).repeat_interleave(H // G, 0).permute(2, 0, 1)
        for p in (layer.k_proj, layer.v_proj)
    )
    o = layer.o_proj.weight.unflatten(1, (H, -1))
    return q, k, v, o, r, layer.position.content_bias, layer.position.offset_bias


@pytest.mark.parametrize("case", ["u_", "b_"])
def test_gives_the_numbers_of_xlnet(case: str) -> None:
    """Causal with a memory, and in both directions with hidden keys; norm and residual are put around the layer."""
    with np.load(VECTORS) as file:
        z = {n: torch.from_numpy(file[n]) for n in file}
    layer = regard.create("transformer_xl", dim=6, num_heads=2, causal=case == "u_").double()
    with torch.no_grad():
        for n in "qkv":
            getattr(layer, f"{n}_proj").weight.copy_(z[n].flatten(1).T)
        layer.o_proj.weight.copy_(z["o"].flatten(1))
        layer.position.offset_proj.weight.copy_(z["r"].flatten(1).T)
        layer.position.content_bias.copy_(z["r_w_bias"])
        layer.position.offset_bias.copy_(z["r_r_bias"])
    x, after = z["x"].clone().requires_grad_(), (z["layer_norm.weight"], z["layer_norm.bias"])
    mixed = layer(x, torch.cat([z["memory"], x], 1), mask=~z[case + "hidden"].bool()[:, None])
    out = torch.nn.functional.layer_norm(x + mixed, (6,), *after, eps=1e-12)
    close(out.detach(), z[case + "out"])
    leaves = [x, layer.position.content_bias, layer.position.offset_proj.weight]
    gx, gu, gr = torch.autograd.grad((out * z[case + "w"]).sum(), leaves)
    close(gx, z[case + "gx"])
    close(gu, z[case + "gr_w_bias"])
    close(gr.T.unflatten(1, (2, 3)), z[case + "gr"])
    given = (*(z[n] for n in ("q", "k", "v", "o", "r", "r_w_bias", "r_r_bias")), ~z[case + "hidden"].bool())
    close(oracle(z["x"], z["memory"], *given, case == "u_", after), z[case + "out"])


@pytest.mark.parametrize("kernel", ["auto", "eager", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_equals_loops(causal: bool, kernel: str) -> None:
    """With padding, a memory, two query heads to a key head, and gradients of all there is."""
    layer = built(causal=causal, num_kv_heads=1, kernel=kernel)
    x, memory = normal(7, 2, 4, 6).requires_grad_(), normal(8, 2, 3, 6)
    keep = torch.tensor([[True] * 7, [False, True, True, True, False, True, True]])
    real = keep[:, 3:]
    want = oracle(x, memory, *weights_of(layer), keep[:, None].expand(2, 4, 7), causal)
    got, after = SegmentMemory(layer, memory=5).step(
        x, SegmentMemory(layer, memory=3).init_state(2)._replace(x=memory, held=keep[:, :3]), mask=real
    )
    close(got[real].detach(), want[real].detach())
    leaves, direction = [x, *layer.parameters()], normal(9, 2, 4, 6) * real[..., None]
    for a, b in zip(
        torch.autograd.grad((got * direction).sum(), leaves), torch.autograd.grad((want * direction).sum(), leaves)
    ):
        close(a, b)
    assert torch.equal(after.x, torch.cat([memory, x.detach()], 1)[:, -5:])
    assert torch.equal(after.held, keep[:, -5:])
    assert not after.x.requires_grad


def test_learns_offsets_and_finds_them_in_memory() -> None:
    """The token three places before, learned in 16 tokens, is found in 48, and by segments of 4 with a memory of 4."""
    torch.manual_seed(0)
    layer = regard.create("transformer_xl", dim=12, num_heads=1, causal=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.03)

    def drawn(n: int, T: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.randint(6, (n, T)), 12).float()

    def wrong(out: Tensor, x: Tensor) -> float:
        return float((out[:, 3:].argmax(-1) != x[:, :-3].argmax(-1)).float().mean())

    for _ in range(200):
        x = drawn(32, 16)
        loss = torch.nn.functional.cross_entropy(8 * layer(x)[:, 3:].flatten(0, 1), x[:, :-3].flatten(0, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, found = drawn(16, 48), {}
    assert wrong(layer(x), x) < 0.02
    for memory in (0, 4):
        segments = SegmentMemory(layer, memory=memory)
        state, outs = segments.init_state(16), []
        for part in x.split(4, 1):
            out, state = segments.step(part, state)
            outs.append(out)
        found[memory] = wrong(torch.cat(outs, 1), x)
    assert found[4] < 0.02
    assert found[0] > 0.4


@pytest.mark.parametrize("name", ["transformer_xl", "rotary", "alibi"])
def test_memory_is_a_longer_window(name: str) -> None:
    """One layer with all the past in its memory gives the pass over all tokens, and a stream of keys and values."""
    layer, x = regard.create(name, dim=8, num_heads=2, causal=True).double(), normal(3, 2, 12, 8)
    segments, want = SegmentMemory(layer, memory=12), layer(x)
    state, cache, outs = segments.init_state(2, 12), layer.init_state(2, 12), []
    for part in x.split([5, 0, 3, 4], 1):
        out, state = segments.step(part, state)
        streamed, cache = layer.step(part, cache)
        close(out, streamed)
        outs.append(out)
    close(torch.cat(outs, 1), want)
    close(segments(x), want)


def test_a_short_memory_is_a_window_that_starts_with_the_segment() -> None:
    layer, x, n, mem = built(), normal(3, 1, 9, 6), 3, 2
    at = torch.arange(9)
    allowed = (at <= at[:, None]) & (at >= (at[:, None] // n) * n - mem)
    segments, outs = SegmentMemory(layer, memory=mem), []
    state = segments.init_state(1)
    for part in x.split(n, 1):
        out, state = segments.step(part, state)
        outs.append(out)
    close(torch.cat(outs, 1), layer(x, mask=allowed[None, None]))


def test_two_layers_reach_two_memories_back() -> None:
    x, n = normal(3, 1, 12, 6), 3
    layers = [SegmentMemory(built(), memory=n) for _ in range(2)]

    def last(x: Tensor) -> Tensor:
        states, out = [layer.init_state(1) for layer in layers], x
        for part in x.split(n, 1):
            out = part
            for m, layer in enumerate(layers):
                out, states[m] = layer.step(out, states[m])
        return out.detach()

    changed = [(last(x + (torch.arange(12) == t).double()[:, None]) - last(x)).abs().max() > 1e-12 for t in range(12)]
    assert changed == [False] * 3 + [True] * 9


def test_sinusoids_in_halves() -> None:
    offsets = torch.arange(-3, 5)
    close(sinusoids(offsets, 6), torch.stack([sinusoid(o, 6) for o in offsets.tolist()]))


def test_shared_biases_and_starting_values() -> None:
    layers = [regard.create("transformer_xl", dim=64, num_heads=16) for _ in range(2)]
    part = layers[0].position
    assert {tuple(p.shape) for p in part.parameters()} == {(16, 4), (64, 64)}
    for p in part.parameters():
        assert 0.01 < p.std() < 0.03
    regard.share(*layers)
    assert layers[1].position.content_bias is part.content_bias
    assert layers[1].position.offset_bias is part.offset_bias
    assert layers[1].position.offset_proj is not part.offset_proj
    assert part.start_neutral()
    layer, x = layers[0], torch.randn(1, 5, 64)
    plain = regard.create("softmax", dim=64, num_heads=16)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "position" not in n})
    torch.testing.assert_close(layer(x), plain(x))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="dim"):
        RelativeXL(7, 1, 7)
    with pytest.raises(ValueError, match="RelativeXL"):
        regard.attention(*torch.zeros(3, 1, 3, 2, 4), position=RelativeXL(8, 2, 4))
    layer = regard.create("transformer_xl", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match="memory"):
        SegmentMemory(layer, memory=-1)
    with pytest.raises(TypeError, match=r"mixer has the wrong type \(got str\)"):
        SegmentMemory("transformer_xl", memory=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes no context with a mask \(got Linear\)"):
        SegmentMemory(torch.nn.Linear(8, 8), memory=1)
    with pytest.raises(ValueError, match="of another width than its tokens"):
        SegmentMemory(regard.Attention(8, 2, context_dim=6), memory=1)
    segments, x = SegmentMemory(layer, memory=2), torch.zeros(2, 3, 8)
    with pytest.raises(TypeError, match="state has the wrong type"):
        segments.step(x, layer.init_state(2, 4))
    with pytest.raises(ValueError, match="has another batch than x"):
        segments.step(x, segments.init_state(1))
    with pytest.raises(ValueError, match="can only hide tokens of this segment"):
        segments.step(x, segments.init_state(2), mask=torch.ones(2, 2, dtype=torch.bool))


def test_masks_of_selected_keys() -> None:
    """Where a kernel reads keys with gaps between them, offsets are still those of their places."""
    layer, x = built(), normal(4, 1, 40, 6)
    mask = masks.window(3) | masks.global_tokens(2)
    want = layer(x, mask=mask)
    ran = []
    for kernel in KERNELS:
        layer.kernel = kernel
        try:
            got = layer(x, mask=mask)
        except ValueError:
            continue
        close(got, want)
        ran.append(kernel)
    assert {"eager", "chunked"} < {*ran}

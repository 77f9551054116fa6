"""PaTH attention against loops, whose author read neither code nor test, and the numbers of its authors' reference."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from naive import linear, may, softmax
from positions.naive import close
from regard import masks
from regard.mixers import path as module
from regard.mixers.path import PathState, path_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "householder_path.npz"
NAMES = ("q", "k", "v", "direction", "beta", "log_forget")


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    direction: Tensor,
    beta: Tensor,
    log_forget: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k, direction (B, T, H, D), v (B, T, H, V), beta, log_forget (B, T, H) -> out (B, T, H, V), weights.

    direction is taken as it comes. The forget bias is divided by sqrt(D) too.
    """
    batch, length, heads, d = q.shape
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen, logits = [], []
                row, bias = q[b, i, h], torch.zeros((), dtype=q.dtype)
                for j in range(i, -1, -1):  # row = q_i H_i ... H_{j+1}, bias = c_i - c_j
                    if may(allowed, b, i, j):
                        seen.append(j)
                        logits.append(((row * k[b, j, h]).sum() + bias) / math.sqrt(d))
                    w = direction[b, j, h]
                    row = row - beta[b, j, h] * (row * w).sum() * w
                    if log_forget is not None:
                        bias = bias + log_forget[b, j, h]
                y, a_row = torch.zeros(v.shape[3], dtype=q.dtype), [torch.zeros((), dtype=q.dtype)] * length
                for a, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    y = y + a * v[b, j, h]
                    a_row[j] = a
                outs.append(y)
                ws.append(torch.stack(a_row))
    return (
        torch.stack(outs).reshape(batch, heads, length, -1).transpose(1, 2),
        torch.stack(ws).reshape(batch, heads, length, length),
    )


def oracle_stream(
    q: Tensor, k: Tensor, v: Tensor, direction: Tensor, beta: Tensor, log_forget: Tensor | None = None
) -> Tensor:
    """The same, token by token with a cache of turned keys k_j <- k_j H_t."""
    batch, length, heads, d = q.shape
    outs = []
    for b in range(batch):
        caches: list[list[tuple[Tensor, Any]]] = [[] for _ in range(heads)]
        for t in range(length):
            for h in range(heads):
                w = direction[b, t, h]
                step = 0.0 if log_forget is None else log_forget[b, t, h]
                caches[h] = [(key - beta[b, t, h] * (key * w).sum() * w, bias + step) for key, bias in caches[h]]
                caches[h].append((k[b, t, h], 0.0))
                a = softmax([((q[b, t, h] * key).sum() + bias) / math.sqrt(d) for key, bias in caches[h]])
                outs.append(sum(p * v[b, j, h] for j, p in enumerate(a)))
    return torch.stack(outs).reshape(batch, length, heads, -1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attended(*given: Tensor, **options: Any) -> Tensor:
    """`path_attention` with tokens before heads, as the oracles have them."""
    return path_attention(*(z.transpose(1, 2) for z in given), **options)[0].transpose(1, 2)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_gives_the_numbers_of_the_authors_reference(chunk: int) -> None:
    with np.load(VECTORS) as file:
        z = {n.removeprefix("p_"): torch.from_numpy(file[n]) for n in file}
    leaves = {n: z[n].clone().requires_grad_() for n in NAMES}
    out = attended(*leaves.values(), chunk=chunk)
    close(out.detach(), z["out"])
    close(oracle(*leaves.values())[0].detach(), z["out"])
    for name, got in zip(leaves, torch.autograd.grad((out * z["w"]).sum(), list(leaves.values())), strict=True):
        close(got, z["g" + name])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_loops_and_their_stream(seed: int, gated: bool) -> None:
    """Directions of any length, strengths beyond 2, two query heads to a key head, hidden tokens; in any chunks."""
    B, T, H, G, D = 2, 6, 2, 1, 3
    q, k, v, w = (normal(seed + 10 * n, B, T, heads, D) for n, heads in enumerate((H, G, G, G)))
    beta, gates = 3 * normal(seed + 50, B, T, G).sigmoid(), -normal(seed + 60, B, T, H).exp()
    keep = torch.tensor([[True] * T, [False, True, True, False, True, True]])
    every = (q, *(z.repeat_interleave(H, 2) for z in (k, v, w, beta)), *([gates] if gated else []))
    given = (q, k, v, w, beta, *([gates] if gated else []))
    close(oracle_stream(*every), oracle(*every)[0])
    for chunk in (1, 4, 6):
        close(attended(*given, chunk=chunk), oracle(*every)[0])
    still = [torch.where(keep[..., None], z, 0.0) for z in every[4:]]
    want = oracle(*every[:4], *still, allowed=keep[:, None].expand(B, T, T))[0]
    for chunk in (2, 6):
        close(attended(*given, keep=keep, chunk=chunk)[keep], want[keep])


def built(**options: Any) -> torch.nn.Module:
    layer = regard.create("path", **{"dim": 6, "num_heads": 2, "causal": True, "rank": 4, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    return layer


VARIANTS = {
    "default": {},
    "all": {"forget_gate": True, "qk_norm": True, "kernel_size": 2, "num_kv_heads": 1},
    "plain": {"kernel_size": None, "rank": None},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layer_and_its_steps_equal_loops(name: str) -> None:
    """What it makes of the tokens, with hidden ones, and gradients of all there is."""
    layer = built(**VARIANTS[name])
    p, x = dict(layer.named_parameters()), normal(7, 2, 5, 6).requires_grad_()
    keep = torch.tensor([[True] * 5, [False, True, True, False, True]])
    q, k, v = (torch.stack([torch.stack([linear(t, p[f"{n}_proj.weight"]) for t in row]) for row in x]) for n in "qkv")
    if name == "all":
        q, k = (
            z / torch.sqrt((z * z).mean(-1, keepdim=True) + 1e-5) * p[f"norm.{n}_weight"].flatten()
            for n, z in (("q", q), ("k", k))
        )
    w = x
    for n in range(1 if name == "plain" else 2):
        w = w @ p[f"w_proj.{n}.weight"].T
    if name != "plain":
        taps, shown = p["conv_weight"], torch.where(keep[..., None], w, 0.0)
        K = taps.shape[1]
        w = torch.stack(
            [
                torch.stack([sum(taps[:, K - 1 - n] * shown[b, t - n] for n in range(min(K, t + 1))) for t in range(5)])
                for b in range(2)
            ]
        )
        w = w * torch.sigmoid(w)
    q, k, v, w = (z.unflatten(-1, (-1, 3)) for z in (q, k, v, w))
    w = w / torch.sqrt((w * w).sum(-1, keepdim=True) + 1e-6)
    beta = 2 * torch.sigmoid(x @ p["beta_proj.weight"].T + p["beta_proj.bias"]) * keep[..., None]
    gates = []
    if name == "all":
        k, v, w, beta = (z.repeat_interleave(2, 2) for z in (k, v, w, beta))
        logits = x @ p["forget_gate.weight"].T + p["forget_gate.bias"]
        gates = [torch.nn.functional.logsigmoid(logits) * keep[..., None]]
    o = oracle(q, k, v, w, beta, *gates, allowed=keep[:, None].expand(2, 5, 5))[0]
    want = o.flatten(2) @ p["o_proj.weight"].T
    leaves, weights = [x, *layer.parameters()], normal(9, 2, 5, 6) * keep[..., None]
    got = layer(x, mask=masks.padding(keep))
    close(got[keep].detach(), want[keep].detach())
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves), torch.autograd.grad((want * weights).sum(), leaves)
    ):
        close(a, b)
    for sizes in ((1,) * 5, (2, 0, 3)):
        state, outs, at = layer.init_state(2, 5), [], 0
        for t in sizes:
            out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
            outs, at = [*outs, out.detach()], at + t
        close(torch.cat(outs, 1)[keep], want[keep].detach())


def test_long_passes_are_computed_again_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    again, calls = torch.utils.checkpoint.checkpoint, []
    monkeypatch.setattr(module, "checkpoint", lambda *a, **o: calls.append(a) or again(*a, **o))
    z = normal(3, 1, 2, 20, 3).requires_grad_()
    found = []
    for many in (1024, 1):
        monkeypatch.setattr(module, "MANY", many)
        out, _ = path_attention(z, z.flip(2), z.cos(), 0.3 * z, z[..., 0].sigmoid(), -z[..., 1].exp(), chunk=6)
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), z)))
        assert len(calls) == (4 if many == 1 else 0)
    for a, b in zip(*found, strict=True):
        close(a, b)


def swaps(n: int, T: int) -> tuple[Tensor, Tensor]:
    """Three tokens for the places, T swaps of two places each, and where the item of place 0 is after each."""
    swap = torch.randint(3, (n, T))
    goes = torch.tensor([[1, 0, 2], [0, 2, 1], [2, 1, 0]])
    place, places = torch.zeros(n, dtype=torch.long), []
    for t in range(T):
        place = goes[swap[:, t], place]
        places.append(place)
    return torch.cat([torch.arange(3).expand(n, 3), 3 + swap], 1), torch.stack(places, 1)


def tracked(name: str, **options: Any) -> float:
    """How often a layer is right after some training."""
    torch.manual_seed(0)
    layer = regard.create(name, dim=16, num_heads=4, causal=True, **options)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 16), layer, torch.nn.Linear(16, 3))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        x, y = swaps(64, 8)
        loss = torch.nn.functional.cross_entropy(model(x)[:, 3:].flatten(0, 1), y.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = swaps(256, 8)
    return float((model(x)[:, 3:].argmax(-1) == y).float().mean())


def test_tracks_an_item_through_swaps() -> None:
    """Swaps compose as permutations do; a rotary layer is right about half of the time."""
    assert tracked("path", rank=None, kernel_size=None) > 0.95
    assert tracked("rotary") < 0.65


def test_without_strength_it_is_plain_softmax() -> None:
    layer = built()
    with torch.no_grad():
        layer.beta_proj.weight.zero_()
        layer.beta_proj.bias.fill_(-math.inf)
    plain = regard.create("softmax", dim=6, num_heads=2, causal=True).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if n in plain.state_dict()})
    x = normal(3, 2, 9, 6)
    close(layer(x).detach(), plain(x).detach())


def test_strong_equal_reflections_stay_exact() -> None:
    """All directions alike and beta = 2: powers of the system would overflow; turned keys only change sides."""
    q, k, v = (normal(n, 1, 1, 200, 4).float() for n in range(3))
    w = torch.nn.functional.normalize(torch.ones(1, 1, 200, 4), dim=-1)
    got, _ = path_attention(q, k, v, w, torch.full((1, 1, 200), 2.0))
    i = torch.arange(200)
    turned = k - 2 * (k * w).sum(-1, keepdim=True) * w
    odd = ((i[:, None] - i) % 2 == 1)[None, None]
    scores = torch.where(odd, q @ turned.mT, q @ k.mT) / 2
    want = scores.masked_fill(i > i[:, None], -math.inf).softmax(-1) @ v
    assert (got - want).abs().max() < 1e-5


def test_starts_as_the_released_layer_does() -> None:
    layer = regard.create("path", dim=64, num_heads=4, causal=True, forget_gate=True)
    assert [tuple(m.weight.shape) for m in layer.w_proj] == [(32, 64), (64, 32)]
    assert layer.conv_weight.shape == (64, 3)
    bound = 3**-0.5
    assert 0.9 * bound < layer.conv_weight.abs().max() <= bound
    assert layer.beta_proj.bias.shape == (4,)
    assert not layer.forget_gate.bias.any()


def test_an_empty_step_changes_nothing() -> None:
    z = normal(0, 1, 2, 0, 3)
    out, state = path_attention(
        z, z, z, z, z[..., 0], state=PathState(z, z, z[:, :0, :, 0], z[:, 0, :, 0].bool(), z[:, 0])
    )
    assert out.shape == (1, 2, 0, 3)
    assert state.k is z


def test_refusals() -> None:
    with pytest.raises(ValueError, match="does not support bidirectional"):
        regard.create("path", dim=8, num_heads=2)
    with pytest.raises(ValueError, match=r"Path: causal is off.*\(got False\); expected True"):
        module.Path(8, 2)
    with pytest.raises(ValueError, match="rank"):
        regard.create("path", dim=8, num_heads=2, causal=True, rank=0)
    with pytest.raises(TypeError, match="forget_gate has the wrong type"):
        regard.create("path", dim=8, num_heads=2, causal=True, forget_gate=1)
    z = normal(0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="path_attention: w"):
        path_attention(z, z, z, z[:, :1], z[..., 0])
    with pytest.raises(ValueError, match="path_attention: chunk"):
        path_attention(z, z, z, z, z[..., 0], chunk=0)

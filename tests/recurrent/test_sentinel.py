"""Attention with a visual sentinel against loops, a public port's numbers (B004), and when it looks away."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent.naive_sentinel import naive_sentinel, naive_visual_sentinel
from regard.laws.agreement import close, close_all, run, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import SentinelAttention, adaptive_attention
from regard.recurrent.sentinel import sentinel_cell

VECTORS = Path(__file__).parents[1] / "vectors" / "B004.npz"


def build(dim: int, **options: int) -> SentinelAttention:
    torch.manual_seed(3)
    layer = SentinelAttention(dim, **options).double()
    perturb(layer, size=0.5)
    return layer


@pytest.mark.parametrize("case", "ab")
def test_gives_the_numbers_of_the_public_port(case: str) -> None:
    """With the layers that the port puts around sentinel, query and output."""
    with np.load(VECTORS) as file:
        p = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith("p_")}
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    given = {n: z[n].clone().requires_grad_() for n in ("x", "img", "h0", "c0", "V", "Ve")}

    def layer(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}_weight"].T + p[f"{name}_bias"]

    i, f, o, u = (layer("w2h", given["x"]) + layer("v2h", given["img"]) + layer("h2h_0", given["h0"])).chunk(4, -1)
    look = layer("r_w2h", given["x"]) + layer("r_v2h", given["img"]) + layer("r_h2h", given["h0"])
    h, c, s = sentinel_cell(torch.cat([i, f, u, o, look], -1), given["c0"])
    for name, value in (("h", h), ("c", c), ("sentinel", s)):
        close(value.detach(), z[name])
    s2, hl = torch.relu(layer("fr_linear_0", s)), torch.tanh(layer("ho_linear_0", h))
    query, sentinel_key = layer("ho_embed", hl)[:, None], layer("fr_embed", s2)[:, None]
    keep = z["mask"].bool() if "mask" in z else None
    score = p["alpha_net_weight"].flatten()
    mixed, alpha = adaptive_attention(query, given["Ve"], sentinel_key, score, given["V"], s2[:, None], keep)
    close(alpha[:, 0].roll(1, -1).detach(), z["alphahat"])
    out = torch.tanh(layer("att2h", mixed[:, 0] + hl))
    close(out.detach(), z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), list(given.values()))
    for name, grad in zip(given, grads, strict=True):
        close(grad, z[f"grad_{name}"], name)


class Naive(nn.Module):
    """torch's LSTM cell, then the loops."""

    def __init__(self, layer: SentinelAttention, keep: Tensor | None = None) -> None:
        super().__init__()
        self.x_proj, self.h_proj, self.score, self.keep = layer.x_proj, layer.h_proj, layer.score, keep
        self.v_proj, self.q_proj, self.s_proj = layer.v_proj, layer.q_proj, layer.s_proj

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        M = context.shape[-1]
        h = m = torch.zeros(len(x), M, dtype=x.dtype)
        wx, wh, b = self.x_proj.weight, self.h_proj.weight, self.x_proj.bias
        x1 = torch.cat([x, torch.ones_like(x[..., :1])], -1)  # the sentinel gate's bias as a weight
        out = []
        for t in range(x.shape[1]):
            before = h
            gates = x[:, t] @ wx[: 4 * M].T + b[: 4 * M] + h @ wh[: 4 * M].T
            i, f, g, o = gates.chunk(4, -1)
            m = f.sigmoid() * m + i.sigmoid() * g.tanh()
            h = o.sigmoid() * m.tanh()
            s = naive_visual_sentinel(x1[:, t], before, m, torch.cat([wx[4 * M :], b[4 * M :, None]], 1), wh[4 * M :])
            weights = (self.v_proj.weight, self.q_proj.weight, self.s_proj.weight, self.score)
            out.append(naive_sentinel(context, h, s, *weights, self.keep)[0] + h)
        return torch.stack(out, 1)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 7), (3, 2)])
def test_equals_the_loops(T: int, S: int) -> None:
    layer = build(3, hidden=4, attention_dim=5)
    given = tokens(2, T, dim=3), tokens(2, S, dim=4, seed=8)
    close_all(run(layer, *given), run(Naive(layer), *given))


def test_the_lstm_is_torchs() -> None:
    layer, x = build(3, hidden=4), tokens(2, 5, dim=3)
    lstm = nn.LSTM(3, 4, batch_first=True).double()
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(layer.x_proj.weight[:16])
        lstm.weight_hh_l0.copy_(layer.h_proj.weight[:16])
        lstm.bias_ih_l0.copy_(layer.x_proj.bias[:16])
        lstm.bias_hh_l0.zero_()
    close(layer.remember(x, layer.start(x, tokens(2, 3, dim=4)))[0], lstm(x)[0])


def test_context_is_a_mix_of_sentinel_and_spatial_attention() -> None:
    """c = beta s + (1 - beta) c_spatial; a sentinel that always or never wins gives s, or spatial attention."""
    q, keys, v = tokens(2, 3, dim=4), tokens(2, 6, dim=4, seed=5), tokens(2, 6, dim=5, seed=6)
    sentinel, key, w = tokens(2, 3, dim=5, seed=7), tokens(2, 3, dim=4, seed=9), torch.ones(4, dtype=torch.float64)
    spatial = (torch.tanh(q[:, :, None] + keys[:, None]) @ w).softmax(-1) @ v
    c, alpha = adaptive_attention(q, keys, key, w, v, sentinel)
    beta = alpha[..., -1:]
    assert ((beta > 0) & (beta < 1)).all()
    close(c, beta * sentinel + (1 - beta) * spatial)
    close(adaptive_attention(q, keys, key + 1e3, w, v, sentinel, torch.zeros(2, 6, dtype=torch.bool))[0], sentinel)
    large = 60 * w
    close(adaptive_attention(q - q, keys - keys, key - key + 9, large, v, sentinel)[0], sentinel)
    close(
        adaptive_attention(q - q, keys - keys, key - key - 9, large, v, sentinel)[0],
        v.mean(1, keepdim=True).expand(-1, 3, -1),
    )


def test_steps_are_the_full_pass() -> None:
    layer, x, context = build(3, hidden=4), tokens(2, 7, dim=3), tokens(2, 9, dim=4, seed=8)
    want = layer(x, context)
    for cuts in ([1] * 7, [3, 0, 4], [7]):
        state, out = layer.start(x[:, :0], context), []
        for part in x.split(cuts, 1):
            before = state
            y, state = layer.step(part, state)
            same(layer.step(part, before)[0], y)  # the state is a value
            out.append(y)
        close(torch.cat(out, 1), want)


def test_padding_is_as_if_absent() -> None:
    layer, x, context = build(4), tokens(2, 3, dim=4), tokens(2, 6, dim=4, seed=8)
    padded = torch.cat([context, torch.full((2, 2, 4), torch.nan, dtype=torch.float64)], 1)
    keep = (torch.arange(8) < 6).expand(2, 8)
    for mask in (keep, keep[:, None, None], regard.masks.padding(keep)):
        got = run(layer, x, padded, mask=mask)
        assert not got["input1"][:, 6:].any()
        got["input1"] = got["input1"][:, :6]
        close_all(got, run(layer, x, context))
    some = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    close(layer(x, context, mask=some), Naive(layer, some)(x, context))
    close(layer.beta(x, context, mask=some & False), torch.ones(2, 3, dtype=torch.float64))


def test_nan_reaches_what_follows() -> None:
    layer, x, context = build(4), tokens(2, 4, dim=4), tokens(2, 6, dim=4, seed=8)
    x[0, 2, 0], context[1, 3, 0] = torch.nan, torch.inf
    assert layer(x, context).isnan().all(-1).tolist() == [[False, False, True, True], [True] * 4]


def test_learns_when_not_to_look() -> None:
    """Words of two kinds: one's target is the marked region's content, the other's is the word before. Only the first
    kind needs the image, and there beta is small."""
    torch.manual_seed(0)
    M, S, T = 16, 5, 6
    layer = SentinelAttention(M)
    readout = nn.Linear(M, 4)
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()], lr=1e-2)

    def batch(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        look = torch.rand(64, T, generator=g) < 0.5
        word, inside = torch.randint(4, (64, T), generator=g), torch.randint(4, (64, S), generator=g)
        where = torch.randint(S, (64, T), generator=g)
        x, regions = torch.zeros(64, T, M), torch.zeros(64, S, M)
        x[..., :4] = nn.functional.one_hot(word, 4)
        x[..., 4], x[..., 5:10] = look.float(), nn.functional.one_hot(where, S) * look[..., None]
        regions[..., :4] = 2.0 * nn.functional.one_hot(inside, 4)
        regions[..., 5:10] = 2.0 * torch.eye(S)
        return x, regions, torch.where(look, inside.gather(1, where), word), look

    for step in range(250):
        x, regions, target, _ = batch(step)
        loss = nn.functional.cross_entropy(readout(layer(x, regions)).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, regions, target, look = batch(10**6)
    with torch.no_grad():
        right = (readout(layer(x, regions)).argmax(-1) == target).float().mean()
        beta = layer.beta(x, regions)
    assert right > 0.9
    assert beta[~look].mean() > 0.5 > 0.05 > beta[look].mean()


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"attention_dim is too small \(got 0\); expected an int >= 1"):
        SentinelAttention(4, attention_dim=0)
    with pytest.raises(ValueError, match=r"context has .*\(got \(2, 5, 3\)\); expected \(B = 2, S, C = 4\)"):
        build(3, hidden=4)(tokens(2, 3, dim=3), tokens(2, 5, dim=3))
    with pytest.raises(ValueError, match="mask can only hide keys"):
        build(4)(tokens(2, 3, dim=4), tokens(2, 5, dim=4), mask=regard.masks.window(2))
    with pytest.raises(ValueError, match="causal"):
        regard.create("sentinel", dim=4, num_heads=2, causal=True)

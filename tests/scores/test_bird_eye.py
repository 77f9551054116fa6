"""Bird-eye attention against loops, whose author saw the equations alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.scores.bird_eye import BirdEye


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def _softmax(scores: list[Tensor], visible: list[bool]) -> list[Tensor]:
    seen = [s for s, v in zip(scores, visible, strict=True) if v]
    if not seen:
        return [s.new_zeros(()) for s in scores]
    top = max(float(s.detach()) for s in seen)
    total = sum(torch.exp(s - top) for s in seen)
    return [torch.exp(s - top) / total if v else s.new_zeros(()) for s, v in zip(scores, visible, strict=True)]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, U: Tensor, c: Tensor, allowed: Tensor, renormalise: bool
) -> Tensor:
    """Softmax, then each weight times its key's importance, then (or not) each row divided by its sum."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    out = torch.zeros(B, H, T, v.shape[3], dtype=q.dtype)
    for b, h, i in np.ndindex(B, H, T):
        g = h // (H // G)
        scores = [sum(q[b, h, i, d] * k[b, g, j, d] for d in range(D)) / math.sqrt(D) for j in range(S)]
        a = _softmax(scores, [bool(allowed[b, i, j]) for j in range(S)])
        row = []
        for j in range(S):
            inner = [sum(U[h, e, d] * k[b, g, j, d] for d in range(D)) + c[h, e] for e in range(w.shape[1])]
            u = sum(w[h, e] * torch.tanh(inner[e]) for e in range(w.shape[1]))
            row.append(a[j] * torch.sigmoid(u))
        total = sum(row)
        if renormalise and float(total.detach()) > 0:
            row = [cell / total for cell in row]
        out[b, h, i] = sum(row[j] * v[b, g, j] for j in range(S))
    return out


def built(seed: int, H: int, D: int, E: int, renormalise: bool) -> BirdEye:
    part = BirdEye(H, D, hidden=E, renormalise=renormalise).double()
    with torch.no_grad():
        for n, p in enumerate(part.parameters()):
            p.copy_(normal(100 * seed + n, *p.shape))
    return part


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_loops(seed: int, renormalise: bool) -> None:
    """Values and gradients; heads that share keys, rows that see nothing, other lengths of keys."""
    B, G, R, T, D = 1 + seed % 2, 1 + seed % 2, 1 + seed % 3, 2 + seed % 3, 1 + seed % 4
    S = T + seed % 2
    part = built(seed, G * R, D, 1 + seed % 3, renormalise)
    q, k, v = (normal(n, B, h, t, D).requires_grad_() for n, h, t in ((1, G * R, T), (2, G, S), (3, G, S)))
    allowed = torch.rand(B, T, S, generator=torch.Generator().manual_seed(seed)) < (1.1, 0.6)[seed % 2]
    want = oracle(q, k, v, part.outer, part.inner, part.shift, allowed, renormalise)
    slot, leaves = {"score_mix" if renormalise else "weight_mix": part}, [q, k, v, *part.parameters()]
    wanted = torch.autograd.grad((want * normal(4, *want.shape)).sum(), leaves)
    for kernel in ("auto", "eager", "chunked"):
        got = regard.attention(q, k, v, mask=allowed[:, None], kernel=kernel, **slot)
        close(got.detach(), want.detach())
        for ours, theirs in zip(torch.autograd.grad((got * normal(4, *want.shape)).sum(), leaves), wanted, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("renormalise", [True, False])
def test_streams_and_hides_padding(renormalise: bool) -> None:
    layer = regard.create("bird_eye", dim=8, num_heads=4, num_kv_heads=2, causal=True, renormalise=renormalise).double()
    part = layer.score_mix or layer.weight_mix
    torch.nn.init.normal_(part.outer)
    x, keep = normal(1, 2, 7, 8), torch.tensor([[True] * 7, [False, True, True, False, True, True, True]])
    want = layer(x, mask=masks.padding(keep))
    state, outs = layer.init_state(2, 7), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        y, state = layer.step(x[:, start:stop], state, mask=masks.padding(keep[:, :stop]))
        outs.append(y)
    close(torch.cat(outs, 1), want)
    hidden = layer(x.masked_fill(~keep[..., None], math.nan), mask=masks.padding(keep))
    assert torch.equal(hidden[keep], want[keep])
    close(want[1:, keep[1]], layer(x[1:, keep[1]]))


def test_starts_as_plain_attention() -> None:
    q, k, v = (normal(n, 1, 2, 5, 4) for n in range(3))
    part = BirdEye(2, 4).double()
    plain = regard.attention(q, k, v)
    close(regard.attention(q, k, v, score_mix=part).detach(), plain, 1e-14)
    halved = BirdEye(2, 4, renormalise=False).double()
    close(regard.attention(q, k, v, weight_mix=halved).detach(), plain / 2, 1e-14)
    assert part.outer.abs().max() == 0
    for p in (part.inner, part.shift):
        assert 0.3 < p.abs().max() <= 0.5
    torch.nn.init.normal_(part.outer)
    assert part.start_neutral()
    assert part.outer.abs().max() == 0
    assert not halved.start_neutral()
    assert part.inner.shape == (2, 16, 4)


def test_a_key_without_importance_is_gone_from_every_row() -> None:
    q, k, v = (normal(n, 1, 1, 6, 2) for n in range(3))
    k[0, 0, :, 0], k[0, 0, 2, 0] = 1.0, -1.0
    part = BirdEye(1, 2, hidden=1).double()
    with torch.no_grad():
        part.inner.copy_(torch.tensor([[[20.0, 0.0]]]))
        part.shift.zero_()
        part.outer.fill_(500.0)
    rest = [0, 1, 3, 4, 5]
    close(regard.attention(q, k, v, score_mix=part).detach(), regard.attention(q, k[:, :, rest], v[:, :, rest]), 1e-12)


def test_important_tokens_are_found_by_queries_unlike_them() -> None:
    """One token of twelve has a mark, and tells what all are asked; the others, which ask, are random to both sides."""

    def error(layer: torch.nn.Module) -> float:
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(layer.parameters(), 0.03)
        losses = []
        for _ in range(250):
            x = torch.randn(32, 12, 8, generator=generator)
            x[..., 0] = 0
            x[:, 0] = torch.cat([torch.full((32, 1), 3.0), x[:, 0, 1:3], torch.zeros(32, 5)], 1)
            loss = (layer(x)[:, 4:, 1:3] - x[:, :1, 1:3]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    torch.manual_seed(0)
    assert error(regard.create("bird_eye", dim=8, num_heads=1, causal=True)) < 0.15
    torch.manual_seed(0)
    assert error(regard.create("softmax", dim=8, num_heads=1, causal=True)) > 0.3


def test_refusals() -> None:
    z = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="D = 5"):
        regard.attention(z, z, z, score_mix=BirdEye(2, 5))
    with pytest.raises(ValueError, match="hidden is too small"):
        regard.create("bird_eye", dim=8, num_heads=2, hidden=0)
    with pytest.raises(TypeError, match="renormalise has the wrong type"):
        regard.create("bird_eye", dim=8, num_heads=2, renormalise=1)

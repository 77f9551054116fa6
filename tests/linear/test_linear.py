"""Katharopoulos' linear attention against its definition, pair by pair."""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close, same
from regard.laws.subject import of, tokens
from regard.linear import LinearAttention, linear_attention


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def by_pairs(q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None = None) -> Tensor:
    """Every weight by itself; query head h reads key head h // (H / G)."""
    (B, H, T, _), G, S = q.shape, k.shape[1], k.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                seen = [j for j in range(S) if (not causal or j <= i) and (keep is None or keep[b, j])]
                weights = {j: (phi(q[b, h, i]) * phi(k[b, g, j])).sum() for j in seen}
                mixed = sum((w * v[b, g, j] for j, w in weights.items()), torch.zeros(v.shape[3]).double())
                rows.append(mixed / sum(weights.values()) if seen else mixed)
    return torch.stack(rows).reshape(B, H, T, -1)


@pytest.mark.parametrize(
    ("causal", "sizes"), [(True, (2, 4, 2, 9, 9)), (False, (2, 4, 2, 5, 7)), (False, (1, 3, 3, 6, 1))]
)
@pytest.mark.parametrize("hidden", [False, True])
def test_equals_every_pair_alone(causal: bool, sizes: tuple[int, ...], hidden: bool) -> None:
    B, H, G, T, S = sizes
    given = normal(1, B, H, T, 3), normal(2, B, G, S, 3), normal(3, B, G, S, 5)
    keep = torch.rand(B, S, generator=torch.Generator().manual_seed(4)) < 0.6 if hidden else None
    got, want = linear_attention(*given, causal=causal, keep=keep).out, by_pairs(*given, causal, keep)
    close(got.detach(), want.detach())
    direction = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad((got * direction).sum(), given), torch.autograd.grad(want, given, direction)):
        close(g, w)


def test_it_is_the_recurrence_of_the_paper() -> None:
    q, k, v = (t.detach() for t in (normal(1, 1, 1, 6, 3), normal(2, 1, 1, 6, 3), normal(3, 1, 1, 6, 4)))
    S, z = torch.zeros(3, 4).double(), torch.zeros(3).double()
    for t in range(6):
        S, z = S + torch.outer(phi(k[0, 0, t]), v[0, 0, t]), z + phi(k[0, 0, t])
        out, state = linear_attention(q[:, :, : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], causal=True)
        close(out[0, 0, t], phi(q[0, 0, t]) @ S / (phi(q[0, 0, t]) @ z))
        close(state[0, 0], torch.cat([S, z[:, None]], 1))


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    module = of("linear").build(causal=True)
    _, one = module.step(tokens(2, 1), module.init_state(2, 1))
    _, many = module.step(tokens(2, 500), module.init_state(2, 1))
    assert [s[0].untyped_storage().nbytes() for s in (one, many)] == [8 * 2 * 6 * 4 * 5] * 2


def test_one_key_gives_its_value() -> None:
    v = normal(3, 2, 3, 1, 5).detach()
    out, _ = linear_attention(normal(1, 2, 3, 4, 2).detach(), normal(2, 2, 3, 1, 2).detach(), v)
    close(out, v.expand(-1, -1, 4, -1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="q has the wrong shape"):
        linear_attention(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="no multiple of the 2 key heads"):
        linear_attention(*(torch.zeros(1, h, 4, 4) for h in (3, 2, 2)))
    layer = LinearAttention(8, 2)
    with pytest.raises(ValueError, match="causal=True"):
        layer.init_state(1, 4)
    with pytest.raises(ValueError, match="causal=True"):
        layer.step(torch.zeros(1, 1, 8), None)
    layer = regard.create("linear", dim=8, num_heads=2, causal=True)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the LinearState"):
        layer.step(torch.zeros(1, 1, 8), None)
    with pytest.raises(ValueError, match=r"state has another batch than x \(got 2\); expected 3 sequences"):
        layer.step(torch.zeros(3, 1, 8), layer.init_state(2, 4))
    for batch, capacity, error in ((-1, 4, ValueError), (True, 4, TypeError), (2, 0, ValueError), (2, 1.5, TypeError)):
        with pytest.raises(error, match=r"(batch_size|capacity) .*; expected an int >= (0|1)"):
            layer.init_state(batch, capacity)
    state = layer.init_state(2, 4)
    y, same_state = layer.step(torch.zeros(2, 0, 8), state)
    assert y.shape == (2, 0, 8)
    same(same_state.sums, state.sums)

"""CoPE (2405.18719): positions counted by gates, as in the paper's listing (position logit not scaled)."""

import math

import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, rows, run
from regard import masks
from regard.positions import CoPE


def build(D, N):
    part = CoPE(D, max_positions=N).double()
    torch.nn.init.normal_(part.table)
    return part


def interpolated(c, table, b, h, t, j):
    """q . e[p] between the nearest whole positions; p = gates of j and later allowed keys, at most N - 1."""
    S, D, N = c.k.shape[2], c.q.shape[-1], len(table)
    p = 0.0
    for later in range(j, S):
        if c.allowed[b, h, t, later]:
            p += 1 / (1 + math.exp(-float(c.dot(b, h, t, later)) / math.sqrt(D)))
    p = min(p, N - 1)
    low, high = math.floor(p), math.ceil(p)
    at = [float(c.q[b, h, t] @ table[n]) for n in range(N)]
    return (p - low) * at[high] + (1 - (p - low)) * at[low]


@pytest.mark.parametrize("seed", CASES)
def test_matches_the_definition(seed):
    c = case(seed)
    D = c.q.shape[-1]
    part = build(D, 2 + seed % 5)
    table = part.table.detach()
    wanted = attention(c, lambda b, h, t, i, j: c.dot(b, h, t, j) / math.sqrt(D) + interpolated(c, table, b, h, t, j))
    check(c, part, wanted)


def test_counts_one_kind_of_token():
    """With gates that open for one kind of token and a table that reads off the position, the bias counts."""
    kinds = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    S, size = len(kinds), math.sqrt(20 * math.sqrt(2))
    k = torch.stack([size * (2.0 * kinds - 1), torch.zeros(S)], -1).double().expand(1, 1, S, 2)
    q = torch.tensor([size, 1.0]).double().expand(1, 1, S, 2)
    part = build(2, 64)
    with torch.no_grad():
        part.table.copy_(torch.stack([torch.zeros(64), torch.arange(64.0)], -1))
    allowed = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
    bias = part.bias(rows(q, k, allowed=allowed))[0, 0].detach()
    for i in range(S):
        for j in range(i + 1):
            assert abs(float(bias[i, j]) - int(kinds[j : i + 1].sum())) < 1e-3


def test_starts_without_positions():
    c = case(5)
    part = CoPE(c.q.shape[-1], max_positions=8).double()
    close(run(c, part), regard.attention(c.q, c.k, c.v, mask=c.allowed))


def test_hidden_keys_are_not_counted():
    """Keys that are masked, whatever their content, do not move the positions of the others."""
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
    part, keep = build(4, 8), torch.tensor([[True, True, False, True, False, True]])
    mask = masks.causal() & masks.padding(keep)
    changed = k.masked_fill(~keep[0, :, None], 50.0)
    out = regard.attention(q, k, v, mask=mask, position=part)
    assert torch.equal(out, regard.attention(q, changed, v, mask=mask, position=part))
    short = regard.attention(q[:, :, keep[0]], k[:, :, keep[0]], v[:, :, keep[0]], mask=masks.causal(), position=part)
    close(out[:, :, keep[0]], short)


def test_gradient():
    q, k, v = (torch.randn(1, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    part = build(2, 3)
    check = lambda q, k, v, _: regard.attention(q, k, v, mask=masks.causal(), position=part)  # noqa: E731
    assert torch.autograd.gradcheck(check, (q, k, v, part.table))


def test_refusals():
    z = torch.zeros(1, 1, 3, 2)
    with pytest.raises(
        ValueError, match=r"CoPE: q has the wrong shape \(got \(1, 1, 3, 2\)\); expected \(B, H, t, D = 4\)"
    ):
        CoPE(4).bias(rows(z, z))
    with pytest.raises(ValueError, match=r"CoPE: max_positions is too small \(got 1\); expected an int >= 2"):
        CoPE(4, max_positions=1)

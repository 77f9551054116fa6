"""Relative position representations (1803.02155): clipped relative embeddings added to keys and to values."""

import math

import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, rows, run, vectors
from regard import masks
from regard.positions import Shaw


def build(D, K, *, num_heads=None, value_dim=None):
    per_head = num_heads is not None
    part = Shaw(D, num_heads, max_distance=K, per_head=per_head, value_dim=value_dim).double()
    for p in part.parameters():
        torch.nn.init.normal_(p)
    return part


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("seed", CASES)
def test_matches_the_definition(seed, per_head):
    c = case(seed)
    H, D, V, K = c.q.shape[1], c.q.shape[-1], c.v.shape[-1], 1 + seed % 4
    part = build(D, K, num_heads=H if per_head else None, value_dim=V)
    keys, values = part.key_table.detach(), part.value_table.detach()

    def row(table, h, i, j):
        return (table[h] if per_head else table)[max(-K, min(K, j - i)) + K]

    wanted = attention(
        c,
        lambda b, h, t, i, j: (c.dot(b, h, t, j) + float(c.q[b, h, t] @ row(keys, h, i, j))) / math.sqrt(D),
        lambda h, i, j: row(values, h, i, j),
    )
    check(c, part, wanted)


@pytest.mark.parametrize("name", ["bidir", "causal", "memory", "decode"])
def test_tensor2tensor(name):
    z = {k: torch.tensor(v) for k, v in vectors("B013").items()}
    q, k, v = (z[f"{name}_{n}"].clone().requires_grad_() for n in "qkv")
    part = build(4, (len(z[f"{name}_rel_k"]) - 1) // 2)
    with torch.no_grad():
        part.key_table.copy_(z[f"{name}_rel_k"])
        part.value_table.copy_(z[f"{name}_rel_v"])
    bias = z.get(f"{name}_bias")
    mask = None if bias is None else (bias == 0).expand(2, 1, q.shape[2], k.shape[2])
    out = regard.attention(q, k, v, mask=mask, position=part)
    close(out, z[f"{name}_out"])
    (out * z[f"{name}_w"]).sum().backward()
    for n, got in zip(("q", "k", "v", "rel_k", "rel_v"), (q, k, v, part.key_table, part.value_table)):
        close(got.grad, z[f"{name}_grad_{n}"])


def test_zero_tables_are_plain_attention():
    c = case(4)
    part = Shaw(c.q.shape[-1], max_distance=3, value_dim=c.v.shape[-1]).double()
    assert (run(c, part) - regard.attention(c.q, c.k, c.v, mask=c.allowed)).abs().max() > 1e-3
    assert part.start_neutral()
    assert not any(p.any() for p in part.parameters())
    close(run(c, part), regard.attention(c.q, c.k, c.v, mask=c.allowed))


def test_beyond_the_clipping_distance_all_keys_look_the_same():
    q, k = torch.randn(1, 2, 9, 4, dtype=torch.float64), torch.zeros(1, 2, 9, 4, dtype=torch.float64)
    bias = build(4, 2).bias(rows(q, k))[0]
    assert torch.equal(bias[:, 8, :6], bias[:, 8, :1].expand(-1, 6))
    assert (bias[:, 8, 6] - bias[:, 8, 7]).abs().min() > 1e-3


def test_only_distances_matter():
    q, k = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    i, j, part = torch.arange(2, 5), torch.arange(5), build(4, 2)
    assert torch.equal(part.bias(rows(q, k, i=i, j=j)), part.bias(rows(q, k, i=i + 777, j=j + 777)))


def test_causal_layers_never_train_the_future():
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    part = build(4, 3)
    regard.attention(q, k, v, mask=masks.causal(), position=part).square().sum().backward()
    for table in (part.key_table, part.value_table):
        assert table.grad[4:].abs().max() == 0
        assert table.grad[:4].abs().min() > 0


def test_one_table_for_all_heads_or_one_each():
    shared, each = (regard.create("shaw", dim=12, num_heads=3, per_head=p).position for p in (False, True))
    assert shared.key_table.shape == shared.value_table.shape == (33, 4)
    assert each.key_table.shape == each.value_table.shape == (3, 33, 4)
    z = torch.zeros(1, 2, 5, 4)
    shared.bias(rows(z, z))
    with pytest.raises(
        ValueError, match=r"Shaw: q has the wrong shape \(got \(1, 2, 5, 4\)\); expected \(B, H = 3, t, D = 4"
    ):
        each.bias(rows(z, z))
    with pytest.raises(ValueError, match=r"Shaw: num_heads is missing \(got None\); expected"):
        Shaw(4, per_head=True)
    with pytest.raises(ValueError, match=r"Shaw: max_distance is too small \(got -1\); expected an int >= 0"):
        Shaw(4, max_distance=-1)

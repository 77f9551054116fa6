"""CoPE (2405.18719): positions counted by gates, as in the paper's listing (position logit not scaled), and B086."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, rows, run
from regard import masks
from regard.positions import CoPE
from regard.positions.cope import GatedCoPE

VECTORS = Path(__file__).parents[1] / "vectors" / "B086.npz"


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


@pytest.mark.parametrize("gates", ["own_keys", "values"])
@pytest.mark.parametrize("causal", [False, True])
def test_gates_of_other_vectors_match_the_definition(gates: str, causal: bool) -> None:
    """A whole layer, two queries a key head, by loops over its projections."""
    B, T, M, H, G, D, N = 2, 5, 8, 4, 2, 2, 3
    layer = regard.create("cope", dim=M, num_heads=H, num_kv_heads=G, causal=causal, gates=gates, max_positions=N)
    layer = layer.double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    x = torch.randn(B, T, M, dtype=torch.float64)
    gate = layer.v_proj if gates == "values" else layer.position.gate_proj
    q, k, v, c = (proj(x).unflatten(-1, (-1, D)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj, gate))
    table = layer.position.table
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                keys = range(i + 1 if causal else T)
                logits = []
                for j in keys:
                    gated = [
                        1 / (1 + math.exp(-float((q[b, i, h] @ c[b, n, g]).detach()) / math.sqrt(D)))
                        for n in keys
                        if n >= j
                    ]
                    p = min(sum(gated), N - 1)
                    low, high = math.floor(p), math.ceil(p)
                    row = (p - low) * table[high] + (1 - (p - low)) * table[low]
                    logits.append(q[b, i, h] @ k[b, j, g] / math.sqrt(D) + q[b, i, h] @ row)
                weights = torch.stack(logits).softmax(0)
                out[b, i, h] = sum(w * v[b, j, g] for w, j in zip(weights, keys, strict=True))
    close(layer(x), layer.o_proj(out.flatten(2)))


@pytest.mark.parametrize("case", ["repo", "nodiv", "sep", "val"])
def test_authors_numbers(case: str) -> None:
    """Their attention layer with values and all gradients; nodiv and val hide a key from all other tokens."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    D, N = z["P_attn.pos_emb"].shape[1:]
    gates = {"sep": "own_keys", "val": "values"}.get(case, "keys")
    layer = regard.create("cope", dim=6, num_heads=6 // D, bias=True, gates=gates, max_positions=N).double()
    names = {f"{n}_proj": f"proj_{word}" for n, word in zip("qkvo", ("query", "key", "val", "out"), strict=True)}
    if case == "sep":
        names["position.gate_proj"] = "proj_key_cope"
    divided = 1 if case != "repo" else D**0.5  # by which their default divides the position's term

    def ours(letter: str) -> dict[str, torch.Tensor]:
        pairs = {f"{a}.{kind}": f"{letter}_{b}.{kind}" for a, b in names.items() for kind in ("weight", "bias")}
        table = z[f"{letter}_attn.pos_emb"][0].T
        table = table / divided if letter == "P" else table * divided
        return {**{a: z[b] for a, b in pairs.items()}, "position.table": table}

    layer.load_state_dict(ours("P"))
    x = z["x"].requires_grad_()
    y = layer(x, mask=z["allowed"][None, None])
    close(y, z["out"])
    own = dict(layer.named_parameters())
    grads = torch.autograd.grad((y * z["w"]).sum(), [x, *own.values()])
    close(grads[0], z["gx"])
    for name, grad in zip(own, grads[1:], strict=True):
        close(grad, ours("G")[name])


@pytest.mark.parametrize("gates", ["own_keys", "values"])
def test_gates_stream(gates: str) -> None:
    layer = regard.create("cope", dim=8, num_heads=4, num_kv_heads=2, causal=True, gates=gates, max_positions=3)
    layer = layer.double()
    torch.nn.init.normal_(layer.position.table)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    state, outs = layer.init_state(2, 6), []
    for piece in x.split([2, 1, 3], 1):
        y, state = layer.step(piece, state)
        outs.append(y)
    close(torch.cat(outs, 1), layer(x))


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
    with pytest.raises(
        ValueError, match=r"cope: gates is unknown \(got 'queries'\); expected one of 'keys', 'own_keys'"
    ):
        regard.create("cope", dim=8, num_heads=2, gates="queries")
    z = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"GatedCoPE.*tokens"):
        regard.attention(z, z, z, position=GatedCoPE(4))

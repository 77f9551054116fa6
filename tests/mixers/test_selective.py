"""Selective attention against loops over every entry, written from the equations alone, and x-transformers' numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.mixers.selective import selective_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B071.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None = None,
    queries: Tensor | None = None,
    budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """F (B, T, S), weights (B, H, T, S) and outputs; `keys`: real keys, `queries`: those whose selections count."""
    (B, H, T, D), S = q.shape, k.shape[2]
    keys = torch.ones(B, S, dtype=torch.bool) if keys is None else keys
    queries = torch.ones(B, T, dtype=torch.bool) if queries is None else queries
    F, weights = torch.zeros(B, T, S, dtype=q.dtype), torch.zeros(B, H, T, S, dtype=q.dtype)
    for b in range(B):
        real = [s for s in range(S) if keys[b, s]]
        bos = real[0] if real else -1
        held: list[int] = []
        for t in range(T):
            for s in range(S):
                for u in range(t):
                    seen = s <= u and bool(keys[b, s]) and bool(queries[b, u])
                    if seen and s not in (bos, u):
                        F[b, t, s] += max(0.0, float(q[b, 0, u] @ k[b, 0, s]) / math.sqrt(D))
            held += [t] if keys[b, t] else []
            if budget is not None and len(held) > budget:
                held.remove(max((s for s in held if s != bos), key=lambda s: float(F[b, t, s])))
            for h in range(H):
                logit = {s: float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D) - float(F[b, t, s]) for s in held}
                if logit:
                    top = max(logit.values())
                    total = sum(math.exp(z - top) for z in logit.values())
                    for s, z in logit.items():
                        weights[b, h, t, s] = math.exp(z - top) / total
    return F, weights, torch.einsum("bhts,bhsv->bhtv", weights, v)


@pytest.mark.parametrize("case", ["c1_", "c2_"])
def test_gives_the_numbers_of_x_transformers(case: str) -> None:
    z = vectors(case)
    keys = z.get("keymask")
    F, weights, out = oracle(z["q"], z["k"], z["v"], keys)
    for got, name in ((F, "F"), (weights, "weights"), (out, "out")):
        close(got, z[name])
    q, k, v = (z[n].clone().requires_grad_() for n in "qkv")
    # There, the queries of padded tokens select too.
    out, selected = selective_attention(q, k, v, keys, selects=None if keys is None else torch.ones_like(keys))
    close(out.detach(), z["out"])
    (out * z["w"]).sum().backward()
    for tensor, name in ((q, "q"), (k, "k"), (v, "v")):
        close(tensor.grad, z["grad_" + name])
    more = torch.cat([F, (F[:, -1:] + selection(z["q"], z["k"], keys)[:, -1:])], 1)
    close(selected.detach(), more[:, -1])


def selection(q: Tensor, k: Tensor, keys: Tensor | None) -> Tensor:
    """S (B, T, S), where all queries select."""
    (B, _, T, D), S = q.shape, k.shape[2]
    out = torch.zeros(B, T, S, dtype=q.dtype)
    for b, t, s in np.ndindex(B, T, S):
        first = 0 if keys is None else int(keys[b].int().argmax())
        if s < t and s != first and (keys is None or keys[b, s]):
            out[b, t, s] = max(0.0, float(q[b, 0, t] @ k[b, 0, s]) / math.sqrt(D))
    return out


def random_keys(seed: int, B: int, T: int) -> Tensor | None:
    keys = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.7
    return None if seed % 3 == 0 else keys


@pytest.mark.parametrize("budget", [None, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_equals_the_formula(seed: int, budget: int | None) -> None:
    B, H, T, D = 1 + seed % 2, 1 + seed % 3, 1 + seed, 2 + seed % 2
    q, k, v = (1.5 * normal(seed + n, B, H, T, D) for n in (0, 20, 40))
    keys = random_keys(seed, B, T)
    want = oracle(q, k, v, keys, keys, budget)[2]
    close(selective_attention(q, k, v, keys, budget=budget)[0], want)
    close(selective_attention(q, k, v, keys, budget=budget, rows=3)[0], want)


def layer(**options: object) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    made = regard.create("selective", dim=12, num_heads=4, num_kv_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(30 + n, *p.shape))
    return made, {n: p.detach() for n, p in made.named_parameters()}


def layer_oracle(p: dict[str, Tensor], x: Tensor, keep: Tensor | None, budget: int | None) -> Tensor:
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, 3)).transpose(1, 2) for n in "qkv")
    out = oracle(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), keep, keep, budget)[2]
    return out.transpose(1, 2).flatten(2) @ p["o_proj.weight"].T


@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_and_its_steps_equal_the_formula(budget: int | None, padded: bool) -> None:
    made, p = layer(budget=budget)
    x = normal(1, 3, 9, 12)
    keep = torch.ones(3, 9, dtype=torch.bool)
    if padded:
        keep[0, :3] = keep[1, 6:] = keep[2, 4] = False
    want = layer_oracle(p, x, keep, budget)
    close(made(x, mask=masks.padding(keep) if padded else None).detach(), want)
    for sizes in ((1,) * 9, (4, 0, 2, 3)):
        state, outs, at = made.init_state(3, 9), [], 0
        for t in sizes:
            out, state = made.step(x[:, at : at + t], state, mask=keep[:, at : at + t] if padded else None)
            outs, at = [*outs, out.detach()], at + t
            assert budget is None or state.k.shape[2] <= budget
        close(torch.cat(outs, 1)[keep], want[keep])


def test_what_one_query_selects_loses_weight_for_later_ones_alone() -> None:
    """Head 0 of query 2 selects key 1: its odds against key 0 fall by exp(-S) for later queries, in every head."""
    made = regard.create("selective", dim=8, num_heads=2, causal=True).double()
    with torch.no_grad():
        for p in (made.q_proj.weight, made.k_proj.weight):
            p.zero_()[0, 0] = 1.0  # head 0 compares the first features, head 1 nothing
        made.v_proj.weight.zero_()[[0, 1, 4, 5], [4, 5, 4, 5]] = 1.0
        made.o_proj.weight.copy_(torch.eye(8))
    x = torch.zeros(1, 5, 8, dtype=torch.float64)
    x[0, 1, 0] = x[0, 2, 0] = 3.0
    x[0, 0, 4] = x[0, 1, 5] = 1.0  # in each head's outputs: the weights of keys 0 and 1
    out = made(x)[0].detach()
    odds = torch.stack([out[:, 1] / out[:, 0], out[:, 5] / out[:, 4]])
    close(odds[:, 2], torch.tensor([math.exp(9 / 2), 1.0], dtype=torch.float64))
    close(odds[:, 3:], torch.full((2, 2), math.exp(-9 / 2), dtype=torch.float64))
    assert sum(p.numel() for p in made.parameters()) == 4 * 8 * 8, "no parameters of its own"


@pytest.mark.parametrize("padded", [False, True])
def test_memory_loss_equals_the_formula(padded: bool) -> None:
    made, p = layer(auxiliary_weight=0.1, tau=30.0)
    x = normal(2, 2, 7, 12)
    keep = torch.ones(2, 7, dtype=torch.bool)
    if padded:
        keep[0, 5:] = keep[1, 2] = False
    q, k = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, 3)).transpose(1, 2) for n in "qk")
    F = oracle(q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1), keep, keep)[0]
    most = []
    for b in range(2):
        held = [
            sum(1 - min(float(F[b, t, s]), 30.0) / 30 for s in range(t) if keep[b, s]) for t in range(7) if keep[b, t]
        ]
        most.append(max(held) / int(keep[b].sum()))
    got = made.memory_loss(x, mask=masks.padding(keep) if padded else None)
    assert float(got.detach()) == pytest.approx(sum(most) / 2, rel=1e-12)
    got.backward()
    assert made.q_proj.weight.grad[:3].abs().sum() > 0


def test_without_keys_nothing_comes_out() -> None:
    q = normal(0, 1, 2, 3, 4)
    out, _ = selective_attention(q, q, q, torch.zeros(1, 3, dtype=torch.bool))
    assert not out.any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"budget": 0}, "budget"), ({"auxiliary_weight": -1.0}, "auxiliary_weight"), ({"tau": 0.0}, "tau")],
)
def test_refuses(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regard.create("selective", dim=8, num_heads=2, causal=True, **wrong)

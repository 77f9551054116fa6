"""Knocking-heads attention against loops over heads and tokens; the paper's three claims in small."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.heads import KnockingHeads


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def filled(seed: int, head_dim: int, form: str) -> KnockingHeads:
    """A part with random parameters (it starts as the identity)."""
    part = KnockingHeads(head_dim, form=form).double()
    with torch.no_grad():
        for n, parameter in enumerate(part.parameters()):
            parameter.copy_(normal(100 * seed + n, *parameter.shape))
    return part


def times(row: Tensor, matrix: Tensor) -> Tensor:
    """row vector times matrix, by its definition."""
    return torch.stack(
        [sum(row[a] * matrix[a, b] for a in range(len(row))) for b in range(matrix.shape[1])]  # type: ignore[misc]
    )


def each_row(z: Tensor, change) -> Tensor:
    """`change` applied to every head and token of z (B, heads, T, D) by itself."""
    rows = [[[change(row) for row in head] for head in sample] for sample in z]
    return torch.stack([torch.stack([torch.stack(head) for head in sample]) for sample in rows])


def heads_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    B, G, R, T, S, D = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 4, 5, 5, 6))
    return normal(seed, B, G * R, T, D), normal(seed + 1, B, G, S, D), normal(seed + 2, B, G, S, D)


@pytest.mark.parametrize("seed", range(12))
def test_linear_equals_the_formula(seed: int) -> None:
    q, k, v = heads_of(seed)
    part = filled(seed, q.shape[-1], "linear")
    got = part(q, k, v)
    for z, matrix, result in zip((q, k, v), (part.q_map, part.k_map, part.v_map), got, strict=True):
        close(result, each_row(z, lambda row, matrix=matrix: times(row, matrix)))


@pytest.mark.parametrize("seed", range(12))
def test_mlp_equals_the_formula(seed: int) -> None:
    q, k, v = heads_of(seed)
    part = filled(seed, q.shape[-1], "mlp")

    def change(row: Tensor) -> Tensor:
        gate = times(row, part.v_gate.detach())
        up = times(row, part.v_up)
        hidden = torch.stack([u / (1 + math.exp(-float(g))) for u, g in zip(up, gate, strict=True)])
        return 2 * times(hidden, part.v_down)

    got_q, got_k, got_v = part(q, k, v)
    close(got_v, each_row(v, change))
    assert torch.equal(got_q, q)
    assert torch.equal(got_k, k)


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_starts_as_plain_attention_and_leaves_it(form: str) -> None:
    q, k, v = heads_of(3)
    part = KnockingHeads(q.shape[-1], form=form).double()
    for before, after in zip((q, k, v), part(q, k, v), strict=True):
        close(after, before, 1e-14)
    assert sum(p.numel() for p in part.parameters()) == 3 * q.shape[-1] ** 2
    off_diagonal = filled(3, q.shape[-1], form)(q, k, v)[2]
    assert (off_diagonal - v).abs().max() > 0.1


def test_linear_can_be_folded_into_the_projections() -> None:
    M, H, G, D, T = 7, 4, 2, 3, 5
    x = normal(0, 2, T, M)
    projections = [normal(n, M, heads * D) for n, heads in ((1, H), (2, G), (3, G))]
    part = filled(4, D, "linear")

    def split(z: Tensor) -> Tensor:
        return z.unflatten(-1, (-1, D)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        return (q @ k.transpose(-1, -2) / math.sqrt(D)).softmax(-1) @ v

    knocked = attend(*part(*(split(x @ w) for w in projections)))
    folded = [
        torch.cat([w[:, n : n + D] @ matrix for n in range(0, w.shape[1], D)], dim=1)
        for w, matrix in zip(projections, (part.q_map, part.k_map, part.v_map), strict=True)
    ]
    close(knocked, attend(*(split(x @ w) for w in folded)))


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_heads_share_their_maps(form: str) -> None:
    q, k, v = (normal(n, 2, 4, 5, 3) for n in range(3))
    part = filled(6, 3, form)
    order = torch.tensor([2, 0, 3, 1])
    for whole, permuted in zip(part(q, k, v), part(q[:, order], k[:, order], v[:, order]), strict=True):
        close(permuted, whole[:, order], 1e-14)


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_gradcheck(form: str) -> None:
    part = filled(7, 3, form)
    inputs = tuple(normal(n, 1, 2, 2, 3).requires_grad_() for n in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: sum(z.sin().sum() for z in part(q, k, v)), inputs)


def test_refuses_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="form"):
        KnockingHeads(4, form="gate")


@pytest.mark.parametrize("name", ["knocking_heads", "knocking_heads_linear"])
def test_the_layer_knocks_before_the_scores(name: str) -> None:
    M, H, G, D = 12, 4, 2, 3
    layer = regard.create(name, dim=M, num_heads=H, num_kv_heads=G, causal=True).double()
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(50 + n, *parameter.shape))
    p = {key: value.detach() for key, value in layer.state_dict().items()}
    x = normal(1, 2, 5, M)
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    if name == "knocking_heads_linear":
        q, k, v = q @ p["heads.q_map"], k @ p["heads.k_map"], v @ p["heads.v_map"]
    else:
        v = 2 * (v @ p["heads.v_up"] * torch.sigmoid(v @ p["heads.v_gate"])) @ p["heads.v_down"]
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    close(layer(x).detach(), (weights @ v).transpose(1, 2).flatten(2) @ p["o_proj.weight"].T)

"""Gated attention against loops over every feature, and the authors' numbers (A034)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.heads import SigmoidGate

VECTORS = Path(__file__).parents[1] / "vectors" / "A034.npz"
SITES = ("output", "query", "key", "value", "dense")


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def filled(seed: int, *sizes: int, **options) -> SigmoidGate:
    gate = SigmoidGate(*sizes, **options).double()
    with torch.no_grad():
        for n, parameter in enumerate(gate.parameters()):
            parameter.copy_(normal(100 * seed + n, *parameter.shape))
    return gate


def oracle(
    z: Tensor, x: Tensor, weight: Tensor, granularity: str, shared: bool, combine: str, activation: str
) -> Tensor:
    """z (B, heads, T, D), x (B, T, M); which row of `weight` gates feature d of head h, and how."""
    out = torch.zeros_like(z)
    for b, h, t, d in np.ndindex(*z.shape):
        row = (0 if shared else h) * (z.shape[3] if granularity == "elementwise" else 1)
        row += d if granularity == "elementwise" else 0
        logit = sum(float(x[b, t, m] * weight[row, m]) for m in range(x.shape[2]))
        gate = 1 / (1 + math.exp(-logit))
        gate = gate * logit if activation == "silu" else gate
        out[b, h, t, d] = z[b, h, t, d] * gate if combine == "multiply" else z[b, h, t, d] + gate
    return out


@pytest.mark.parametrize("site", SITES[:4])
@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("combine", "activation"), [("multiply", "sigmoid"), ("add", "silu")])
def test_equals_the_formula(site, granularity: str, shared: bool, combine: str, activation: str) -> None:
    seed = len(site) + 10 * shared
    B, T, M, H, G, D = 2, 3, 5, 4, 2, 3
    options = {"granularity": granularity, "shared": shared, "combine": combine, "activation": activation}
    gate = filled(seed, M, H, head_dim=D, num_kv_heads=G, site=site, **options)
    z, x = normal(seed, B, G if site in ("key", "value") else H, T, D), normal(seed + 1, B, T, M)
    close(gate(z, x, site).detach(), oracle(z, x, gate.proj.weight.detach(), **options))
    for other in set(SITES) - {site}:
        assert gate(z, x, other) is z


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_dense_gate_works_on_merged_heads(combine: str, activation: str) -> None:
    x, y = normal(1, 2, 3, 6), normal(2, 2, 3, 6)
    gate = filled(3, 6, 2, site="dense", combine=combine, activation=activation)
    want = oracle(y[:, None], x, gate.proj.weight.detach(), "elementwise", False, combine, activation)[:, 0]
    close(gate(y, x, "dense").detach(), want)


def norm(z: Tensor, weight: Tensor) -> Tensor:
    return z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def turn(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary with given tables (B, T, D) on z (B, heads, T, D), half-split."""
    half = z.shape[-1] // 2
    return z * cos[:, None] + torch.cat((-z[..., half:], z[..., :half]), -1) * sin[:, None]


@pytest.mark.parametrize(("case", "H", "G"), [("head_", 6, 3), ("elem_", 4, 2)])
def test_gives_the_authors_numbers(case: str, H: int, G: int) -> None:
    """Around the gate the authors' layer is written out: grouped heads, norms, rotary, masked softmax."""
    z = vectors(case)
    x, fused = z["x"].clone().requires_grad_(), z["Wq_and_gate"].clone().requires_grad_()
    D, R = z["cos"].shape[-1], H // G
    # In every group of heads the queries' rows come first and the gates' rows after them.
    grouped = fused.unflatten(0, (G, -1))
    wq, wg = grouped[:, : R * D].flatten(0, 1), grouped[:, R * D :].flatten(0, 1)
    biases = z.get("bq_and_gate")
    has_bias = biases is not None
    gate = SigmoidGate(
        x.shape[-1],
        H,
        head_dim=D,
        granularity="headwise" if case == "head_" else "elementwise",
        bias=has_bias,
    ).double()
    assert gate.proj.weight.shape == wg.shape
    overrides = {"proj.weight": wg}
    q = x @ wq.T
    if has_bias:
        split = biases.unflatten(0, (G, -1))
        overrides["proj.bias"] = split[:, R * D :].flatten()
        q = q + split[:, : R * D].flatten()
    k, v = (x @ z["W" + n].T + z.get("b" + n, 0) for n in "kv")
    q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in (q, k, v))
    if case == "head_":
        q, k = norm(q, z["q_norm"]), norm(k, z["k_norm"])
    q, k = turn(q, z["cos"], z["sin"]), turn(k, z["cos"], z["sin"])
    k, v = k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(D)).masked_fill(~z["mask"][:, None], -math.inf)
    weights = scores.softmax(-1)
    close(weights.detach(), z["weights"])
    gated = torch.func.functional_call(gate, overrides, (weights @ v, x, "output"))
    out = gated.transpose(1, 2).flatten(2) @ z["Wo"].T + z.get("bo", 0)
    (out * z["w"]).sum().backward()
    close(out.detach(), z["out"])
    close(x.grad, z["grad_x"])
    close(fused.grad, z["grad_Wq_and_gate"])
    # The oracle agrees with the authors' gate, too.
    if not has_bias:
        close(
            oracle((weights @ v).detach(), z["x"], wg.detach(), "headwise", False, "multiply", "sigmoid"),
            gated.detach(),
        )


def test_a_head_can_do_nothing_without_a_sink() -> None:
    gate = SigmoidGate(4, 2, head_dim=3, granularity="headwise").double()
    with torch.no_grad():
        gate.proj.weight.zero_()
        gate.proj.weight[1] = -50.0
    z, x = normal(0, 1, 2, 5, 3), torch.ones(1, 5, 4, dtype=torch.float64)
    out = gate(z, x, "output")
    close(out[:, 0].detach(), z[:, 0] / 2)
    assert out[:, 1].abs().max() < 1e-60


def test_gradcheck() -> None:
    gate = filled(5, 4, 2, head_dim=3)
    inputs = normal(0, 1, 2, 3, 3).requires_grad_(), normal(1, 1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, x: gate(z, x, "output"), inputs)


@pytest.mark.parametrize(
    ("option", "value"),
    [("site", "keys"), ("granularity", "head"), ("combine", "times"), ("activation", "relu")],
)
def test_refuses_unknown_options(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=option):
        SigmoidGate(8, 2, **{option: value})


@pytest.mark.parametrize(("name", "site"), [*(("gated", site) for site in SITES), ("gated_headwise", "output")])
def test_the_layer_gates_at_the_place_of_that_name(name: str, site: str) -> None:
    """Queries, keys and values before the scores, output before heads merge, dense after o_proj."""
    options = {} if name == "gated_headwise" else {"site": site}
    M, H, G, D = 12, 4, 2, 3
    layer = regard.create(name, dim=M, num_heads=H, num_kv_heads=G, causal=True, **options).double()
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(50 + n, *parameter.shape))
    p = {key: value.detach() for key, value in layer.state_dict().items()}
    x = normal(1, 2, 5, M)
    granularity = "headwise" if name == "gated_headwise" else "elementwise"

    def gated(z: Tensor, at: str) -> Tensor:
        if at != site:
            return z
        return oracle(z, x, p["gate.proj.weight"], granularity, False, "multiply", "sigmoid")

    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    q, k, v = gated(q, "query"), gated(k, "key"), gated(v, "value")
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    weights = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    out = gated(weights @ v, "output").transpose(1, 2).flatten(2) @ p["o_proj.weight"].T
    close(layer(x).detach(), gated(out[:, None], "dense")[:, 0])

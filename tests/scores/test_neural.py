"""Neural attention against loops over every pair, written from the equations alone, and the authors' numbers (B031)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.scores.neural import NeuralScore, pair_scores

VECTORS = Path(__file__).parents[1] / "vectors" / "B031.npz"
NAMES = {
    "q_down.weight": "q_proj.weight",
    "q_down.bias": "q_proj.bias",
    "k_down.weight": "k_proj.weight",
    "k_down.bias": "k_proj.bias",
    "first.weight": "linear1.weight",
    "first.bias": "linear1.bias",
    "second.weight": "linear2.weight",
    "second.bias": "linear2.bias",
    "third": "linear3.weight",
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def oracle(q: Tensor, k: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Scores (B, H, T, S) of queries (B, H, T, D) and keys (B, H, S, D), pair by pair."""
    (B, H, T, _), S = q.shape, k.shape[2]
    out = torch.zeros(B, H, T, S, dtype=torch.float64)
    for b, h, t, s in np.ndindex(B, H, T, S):
        low = [p["q_down.weight"] @ q[b, h, t] + p["q_down.bias"], p["k_down.weight"] @ k[b, h, s] + p["k_down.bias"]]
        one = (p["first.weight"] @ torch.cat(low) + p["first.bias"]).clamp(min=0)
        two = (p["second.weight"] @ one + p["second.bias"]).clamp(min=0)
        out[b, h, t, s] = (p["third"] @ two).sum()
    return out


def randomised(part: nn.Module, seed: int = 30) -> dict[str, Tensor]:
    with torch.no_grad():
        for n, p in enumerate(part.parameters()):
            p.copy_(normal(seed + n, *p.shape))
    return {name: p.detach() for name, p in part.named_parameters()}


def theirs(z: dict[str, Tensor], letter: str, H: int) -> dict[str, Tensor]:
    """Their parameters, or gradients, by the names of ours; channels of their first product come as (d, qkv, h)."""
    qkv = z[f"{letter}_to_qkv.weight"].unflatten(0, (-1, 3, H))
    found = {f"{n}_proj.weight": qkv[:, at].transpose(0, 1).flatten(0, 1) for at, n in enumerate("qkv")}
    found["o_proj.weight"] = z[f"{letter}_W_out.weight"]
    return found | {f"score.{ours}": z[f"{letter}_{name}"] for ours, name in NAMES.items()}


@pytest.mark.parametrize("case", ["causal", "masked", "deep"])
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    D, P = z["P_q_proj.weight"].shape[::-1][0], z["P_q_proj.weight"].shape[0]
    M = z["x"].shape[2]
    layer = regard.create("neural", dim=M, num_heads=M // D, causal="blocked" not in z, width=P).double()
    layer.load_state_dict(theirs(z, "P", M // D))
    x = z["x"].clone().requires_grad_()
    out = layer(x, mask=~z["blocked"] if "blocked" in z else None)
    (out * z["w"]).sum().backward()
    close(out.detach(), z["out"])
    close(x.grad, z["grad_x"])
    for name, gradient in theirs(z, "G", M // D).items():
        close(layer.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed: int) -> None:
    B, G, R, T, D, P = 1 + seed % 2, 1 + seed % 2, 1 + seed % 3, 1 + seed % 5, 1 + seed % 4, 2 + seed % 4
    S = T + seed % 3
    part = NeuralScore(D, width=P).double()
    p = randomised(part, seed)
    q, k, v = normal(seed, B, G * R, T, D), normal(seed + 1, B, G, S, D), normal(seed + 2, B, G, S, 3)
    allowed = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(seed)) < (1.1, 0.6)[seed % 2]
    scores = oracle(q, k.repeat_interleave(R, 1), p).masked_fill(~allowed, -math.inf)
    want = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(R, 1)
    for kernel in ("auto", "eager", "chunked"):
        close(regard.attention(q, k, v, mask=allowed, score=part, kernel=kernel).detach(), want)


def test_pieces_of_rows_give_the_same_with_the_same_gradients() -> None:
    part = NeuralScore(3, width=4).double()
    randomised(part)
    grads, outs = [], []
    for rows in (100, 3, 1):
        q, k = normal(1, 2, 4, 7, 4).requires_grad_(), normal(2, 2, 2, 9, 4).requires_grad_()
        out = pair_scores(q, k, part.second.weight, part.second.bias, part.third, rows=rows)
        grads.append(torch.autograd.grad((out * normal(3, *out.shape)).sum(), [q, k, *part.second.parameters()]))
        outs.append(out.detach())
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        close(out, outs[0])
        for got, want in zip(grad, grads[0], strict=True):
            close(got, want)


def test_never_holds_the_hidden_layer_of_all_pairs() -> None:
    """Of T x S pairs with 64 hidden numbers each, no tensor that is kept for backward has them all."""
    T, P, largest = 512, 64, 0

    def keep(t: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    part = NeuralScore(4, width=P)
    q = torch.randn(1, 2, T, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        regard.attention(q, q, q, score=part, kernel="eager").sum().backward()
    assert T * T < largest < 2 * T * T * P / 4


def test_fits_a_distance_that_no_product_of_as_many_numbers_does() -> None:
    """Which of two places holds the nearer key: 1 - 6 |q - k|, fitted to scores of attention itself."""
    torch.manual_seed(0)
    q, k = (torch.rand(1, 1, 64, 2) * 2 - 1 for _ in range(2))
    target = (-6 * (q[..., 0][..., None] - k[..., 0][..., None, :]).abs()).softmax(-1)

    def error(layer: nn.Module) -> float:
        weights = [torch.randn(2, 2, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam([*layer.parameters(), *weights], 0.02)
        for _ in range(300):
            eye = torch.eye(64)[None, None]
            got = regard.attention(q @ weights[0], k @ weights[1], eye, **slots(layer), kernel="eager")
            loss = (got - target).abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    made = regard.create("neural", dim=2, num_heads=1, width=8)
    assert error(made) < 0.3
    assert error(regard.create("softmax", dim=2, num_heads=1)) > 0.6


def slots(layer: nn.Module) -> dict[str, nn.Module | None]:
    return {"score": layer.score}


@pytest.mark.parametrize("width", [0, 1])
def test_refuses_a_width_without_a_second_layer(width: int) -> None:
    with pytest.raises(ValueError, match="width"):
        NeuralScore(8, width=width)

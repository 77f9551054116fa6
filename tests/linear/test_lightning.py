"""Lightning attention against loops, the authors' numbers, and transformers' MiniMax layer (B070)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_lightning import naive_layer_factor, naive_lightning, naive_lrpe, naive_simple_rms_norm, naive_slopes
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear import LightningAttention, lightning_attention
from regard.linear.lightning import lrpe

VECTORS = Path(__file__).parents[1] / "vectors" / "B070.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def within(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


@pytest.mark.parametrize("sizes", [(2, 3, 11, 4, 5), (1, 4, 17, 2, 3), (2, 1, 1, 3, 3)])
@pytest.mark.parametrize("strength", [1e-6, 0.3, 20.0])
def test_core_equals_the_loops(sizes: tuple[int, ...], strength: float) -> None:
    B, H, T, D, V = sizes
    given = normal(1, B, H, T, D), normal(2, B, H, T, D), normal(3, B, H, T, V)
    rates = strength * torch.rand(H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got, want = lightning_attention(*given, rates).out, naive_lightning(*given, rates)
    close(got.detach(), want.detach())
    direction = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad((got * direction).sum(), given), torch.autograd.grad(want, given, direction)):
        close(g, w)


def test_core_gives_the_authors_numbers() -> None:
    """Their reference rounds scores to float32."""
    z = vectors("a_")
    given = [z[n].clone().requires_grad_() for n in "qkv"]
    out, _ = lightning_attention(*given, z["slopes"].flatten())
    within(out.detach(), z["y"], 2e-6)
    for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv"):
        within(g, z["g" + n], 4e-6)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12])
def test_rates_are_the_slopes_times_the_layers_factor(heads: int) -> None:
    published = vectors("slopes_")
    for layer in (0, 1, 4):
        module = LightningAttention(2 * heads, heads, depth=layer / 4)
        want = torch.tensor(naive_slopes(heads), dtype=torch.float64) * naive_layer_factor(layer, 5)
        close(torch.tensor(module.rates, dtype=torch.float64), want)
    if f"H{heads}" in published:
        within(torch.tensor(naive_slopes(heads)), published[f"H{heads}"].float(), 1e-6)


def test_released_layer() -> None:
    """The whole layer with weights copied: rotations, decay, norm over all heads, gate, left padding."""
    z = vectors("d_")
    H, D, M = z["theta"].shape[0], z["theta"].shape[2], z["x"].shape[2]
    module = LightningAttention(M, H).double()
    with torch.no_grad():
        module.theta.copy_(z["theta"])
        for p, weight in zip(("q", "k", "v", "gate"), z["Wqkvu"].split(H * D)):
            getattr(module, f"{p}_proj").weight.copy_(weight)
        module.o_proj.weight.copy_(z["Wo"])
    module.rates = tuple(z["slopes"].double().flatten().tolist())
    x = z["x"].clone().requires_grad_()
    out = module(x, mask=z["keep"].bool())
    within(out.detach(), z["y"], 2e-6)
    gx, gtheta = torch.autograd.grad((out * z["w"]).sum(), [x, module.theta])
    within(gx, z["gx"], 5e-6)
    within(gtheta, z["gtheta"], 5e-6)


def test_transformers_minimax_layer() -> None:
    """Their layer around our core: silu on q, k and v, an affine norm, a sigmoid gate; and their state."""
    z = vectors("c_")
    H, D = z["slopes"].shape[0], z["state7"].shape[-1]
    x = z["x"].clone().requires_grad_()
    q, k, v = F.silu(x @ z["Wqkv"].T).unflatten(-1, (H, 3 * D)).transpose(1, 2).chunk(3, -1)
    rates = z["slopes"].flatten().double()
    out, state = lightning_attention(q, k, v, rates)
    out = out.transpose(1, 2).flatten(2)
    out = z["norm_w"] * naive_simple_rms_norm(out, float(z["eps"])) * torch.sigmoid(x @ z["Wgate"].T)
    y = out @ z["Wo"].T
    within(y.detach(), z["y"], 2e-6)
    within(torch.autograd.grad((y * z["w"]).sum(), x)[0], z["gx"], 4e-6)
    within(state.detach(), z["state9"], 2e-6)
    within(lightning_attention(q[:, :, :7], k[:, :, :7], v[:, :, :7], rates).state.detach(), z["state7"], 2e-6)


def test_layer_equals_the_loops() -> None:
    module, x = of("lightning").build(), tokens(1, 7)
    got = module(x)

    def heads(z: Tensor) -> Tensor:
        return z.unflatten(-1, (6, 4)).transpose(1, 2)

    q, k = (naive_lrpe(heads(F.silu(p(x))), module.theta) for p in (module.q_proj, module.k_proj))
    out = naive_lightning(q, k, heads(module.v_proj(x)), torch.tensor(module.rates, dtype=torch.float64))
    out = naive_simple_rms_norm(out.transpose(1, 2).flatten(2), 1e-6) * module.gate_proj(x)
    close(got, module.o_proj(out))


def test_rotated_products_depend_on_distance_only() -> None:
    q, k, theta = normal(1, 1, 2, 6, 3), normal(2, 1, 2, 6, 3), normal(3, 2, 1, 3)
    close((lrpe(q, theta) @ lrpe(k, theta).mT).detach(), (lrpe(q, theta, 900) @ lrpe(k, theta, 900).mT).detach())
    angle = theta[0, 0] * 3
    want = (q[0, 0, 5] * k[0, 0, 2] * angle.cos()).sum()
    close((lrpe(q, theta) @ lrpe(k, theta).mT)[0, 0, 5, 2].detach(), want.detach())


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    """As many bytes after 10 tokens as after 1000."""
    module = of("lightning").build()
    states = [module.step(tokens(1, n), module.init_state(1, 1))[1] for n in (10, 1000)]
    assert [s[0].untyped_storage().nbytes() for s in states] == [8 * 6 * 8 * 4] * 2
    assert [s.length for s in states] == [10, 1000]


@pytest.mark.parametrize("gate", ["identity", "silu", "sigmoid"])
@pytest.mark.parametrize("position", ["lrpe", "none"])
def test_options_change_something(gate: str, position: str) -> None:
    plain, x = of("lightning").build(), tokens()
    module = of("lightning").build(gate=gate, position=position)
    assert (module.theta is None) == (position == "none")
    if position == "lrpe":
        assert torch.equal(module(x), plain(x)) == (gate == "identity")


def test_refusals() -> None:
    for option, value in (
        ("depth", 1.5),
        ("depth", float("nan")),
        ("eps", -1.0),
        ("position", "rope"),
        ("gate", "swish"),
    ):
        with pytest.raises(ValueError, match=option):
            LightningAttention(8, 2, **{option: value})
    with pytest.raises(ValueError, match="bidirectional"):
        regard.create("lightning", dim=8, num_heads=2)
    with pytest.raises(ValueError, match=r"q has the wrong shape \(got \(2, 3, 4\)\); expected \(B, H, T, K\)"):
        lightning_attention(*(torch.zeros(2, 3, 4) for _ in "qkv"), torch.ones(3))
    with pytest.raises(ValueError, match=r"rates has the wrong shape \(got \(2,\)\); expected \(H = 3\)"):
        lightning_attention(*(torch.zeros(1, 3, 4, 2) for _ in "qkv"), torch.ones(2))

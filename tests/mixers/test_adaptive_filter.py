"""Adaptive filter attention against loops (naive_adaptive_filter.py), whose author has read neither code nor test, and
the author's numbers (A137)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import largest
from mixers.naive_adaptive_filter import adaptive_filter as naive
from mixers.naive_adaptive_filter import variance
from regard import masks
from regard.laws.agreement import close
from regard.mixers import adaptive_filter
from regard.mixers.linear_system import propagated_variance
from regard.positions.rotary import rotate

VECTORS = Path(__file__).parents[1] / "vectors" / "A137.npz"
NAMES = {
    "system.decay_logit": "mu_v",
    "system.rotation": "lambda_imag_v",
    "system.process": "sigma_v",
    "system.key_noise": "eta_v",
    "system.query_noise": "gamma_v",
    "system.nu": "nu_sqrt",
    "system.tau": "tau",
}
"""Ours, theirs."""
PLAIN: dict[str, Any] = {"decay": False, "residual_metric": False, "robust": False, "additive": None}
PLAIN |= {"multiplicative": None, "inner_residual": None}
CASES: dict[str, dict[str, Any]] = {
    "full": {"num_heads": 2, "predict_next": True},
    "plain": {"num_heads": 2, "norm": True, "inner_residual": None},
    "linear": {
        "num_heads": 1,
        "robust": False,
        "additive": "linear",
        "multiplicative": "linear",
        "inner_residual": "add",
    },
    "dot": {"num_heads": 3, **PLAIN},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(layer: nn.Module) -> Tensor:
    """Where our features, head by head, stand among theirs, all real parts first."""
    return torch.arange(layer.num_heads * layer.head_dim).view(2, layer.num_heads, -1).transpose(0, 1).flatten()


def theirs(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters by their names and in their order; for the loops, of what is left out any."""
    back = order(layer).argsort()
    found = {other: torch.zeros(layer.num_heads, dtype=torch.float64) for other in NAMES.values()}
    for name, p in (*layer.named_parameters(), *layer.named_buffers()):
        if name in NAMES:
            found[NAMES[name]] = p
        elif name.endswith("_scale"):
            found[f"cn_{name[0]}.gamma"] = p
        elif "_proj" in name:
            own = f"W_{name[0]}.{name.partition('.')[2]}"
            found[own] = p if own == "W_o.bias" else p[:, back] if own == "W_o.weight" else p[back]
    return found


def made(**options: Any) -> nn.Module:
    return regard.create(
        "adaptive_filter", **{"dim": 6, "num_heads": 2, "head_dim": 8, "causal": True, **options}
    ).double()


def filled(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(40 + n, *p.shape))
    return layer


@pytest.mark.parametrize("case", CASES)
def test_gives_the_authors_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {n.removeprefix(case + "_"): torch.from_numpy(np.array(file[n])) for n in file if n.startswith(case + "_")}
    width = z["p_W_q.weight"].shape[0] // CASES[case]["num_heads"]
    layer = made(dim=z["x"].shape[2], head_dim=width, horizon=z["x"].shape[1], **CASES[case])
    if layer.gate is not None:
        layer.gate.data.copy_(z["gate_logit"])
    load(layer, {n.removeprefix("p_"): v for n, v in z.items() if n.startswith("p_")})
    x = z["x"].clone().requires_grad_()
    out = layer(x)
    close(out.detach(), z["out"], "out")
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"], "gradient of x")
    grads = {n: p.grad for n, p in layer.named_parameters()}
    for name, other in NAMES.items():
        if f"g_{other}" in z and name in grads:
            close(grads[name], z[f"g_{other}"], f"gradient of {name}")
    close(grads["k_proj.weight"], z["g_W_k.weight"][order(layer)], "gradient of k_proj.weight")
    assert {n for n in z if n.startswith("g_")} <= {f"g_{n}" for n in (*NAMES.values(), "W_k.weight")}


def load(layer: nn.Module, given: dict[str, Tensor]) -> None:
    at = order(layer)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name in NAMES:
                p.copy_(given[NAMES[name]])
            elif name.endswith("_scale"):
                p.copy_(given[f"cn_{name[0]}.gamma"].reshape(p.shape))
            elif "_proj" in name:
                own = given[f"W_{name[0]}.{name.partition('.')[2]}"]
                p.copy_(own if name == "o_proj.bias" else own[:, at] if name == "o_proj.weight" else own[at])


def loops(layer: nn.Module, x: Tensor, **more: Any) -> Tensor:
    return naive(x, theirs(layer), layer.num_heads, layer.system.horizon, gate=layer.gate, causal=layer.causal, **more)[
        0
    ]


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "both directions": {"causal": False, "predict_next": True, "horizon": 9},
    "Gaussian": {"robust": False, "inner_residual": "add", "horizon": 20},
    "linear bias": {"additive": "linear", "inner_residual": None, "eps": 0.2},
    "linear share": {"multiplicative": "linear", "predict_next": True, "horizon": 5},
    "no biases": {"additive": None, "multiplicative": None},
    "no decay": {"decay": False, "predict_next": True, "inner_residual": "add"},
    "product alone": {"residual_metric": False, "robust": False, "causal": False},
    "norm": {"norm": True, "horizon": 7},
    "fixed rotation": {"learn_rotation": False, "horizon": 10},
}
ASKED = ("residual_metric", "robust", "additive", "multiplicative", "decay", "inner_residual", "predict_next", "eps")
IRREGULAR = torch.tensor([[0.0, 0.5, 2.0, 2.25, 6.0]], dtype=torch.float64)


@pytest.mark.parametrize("times", [None, IRREGULAR])
@pytest.mark.parametrize("way", WAYS)
def test_is_the_definition(way: str, times: Tensor | None) -> None:
    layer, x = filled(made(**WAYS[way])), normal(1, 2, 5, 6).requires_grad_()
    more = {"inner_residual": "gate"} | {n: v for n, v in WAYS[way].items() if n in ASKED}
    got = layer(x, times=times)
    want = loops(layer, x, times=None if times is None else times[0].tolist(), **more)
    close(got, want, "out")
    of = [x, *(p for p in layer.parameters())]
    g = normal(2, *got.shape)
    both = [torch.autograd.grad((z * g).sum(), of, allow_unused=True) for z in (got, want)]
    for mine, other, p in zip(*both, of, strict=True):
        close(mine, torch.zeros_like(p) if other is None else other, "gradient")


def test_values_may_stay_as_they_are() -> None:
    """Then weights, decays and values alone make the outputs."""
    layer, x = filled(made(rotate_values=False, inner_residual=None, num_heads=1)), normal(1, 1, 5, 6)
    _, weights = naive(x, theirs(layer), 1, layer.system.horizon)
    mu = (torch.sigmoid(layer.system.decay_logit) - 1) * 5 / layer.system.horizon - 1e-5
    left = torch.exp(mu * (torch.arange(5)[:, None] - torch.arange(5)).abs())
    close(layer(x), layer.o_proj((weights[:, 0] * left) @ layer.v_proj(x)))


def split(layer: nn.Module, pair: int, **options: Any) -> nn.Module:
    """An isotropic layer with one head of the system of this pair of features, and the same projections."""
    one = made(num_heads=1, inner_residual=None, **options)
    with torch.no_grad():
        for name, p in one.named_parameters():
            other = layer.get_parameter(name)
            per_pair = name.startswith("system.") and other.dim() == 2 and p.dim() == 1
            p.copy_(other[:, pair] if per_pair else other)
    return one


def test_features_of_their_own_have_weights_of_their_own() -> None:
    """Without a residual (no queries and keys) each pair of features is filtered as if all were like it."""
    layer, x = made(isotropic=False, num_heads=1, inner_residual=None), normal(1, 2, 5, 6)
    filled(layer)
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj):
            proj.weight.zero_()
            proj.bias.zero_()
        layer.o_proj.weight.copy_(torch.eye(8)[:6])  # the last two are real parts of the second pair's imaginary ones
    got = layer(x)
    alone = [loops(split(layer, pair), x) for pair in (0, 1)]
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    close(got[..., [0, 1, 4, 5]], alone[0][..., [0, 1, 4, 5]], "the first pair")
    close(got[..., [2, 3]], alone[1][..., [2, 3]], "the second pair")


def test_residuals_of_features_of_their_own_add_up() -> None:
    """Gaussian weights are products over pairs of features; which the loops tell with one pair of queries and keys."""
    options: dict[str, Any] = {"robust": False, "additive": None, "rotate_values": False}
    layer, x = filled(made(isotropic=False, num_heads=1, inner_residual=None, **options)), normal(1, 2, 5, 6)
    logs = []
    for pair in (0, 1):
        one = split(layer, pair, **options)
        others = torch.tensor([2, 3, 6, 7] if pair == 0 else [0, 1, 4, 5])
        with torch.no_grad():
            for proj in (one.q_proj, one.k_proj):
                proj.weight[others] = 0
                proj.bias[others] = 0
        logs.append(naive(x, theirs(one), 1, one.system.horizon, robust=False, additive=None)[1][:, 0].log())
    weights = (logs[0] + logs[1]).softmax(-1)
    far = (torch.arange(5)[:, None] - torch.arange(5)).abs()
    v, outs = layer.v_proj(x), []
    for feature in range(8):
        m = layer.system.decay_logit[0, feature % 4 // 2]
        left = torch.exp(((torch.sigmoid(m) - 1) * 5 / layer.system.horizon - 1e-5) * far)
        outs.append(((weights * left) @ v[..., feature : feature + 1])[..., 0])
    close(layer(x), layer.o_proj(torch.stack(outs, -1)))


OWN = {"default": {}, "bidirectional": {"causal": False}, "linear": {"additive": "linear", "multiplicative": "linear"}}
OWN |= {"Gaussian": {"robust": False, "predict_next": True}, "product": {"robust": False, "residual_metric": False}}


@pytest.mark.parametrize("way", OWN)
def test_features_that_are_alike_are_isotropic(way: str) -> None:
    """The system of each feature the same: the form with weights for each gives what the isotropic one does."""
    one, x = filled(made(**OWN[way])), normal(1, 2, 6, 6).requires_grad_()
    each = made(isotropic=False, **OWN[way])
    with torch.no_grad():
        for name, p in each.named_parameters():
            other = one.get_parameter(name)
            p.copy_(other[:, None].expand_as(p) if p.dim() > other.dim() else other)
    got, want = each(x, mask=torch.ones(2, 6).bool()), one(x)
    close(got, want, "out")
    g = normal(2, *got.shape)
    close(*(torch.autograd.grad((z * g).sum(), x)[0] for z in (got, want)), "gradient")


@pytest.mark.parametrize("isotropic", [True, False])
def test_steps_padding_and_chunks_change_nothing(isotropic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled(made(isotropic=isotropic, norm=True, predict_next=True, num_kv_heads=1))
    x, keep = normal(1, 2, 40, 6), torch.ones(2, 40, dtype=torch.bool)
    keep[0, :3] = keep[1, 4] = False
    want = layer(x, mask=masks.padding(keep))
    state, outs = layer.init_state(2, 40), []
    for some, kept in zip(x.split((1, 4, 0, 35), 1), keep.split((1, 4, 0, 35), 1), strict=True):
        out, state = layer.step(some, state, mask=kept)
        outs.append(out)
    close(torch.cat(outs, 1)[keep], want[keep], "steps")
    changed = layer(x.masked_fill(~keep[..., None], math.nan), mask=masks.padding(keep))
    close(changed[keep], want[keep], "hidden tokens")
    monkeypatch.setattr(adaptive_filter, "TILE_BYTES", 0)  # 16 rows a chunk, the least
    close(layer(x, mask=masks.padding(keep)), want, "chunks")
    most = 16 * 40 * 2 * 2 * (1 if isotropic else 2 * 4)
    assert largest(lambda: layer(x)) <= max(most, 2 * 40 * 2 * 8)


def test_without_dynamics_it_is_rotary_attention() -> None:
    """No decay, biases and norms: softmax attention with rotary positions, counted backwards, and scale 2 tau^2 / D."""
    layer, x = filled(made(**PLAIN, rotate_values=False, horizon=11)), normal(1, 2, 6, 6)
    q, k, v = layer.split(x, x)
    with torch.no_grad():
        layer.system.tau.fill_(0.8)
    omega = torch.stack([layer.system.rotation, -layer.system.rotation], -1).flatten(1) * 10 * math.pi / 11
    angle = torch.arange(6)[None, None, :, None] * omega[None, :, None]
    q, k = rotate(q, -angle), rotate(k, -angle)
    want = regard.attention(q, k, v, mask=masks.causal(), scale=2 * 0.64 / 4)
    close(layer(x), layer.merge(want))


def test_variance_is_its_closed_form() -> None:
    d, few = torch.tensor([0.0, 1.0, 7.5, 100.0], dtype=torch.float64), torch.tensor([0.3, 0.2, 0.1]).double()
    for mu in (-0.5, -0.02, -1e-4, -1e-7, 0.0):
        own = torch.tensor(mu, dtype=torch.float64)
        close(propagated_variance(d, own, *few), torch.stack([variance(own, float(z), *few) for z in d]))
    steps, mu = torch.linspace(0, 3, 30001, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    grown = torch.trapezoid((2 * mu * steps).exp(), steps)  # the integral that the Lyapunov equation solves
    got = propagated_variance(steps[-1], mu, few[0], few[1], few[2])
    assert float(got) == pytest.approx(float(few[0] * grown + few[1] * math.exp(-2.4) + few[2]), rel=1e-7)


def inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


def test_filters_a_noisy_oscillation() -> None:
    """The last of 60 states of a damped oscillation, from measurements with noise; and with one of them far off."""
    n, trials, D, mu, omega, sigma, eta = 60, 100, 8, -0.02, 0.3, 0.03, 0.4
    layer = made(dim=2 * D, num_heads=1, head_dim=2 * D, horizon=n, inner_residual=None)
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            nn.init.eye_(proj.weight)
        layer.system.decay_logit.fill_(math.log((1 + (mu + 1e-5) * n / 5) / (-(mu + 1e-5) * n / 5)))
        layer.system.rotation.fill_(omega * n / (10 * math.pi))
        layer.system.process.fill_(inverse_softplus(sigma**2))
        layer.system.key_noise.fill_(inverse_softplus(eta**2 - 1e-5))
        layer.system.query_noise.fill_(inverse_softplus(eta**2 - 1e-5))
        layer.system.nu.fill_(inverse_softplus(1 - 1e-5))

    def noise(seed: int, *shape: int) -> Tensor:
        return torch.view_as_complex(normal(seed, *shape, 2)) / math.sqrt(2)

    turns = torch.exp(mu + 1j * omega * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(D // 2))
    spread = sigma * math.sqrt((1 - math.exp(2 * mu)) / (-2 * mu))
    state, drawn = noise(1, trials, D), noise(2, n, trials, D)
    states = [state := turns * state + spread * w for w in drawn]
    true = torch.stack(states, 1)
    seen = true + eta * noise(3, trials, n, D)
    off = seen.clone()
    off[:, -5] += 6

    def error(z: Tensor) -> float:
        out = torch.complex(*layer(torch.cat([z.real, z.imag], -1)).detach()[:, -1].chunk(2, -1))
        return float((out - true[:, -1]).abs().square().mean())

    assert float((seen - true)[:, -1].abs().square().mean()) > 0.13
    assert error(seen) < 0.02
    assert error(off) < 0.02


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("adaptive_filter", dim=256, num_heads=32, head_dim=16)
    z = torch.view_as_complex(layer.q_proj.weight.detach().unflatten(0, (32, 2, 8)).movedim(1, -1).contiguous())
    assert float(z.abs().square().mean()) == pytest.approx(2 / 512, rel=0.05)
    assert float((z / z.abs()).mean().abs()) < 0.02, "phases are even"
    assert not layer.q_proj.bias.any()
    assert not layer.o_proj.bias.any()
    assert not layer.gate.any()
    for name in ("decay_logit", "process", "key_noise", "query_noise", "rotation"):
        drawn = layer.system.get_parameter(name).detach()
        assert 0.6 < float(drawn.std()) < 1.4, name
    assert layer.system.nu.eq(1).all()
    assert layer.system.tau.eq(1).all()
    fixed = regard.create("adaptive_filter", dim=16, num_heads=1, learn_rotation=False).system.rotation
    close(fixed.double(), torch.tensor([[1.0, 0.1, 0.01, 0.001]]).double().float().double())
    bare = made(**PLAIN)
    assert {n for n, _ in bare.system.named_parameters()} == {"tau", "rotation"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"head_dim": 6}, "head_dim holds no such pairs"),
        ({"residual_metric": False}, "robust takes a logarithm"),
        ({"additive": "none"}, "additive"),
        ({"multiplicative": 1}, "multiplicative"),
        ({"inner_residual": "sum"}, "inner_residual"),
        ({"horizon": 0}, "horizon"),
        ({"eps": 0.0}, "eps"),
        ({"isotropic": 1}, "isotropic"),
        ({"norm": None}, "norm"),
    ],
)
def test_refuses(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        made(**wrong)


def test_refuses_times_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="times has the wrong shape"):
        made()(normal(1, 2, 5, 6), times=torch.zeros(5))
    with pytest.raises(ValueError, match="context"):
        made()(normal(1, 2, 5, 6), normal(1, 2, 5, 6), times=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="can only hide keys"):
        made()(normal(1, 2, 5, 6), times=torch.zeros(1, 5), mask=masks.packed(torch.tensor([0, 2, 5])))

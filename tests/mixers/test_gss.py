"""The gated state space layer against its recurrence in loops, and a public implementation's numbers (A179)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixers.naive_gss import naive_gss
from regard.laws.agreement import close
from regard.mixers.gss import GatedStateSpace, GSSState, diagonal_state_space

VECTORS = Path(__file__).parents[1] / "vectors" / "A179.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, dim: int = 4, **options) -> GatedStateSpace:
    layer = GatedStateSpace(dim, **{"hidden_dim": 6, "state_dim": 3, "num_states": 5, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: GatedStateSpace, x: Tensor) -> Tensor:
    p = dict(layer.named_parameters())
    names = ("norm.weight", "norm.bias", "u_proj.weight", "v_proj.weight", "state_norm.weight", "state_norm.bias")
    rest = ("skip", "gate_proj.weight", "o_proj.weight", "o_proj.bias")
    states = (p["a"], p["b"], *p["c"].unbind(-1))
    return naive_gss(x, *(p[n] for n in names), *states, *(p[n] for n in rest), exp_imag=layer.positive_turns)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_equals_the_loops(T: int, positive: bool) -> None:
    layer, x = filled(T, positive_turns=positive), normal(T, 2, T, 4).requires_grad_()
    direction = normal(5, 2, T, 4)
    got, want = layer(x), naive(layer, x)
    close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


@pytest.mark.parametrize("case", ["c1", "c2", "c3"])
def test_gives_the_public_numbers(case: str) -> None:
    """c2 has free frequencies; c3 was run on the reversed sequence."""
    z = vectors(case)
    E, N = z["P_dss.C_real"].shape
    hidden = z["P_to_gate.weight"].shape[0]
    options = {"hidden_dim": hidden, "state_dim": E, "num_states": N, "positive_turns": case != "c2"}
    layer = GatedStateSpace(z["x"].shape[-1], **options).double()
    names = {
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        "u_proj.weight": "to_u.0.weight",
        "v_proj.weight": "to_v.0.weight",
        "state_norm.weight": "dss.norm.weight",
        "state_norm.bias": "dss.norm.bias",
        "a": "dss.Lambda_real",
        "b": "dss.Lambda_imag",
        "skip": "dss.param_D",
        "gate_proj.weight": "to_gate.weight",
        "o_proj.weight": "to_out.weight",
        "o_proj.bias": "to_out.bias",
    }
    state = {own: z["P_" + theirs] for own, theirs in names.items()}
    layer.load_state_dict({**state, "c": torch.stack([z["P_dss.C_real"], z["P_dss.C_imag"]], -1)})
    x = z["x"].requires_grad_()
    y = layer(x.flip(1)).flip(1) if case == "c3" else layer(x)
    close(y.detach(), z["out"])
    close(torch.autograd.grad((y * z["w"]).sum(), x)[0], z["gx"])


def test_slow_and_still_states_keep_their_digits() -> None:
    """lambda near 0: (exp(lambda) - 1) / lambda tends to 1, so that y is the plain sum of the past."""
    w = normal(1, 1, 5, 1)
    tiny = torch.tensor([1e-13], dtype=torch.float64)
    one = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    y, _ = diagonal_state_space(w, -tiny, tiny, one)
    close(y, w.cumsum(1))


def test_a_layer_runs_on_any_length_in_one_state() -> None:
    """On four times the length it says the same of the first part, and its state has not grown."""
    layer = filled(3)
    x = normal(4, 2, 400, 4)
    whole = layer(x).detach()
    close(layer(x[:, :100]).detach(), whole[:, :100])
    state, outs = layer.init_state(2, 1), []
    for piece in x.split([1, 99, 300], 1):
        y, state = layer.step(piece, state)
        assert state.h.shape == (2, 3, 5)
        outs.append(y)
    close(torch.cat(outs, 1).detach(), whole)


def test_bad_input() -> None:
    layer = filled(1)
    with pytest.raises(ValueError, match=r"num_states is too small \(got 0\)"):
        filled(1, num_states=0)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 5\)\); expected \(B, T, M = 4\)"):
        layer(normal(1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 3\); expected 2"):
        layer.step(normal(1, 3, 1, 4), layer.init_state(2, 9))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the GSSState"):
        layer.step(normal(1, 3, 1, 4), None)
    assert isinstance(layer.init_state(2, 9), GSSState)

"""Kimi delta attention against loops (naive_delta.py, written from the equations before the code was, by the same
author) and numbers of the authors' functions. The layer of transformers is compared in tests/integrations."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_delta import naive_layer
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear.deltanet import delta_rule
from regard.linear.kda import KimiDeltaAttention

VECTORS = Path(__file__).parents[1] / "vectors" / "kda_naive.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_authors_numbers() -> None:
    """Two value heads to a key head, a state before the first token, and gradients."""
    with np.load(VECTORS) as file:
        z = {name.removeprefix("k_"): torch.from_numpy(file[name]) for name in file}
    names = ("q", "k", "v", "beta", "log_decay")
    given = {n: z[n].clone().requires_grad_() for n in names}
    found = delta_rule(*(given[n].transpose(1, 2) for n in names), state=z["state0"])
    out = found.out.transpose(1, 2)
    close(out.detach(), z["out"])
    close(found.state.detach(), z["state"])
    checked = [n for n in names if f"g{n}" in z]
    assert len(checked) == 4
    for n, g in zip(checked, torch.autograd.grad((out * z["w"]).sum(), [given[n] for n in checked]), strict=True):
        close(g, z[f"g{n}"])


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_heads": 3},
        {"negative_eigenvalues": True, "rank": 2, "eps": 0.1},
        {"num_key_heads": 2, "conv_size": 0, "head_dim": 3, "value_head_dim": 5},
    ],
    ids=str,
)
def test_layer_equals_the_loops(options: dict) -> None:
    module, x = of("kda").build(**options), tokens(2, 7)
    D, V = options.get("head_dim", 4), options.get("value_head_dim", 4)
    R = options.get("rank", V)
    w = {n: getattr(module, f"{n}_proj").weight for n in "qkvo"} | {"b": module.rate_proj.weight}
    w |= {f"{n}_taps": getattr(module, f"{n}_taps") for n in "qkv"} | {"norm": module.norm_weight}
    assert module.decay_proj[0].weight.shape == module.gate_proj[0].weight.shape == (R, 24)
    got = module(x)
    for b in range(2):
        g = F.softplus(x[b] @ module.decay_proj[0].weight.T @ module.decay_proj[1].weight.T + module.decay_bias)
        g = -module.log_decay_scale.exp()[:, None] * g.unflatten(-1, (6, D))
        gate = torch.sigmoid(x[b] @ module.gate_proj[0].weight.T @ module.gate_proj[1].weight.T).unflatten(-1, (6, V))
        sizes = {"key_heads": options.get("num_key_heads", 6), "heads": 6, "eps": options.get("eps", 1e-5)}
        rate = 2.0 if "negative_eigenvalues" in options else 1.0
        close(got[b].detach(), naive_layer(x[b], w, decay=g, rate=rate, gate=gate, **sizes).detach())


def test_each_feature_forgets_by_itself() -> None:
    """What stands under feature 0 is forgotten, what stands under 1 is kept; equal rates are the gated delta rule, and
    where keys do not overlap with what is there, so that errors are values, it is gated linear attention."""
    eye = torch.eye(3, dtype=torch.float64)[None, None]
    v, ones = normal(1, 1, 1, 3, 2), torch.ones(1, 1, 3, dtype=torch.float64)
    decay = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    decay[..., 2, 0] = -torch.inf
    state = delta_rule(eye, eye, v, ones, decay).state[0, 0]
    close(state, torch.cat([torch.zeros(1, 2, dtype=torch.float64), v[0, 0, 1:]]))
    g = -normal(2, 1, 1, 3, 3).abs()
    close(delta_rule(eye, eye, v, ones, g).state, linear_scan(eye, eye, v, g).state)
    k, one = F.normalize(normal(3, 1, 1, 3, 3), dim=-1), g[..., :1]
    per_feature = delta_rule(k, k, v, ones, one.expand(-1, -1, -1, 3))
    close(per_feature.out, delta_rule(k, k, v, ones, one[..., 0]).out)


def test_where_nothing_is_written_it_only_forgets() -> None:
    k, v, g, state = normal(1, 1, 2, 5, 3), normal(2, 1, 2, 5, 4), -normal(3, 1, 2, 5, 3).abs(), normal(4, 1, 2, 3, 4)
    found = delta_rule(k, k, v, torch.zeros(1, 2, 5, dtype=torch.float64), g, state=state)
    close(found.state, g.sum(2)[..., None].exp() * state)


def test_three_such_layers_to_one_of_full_attention() -> None:
    """The host of the paper: full attention with latent keys and values in every fourth layer."""
    from regard.models.mixer import layers

    made = layers("kda*3+mla", dim=24, num_heads=6, depth=8, causal=True)
    assert [isinstance(layer, KimiDeltaAttention) for layer in made] == [True, True, True, False] * 2


def test_starting_values() -> None:
    torch.manual_seed(0)
    module = regard.create("kda", dim=512, num_heads=128, causal=True)
    scale, step = module.log_decay_scale.exp(), F.softplus(module.decay_bias)
    assert 1 <= scale.min() < 1.6
    assert 15 < scale.max() <= 16
    assert 0.00099 < step.min() < 0.0012
    assert 0.085 < step.max() < 0.1001
    assert not [name for name, _ in module.named_parameters() if name.endswith("proj.bias")]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="KimiDeltaAttention: num_heads is no multiple of num_key_heads = 3"):
        KimiDeltaAttention(8, 4, num_key_heads=3)
    for option in ("value_head_dim", "num_key_heads", "head_dim", "rank"):
        with pytest.raises(ValueError, match=f"KimiDeltaAttention: {option} is too small"):
            KimiDeltaAttention(8, 4, **{option: 0})

"""Gated DeltaNet against loops (naive_delta.py, written from the equations before the code was, by the same author).

Layers of transformers with their weights copied are compared in tests/integrations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_delta import naive_layer
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear.deltanet import delta_rule
from regard.linear.gated_deltanet import GatedDeltaNet


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_heads": 3},
        {"negative_eigenvalues": True, "eps": 0.1},
        {"num_key_heads": 2, "conv_size": 0, "head_dim": 3, "value_head_dim": 5},
        {"gate": False, "conv_size": 2},
    ],
    ids=str,
)
def test_layer_equals_the_loops(options: dict) -> None:
    module, x = of("gated_deltanet").build(**options), tokens(2, 7)
    D, V = options.get("head_dim", 4), options.get("value_head_dim", 4)
    w = {n: getattr(module, f"{n}_proj").weight for n in "qkvo"} | {"b": module.rate_proj.weight}
    w |= {f"{n}_taps": getattr(module, f"{n}_taps") for n in "qkv"} | {"norm": module.norm_weight}
    got = module(x)
    for b in range(2):
        g = -module.log_decay_scale.exp() * F.softplus(x[b] @ module.decay_proj.weight.T + module.decay_bias)
        gate = None if "gate" in options else F.silu(module.gate_proj(x[b])).unflatten(-1, (6, V))
        sizes = {"key_heads": options.get("num_key_heads", 6), "heads": 6, "eps": options.get("eps", 1e-6)}
        rate = 2.0 if "negative_eigenvalues" in options else 1.0
        want = naive_layer(x[b], w, decay=g[..., None].expand(-1, -1, D), rate=rate, gate=gate, **sizes)
        close(got[b].detach(), want.detach())


def test_forgetting_comes_before_the_error() -> None:
    """(k, v1), then (k, v2) with b = 1/2 and half kept: S = v1/4 + v2/2. With nothing kept v1 is gone."""
    k = F.normalize(normal(1, 1, 1, 1, 4), dim=-1).expand(1, 1, 2, 4)
    v, ones = normal(2, 1, 1, 2, 3), torch.ones(1, 1, 2, dtype=torch.float64)
    half = ones * torch.tensor([1.0, 0.5], dtype=torch.float64)
    for kept, share in ((0.5, 0.25), (0.0, 0.0)):
        decay = torch.tensor([[[0.0, kept]]], dtype=torch.float64).log() * torch.tensor([0.0, 1.0])
        read = delta_rule(k, k, v, half, decay.nan_to_num(0.0, neginf=-torch.inf)).out[0, 0, 1]
        close(read, (share * v[0, 0, 0] + v[0, 0, 1] / 2) / 2)


def test_starting_values() -> None:
    torch.manual_seed(0)
    module = regard.create("gated_deltanet", dim=512, num_heads=128, causal=True)
    scale = module.log_decay_scale.exp()
    assert 0.01 <= scale.min() < 0.6
    assert 15 < scale.max() <= 16
    step = torch.nn.functional.softplus(module.decay_bias)
    assert 0.001 <= step.min() < 0.0015
    assert 0.07 < step.max() <= 0.1
    assert torch.equal(module.norm_weight, torch.ones(4))
    assert not [name for name, _ in module.named_parameters() if name.endswith("proj.bias")]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="GatedDeltaNet: num_heads is no multiple of num_key_heads = 3"):
        GatedDeltaNet(8, 4, num_key_heads=3)
    for option in ("value_head_dim", "num_key_heads", "head_dim"):
        with pytest.raises(ValueError, match=f"GatedDeltaNet: {option} is too small"):
            GatedDeltaNet(8, 4, **{option: 0})
    with pytest.raises(ValueError, match="does not support gqa"):
        regard.create("gated_deltanet", dim=8, num_heads=4, num_kv_heads=2, causal=True)

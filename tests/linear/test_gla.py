"""Gated linear attention against loops (naive_gla.py, written from the equations before the code was, by the same
author) and numbers of the authors' functions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_delta import naive_conv
from linear.naive_gla import naive_gla, naive_layer
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear.gla import GatedLinearAttention, gated_linear_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "gla_naive.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_authors_numbers() -> None:
    """Outputs, last state, and all gradients of a loss on both; the weights of all pairs."""
    with np.load(VECTORS) as file:
        z = {name.removeprefix("g_"): torch.from_numpy(file[name]) for name in file}
    names = ("q", "k", "v", "log_decay")
    given = {n: z[n].clone().requires_grad_() for n in (*names, "state0")}
    out, state = gated_linear_attention(*(given[n].transpose(1, 2) for n in names), state=given["state0"])
    out = out.transpose(1, 2)
    close(out.detach(), z["out"])
    close(state.detach(), z["state"])
    loss = (out * z["w"]).sum() + (state * z["ws"]).sum()
    for n, g in zip(given, torch.autograd.grad(loss, list(given.values())), strict=True):
        close(g, z[f"g{n}"])
    q, k, _, g = (z[n].transpose(1, 2) for n in names)
    eye = torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9)
    close(gated_linear_attention(q, k, eye, g).out, z["weights"])


def test_core_equals_the_loops() -> None:
    q, k, v, g = normal(1, 1, 4, 6, 3), normal(2, 1, 2, 6, 3), normal(3, 1, 2, 6, 5), -normal(4, 1, 2, 6, 3).abs()
    state = normal(5, 1, 4, 3, 5)
    got = gated_linear_attention(q, k, v, g, state=state)
    for h in range(4):
        out, last = naive_gla(q[0, h], k[0, h // 2], v[0, h // 2], g[0, h // 2], state[0, h])
        close(got.out[0, h], out)
        close(got.state[0, h], last)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "gate_rank": 3, "gate_temperature": 2.0, "eps": 0.1},
        {"gate": False, "min_log_decay": -0.03, "key_expand": 0.5, "value_expand": 2.0},
    ],
    ids=str,
)
def test_layer_equals_the_loops(options: dict) -> None:
    module, x = of("gla").build(**options), tokens(2, 7)
    w = {n: getattr(module, f"{n}_proj").weight for n in "qkvo"} | {"norm": module.norm_weight}
    w |= {"a": module.decay_proj[0].weight, "b": module.decay_proj[1].weight, "bias": module.decay_proj[1].bias}
    w |= {"g": module.gate_proj.weight} if options.get("gate", True) else {}
    assert w["a"].shape == (options.get("gate_rank", 16), 24)
    sizes = {
        "heads": 6,
        "key_heads": options.get("num_kv_heads", 6),
        "temperature": options.get("gate_temperature", 16.0),
    }
    rest = {"least": options.get("min_log_decay"), "gate": options.get("gate", True), "eps": options.get("eps", 1e-5)}
    got = module(x)
    for b in range(2):
        close(got[b].detach(), naive_layer(x[b], w, **sizes, **rest).detach())


def test_features_and_the_convolution() -> None:
    """A convolution has a silu behind it, on values too; the feature map is on queries and keys."""
    module, x = of("gla").build(conv_size=4, feature_map="relu"), tokens(1, 7)
    q, k, v = (naive_conv(x[0] @ getattr(module, f"{n}_proj").weight.T, getattr(module, f"{n}_taps")) for n in "qkv")
    q, k, v = (z.unflatten(-1, (6, -1)).transpose(0, 1)[None] for z in (q.relu(), k.relu(), v))
    decay = F.logsigmoid(module.decay_proj(x)).unflatten(-1, (6, -1)).transpose(1, 2) / 16
    out = gated_linear_attention(q, k, v, decay).out
    out = out / torch.sqrt((out**2).mean(-1, keepdim=True) + 1e-5) * module.norm_weight
    out = out.transpose(1, 2).flatten(2) * F.silu(module.gate_proj(x))
    close(module(x).detach(), module.o_proj(out).detach())


def test_a_token_may_empty_the_memory() -> None:
    """g = -inf at one token: what comes after does not know what was before."""
    q, k, v, g = normal(1, 1, 1, 6, 3), normal(2, 1, 1, 6, 3), normal(3, 1, 1, 6, 2), -normal(4, 1, 1, 6, 3).abs()
    g[:, :, 3] = -torch.inf
    other = v.clone()
    other[:, :, :3] *= -2
    one, two = (gated_linear_attention(q, k, z, g).out for z in (v, other))
    assert torch.equal(one[:, :, 3:], two[:, :, 3:])
    assert (one[:, :, :3] - two[:, :, :3]).abs().min() > 1e-3


def test_it_drops_noise_and_keeps_what_it_was_told_to() -> None:
    """Noise under its own feature is dropped at once; what was told stays whole, where one fixed rate fades both."""
    noise = torch.zeros(1, 1, 40, 2, dtype=torch.float64)
    noise[..., 1], noise[:, :, 0] = 1.0, torch.tensor([1.0, 0.0])
    v, g = normal(1, 1, 1, 40, 3), torch.zeros(1, 1, 40, 2, dtype=torch.float64)
    g[..., 1] = -torch.inf
    both = torch.ones_like(noise)
    close(gated_linear_attention(both, noise, v, g).out[0, 0, -1], (v[0, 0, 0] + v[0, 0, -1]) / 2**0.5)
    fixed = linear_scan(both, noise, v, torch.tensor([0.5], dtype=torch.float64).log()).state[0, 0]
    assert fixed[0].abs().max() < 1e-9


def test_starting_values_and_refusals() -> None:
    torch.manual_seed(0)
    module = regard.create("gla", dim=32, num_heads=4, causal=True)
    assert (module.q_proj.out_features, module.v_proj.out_features, module.q_taps) == (16, 32, None)
    assert torch.equal(module.norm_weight, torch.ones(8))
    biases = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    assert biases == ["decay_proj.1.bias"]
    for option, value in (("gate_rank", 0), ("gate_temperature", 0.0), ("min_log_decay", 1.0), ("feature_map", "elu")):
        with pytest.raises(ValueError, match=f"GatedLinearAttention: {option} "):
            GatedLinearAttention(8, 2, **{option: value})
    with pytest.raises(ValueError, match="GatedLinearAttention: key_expand gives 4 heads no whole width"):
        GatedLinearAttention(12, 4)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="decay has the wrong shape"):
        gated_linear_attention(x, x, x, torch.zeros(1, 2, 3))

"""DeltaNet against loops (naive_delta.py, written from the equations before the code was, by the same author), and
against transformers' gated layer with its gate open."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_delta import naive_delta, naive_layer
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.linear.deltanet import DeltaNet, delta_rule, unit


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loops(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, V = v.shape
    D, group = q.shape[3], H // q.shape[1]
    outs, states = v.new_empty(B, H, T, V), v.new_empty(B, H, D, V)
    for b in range(B):
        for h in range(H):
            g = q.new_zeros(T, D) if decay is None else decay[b, h].reshape(T, -1).expand(T, D)
            given = q[b, h // group], k[b, h // group], v[b, h], beta[b, h], g, state[b, h]
            outs[b, h], states[b, h] = naive_delta(*given)
    return outs, states


@pytest.mark.parametrize("decay", [(), (2, 4, 7), (2, 4, 7, 3)], ids=["none", "head", "feature"])
def test_core_equals_the_loops(decay: tuple[int, ...]) -> None:
    """Outputs, last state and all gradients; two value heads to a key head."""
    given = [
        unit(normal(1, 2, 2, 7, 3)),
        unit(normal(2, 2, 2, 7, 3)),
        normal(3, 2, 4, 7, 5),
        2 * normal(4, 2, 4, 7).sigmoid(),
    ]
    given += [-normal(5, *decay).abs()] if decay else []
    given = [z.requires_grad_() for z in (*given, normal(6, 2, 4, 3, 5))]
    *most, state = given
    g = most[4] if decay else None
    got, want = delta_rule(*most[:4], g, state=state), loops(*most[:4], g, state)
    for a, b, seed in zip(got, want, (7, 8), strict=True):
        close(a.detach(), b.detach())
        towards = normal(seed, *b.shape)
        used = [z for n, z in enumerate(given) if n or seed == 7]  # no query reads into the state
        grads = (torch.autograd.grad((z * towards).sum(), used, retain_graph=True) for z in (a, b))
        for x, y in zip(*grads, strict=True):
            close(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": True, "negative_eigenvalues": True, "eps": 0.1},
        {"conv_size": 0},
        {"key_expand": 0.5, "value_expand": 2.0, "conv_size": 2},
    ],
    ids=str,
)
def test_layer_equals_the_loops(options: dict) -> None:
    module, x = of("deltanet").build(**options), tokens(2, 7)
    w = {n: getattr(module, f"{n}_proj").weight for n in "qkvo"} | {"b": module.rate_proj.weight}
    w |= {f"{n}_taps": getattr(module, f"{n}_taps") for n in "qkv"} | {"norm": module.norm_weight}
    got = module(x)
    for b in range(2):
        gate = F.silu(module.gate_proj(x[b])).unflatten(-1, (6, -1)) if "gate" in options else None
        rate = 2.0 if "negative_eigenvalues" in options else 1.0
        sizes = {"key_heads": 6, "heads": 6, "eps": options.get("eps", 1e-5)}
        close(got[b].detach(), naive_layer(x[b], w, decay=None, rate=rate, gate=gate, **sizes).detach())


def test_it_is_the_gated_layer_of_transformers_with_its_gate_open() -> None:
    """Their layer with exp(A_log) = 0 forgets nothing; all in float64, and padded on the left."""
    pytest.importorskip("transformers")
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    from integrations.conversions import Wide

    sizes = {"num_key_heads": 3, "num_value_heads": 3, "key_head_dim": 4, "value_head_dim": 6, "conv_kernel_dim": 4}
    config = Qwen3NextConfig(hidden_size=12, num_hidden_layers=1, **{f"linear_{n}": size for n, size in sizes.items()})
    torch.manual_seed(0)
    theirs = Qwen3NextGatedDeltaNet(config, 0).double()
    theirs.A_log.data.fill_(-torch.inf)
    layer = {"key_expand": 1.0, "value_expand": 1.5, "gate": True, "eps": config.rms_norm_eps}
    ours = regard.create("deltanet", dim=12, num_heads=3, causal=True, dtype=torch.float64, **layer)
    with torch.no_grad():
        each = theirs.in_proj_qkvz.weight.unflatten(0, (3, -1)).split([4, 4, 6, 6], 1)
        for name, weight in zip(("q", "k", "v", "gate"), each, strict=True):
            getattr(ours, f"{name}_proj").weight.copy_(weight.flatten(0, 1))
        for name, taps in zip("qkv", theirs.conv1d.weight[:, 0].split([12, 12, 18]), strict=True):
            getattr(ours, f"{name}_taps").copy_(taps)
        ours.rate_proj.weight.copy_(theirs.in_proj_ba.weight.unflatten(0, (3, 2))[:, 0])
        ours.o_proj.weight.copy_(theirs.out_proj.weight)
        x, real = normal(1, 2, 9, 12), torch.arange(9) >= torch.tensor([[0], [3]])
        with Wide():
            want = theirs(x, attention_mask=real)
        close(ours(x, mask=real)[real], want[real])


def test_what_is_written_last_is_read() -> None:
    """(k, v1), then (k, v2) with b = 1 and |k| = 1: q = k reads v2 / sqrt(D), where linear attention has v1 + v2."""
    k = F.normalize(normal(1, 1, 1, 1, 4), dim=-1).expand(1, 1, 2, 4)
    v = normal(2, 1, 1, 2, 3)
    read = delta_rule(k, k, v, torch.ones(1, 1, 2, dtype=torch.float64)).out[0, 0, 1]
    close(read, v[0, 0, 1] / 2)
    close(linear_scan(k / 2, k, v).out[0, 0, 1], v[0, 0].sum(0) / 2)


def test_pairs_that_are_written_again_come_apart() -> None:
    """12 keys of 32 features overlap. Errors are what is written, so each round leaves less of the overlap."""
    k, v = F.normalize(normal(1, 1, 1, 12, 32), dim=-1), normal(2, 1, 1, 12, 5)
    rounds = 60
    keys, values = k.repeat(1, 1, rounds, 1), v.repeat(1, 1, rounds, 1)
    ones = torch.ones(1, 1, 12 * rounds, dtype=torch.float64)
    read = k @ delta_rule(keys, keys, values, ones).state
    added = k @ linear_scan(keys, keys, values).state / rounds
    assert (read - v).abs().max() < 0.05
    assert (added - v).abs().max() > 0.5


def test_with_rates_up_to_two_a_sign_can_turn() -> None:
    """b = 2 reflects the state at the key: writing nothing there turns its sign, token by token, as parity asks."""
    k = F.normalize(normal(1, 1, 1, 1, 4), dim=-1).expand(1, 1, 5, 4)
    start = k[:, :, :1].mT @ torch.ones(1, 1, 1, 1, dtype=torch.float64)
    beta, zeros = torch.full((1, 1, 5), 2.0, dtype=torch.float64), torch.zeros(1, 1, 5, 1, dtype=torch.float64)
    out = 2 * delta_rule(k, k, zeros, beta, state=start).out.flatten()
    close(out, torch.tensor([-1.0, 1, -1, 1, -1], dtype=torch.float64))


def test_hidden_tokens_pass_the_state_on() -> None:
    q, k, v, beta = (
        normal(1, 1, 2, 4, 3),
        unit(normal(2, 1, 2, 4, 3)),
        normal(3, 1, 2, 4, 3),
        normal(4, 1, 2, 4).sigmoid(),
    )
    state, nothing = normal(5, 1, 2, 3, 3), torch.zeros(1, 4, dtype=torch.bool)
    for decay in (None, -normal(6, 1, 2, 4).abs(), -normal(6, 1, 2, 4, 3).abs()):
        assert torch.equal(delta_rule(q, k, v, beta, decay, keep=nothing, state=state).state, state)


def test_starting_values() -> None:
    torch.manual_seed(0)
    module = regard.create("deltanet", dim=32, num_heads=4, causal=True)
    taps = torch.cat([module.q_taps, module.k_taps, module.v_taps])
    assert taps.shape == (96, 4)
    assert 0.45 < taps.abs().max() <= 0.5
    assert torch.equal(module.norm_weight, torch.ones(8))
    assert module.gate_proj is None
    assert not [name for name, _ in module.named_parameters() if name.endswith("bias")]


def test_refusals() -> None:
    for option, value in (("key_expand", 0.0), ("value_expand", 0.3), ("conv_size", -1), ("eps", -1.0)):
        with pytest.raises(ValueError, match=f"DeltaNet: {option} "):
            DeltaNet(8, 2, **{option: value})
    with pytest.raises(TypeError, match="negative_eigenvalues"):
        DeltaNet(8, 2, negative_eigenvalues=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bidirectional"):
        regard.create("deltanet", dim=8, num_heads=2)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"delta_rule: beta has the wrong shape \(got \(1, 2\)\)"):
        delta_rule(x, x, x, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"delta_rule: decay has the wrong shape \(got \(2,\)\)"):
        delta_rule(x, x, x, torch.zeros(1, 2, 3), torch.zeros(2))

"""Multi-token attention against loops over every entry of the map, and the authors' numbers (B058)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.scores import HeadMix, HeadNormGate, KeyQueryConv, MixSequence
from regard.stages import Rows

VECTORS = Path(__file__).parents[1] / "vectors" / "B058.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


def rows(z: Tensor, allowed: Tensor | None) -> Rows:
    B, H, t, s = z.shape
    q, k = torch.zeros(B, H, t, 2, dtype=z.dtype), torch.zeros(B, H, s, 2, dtype=z.dtype)
    return Rows(q, k, z, torch.arange(s - t, s), torch.arange(s), allowed)


def conv_oracle(z: Tensor, kernel: Tensor, allowed: Tensor | None) -> Tensor:
    """kernel (H, cq, ck): last row = the query itself, middle column = the key; masked entries are 0."""
    B, H, T, S = z.shape
    cq, ck = kernel.shape[-2:]
    keep = torch.ones(z.shape, dtype=torch.bool) if allowed is None else allowed.expand(z.shape)
    out = torch.zeros_like(z)
    for b, h, t, s in np.ndindex(B, H, T, S):
        total = 0.0
        for i in range(cq):
            for j in range(ck):
                row, column = t - (cq - 1) + i, s - (ck - 1) // 2 + j
                if 0 <= row < T and 0 <= column < S and keep[b, h, row, column]:
                    total += float(kernel[h, i, j]) * float(z[b, h, row, column])
        out[b, h, t, s] = total
    return out


def mix_oracle(z: Tensor, weight: Tensor) -> Tensor:
    """weight (groups, c, c): out[r c + g] = sum_h weight[r, g, h] in[r c + h]."""
    out = torch.zeros_like(z)
    c = weight.shape[1]
    for r, g, h in np.ndindex(*weight.shape):
        out[:, r * c + g] += weight[r, g, h] * z[:, r * c + h]
    return out


def random_mask(seed: int, B: int, H: int, T: int, S: int) -> Tensor | None:
    g = torch.Generator().manual_seed(seed)
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
    return (
        None,
        causal,
        causal & (torch.rand(B, 1, 1, S, generator=g) < 0.7),
        torch.rand(B, H, T, S, generator=g) < 0.6,
    )[seed % 4]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("on", ["scores", "weights"])
def test_convolution_equals_the_formula(seed: int, on) -> None:
    g = torch.Generator().manual_seed(seed)
    B, H, T, S = (int(torch.randint(1, n, (), generator=g)) for n in (3, 4, 6, 7))
    T = min(T, S)
    cq, ck = 1 + seed % 4, 1 + 2 * (seed % 3)
    part = KeyQueryConv(H, query_size=cq, key_size=ck, on=on).double()
    kernel = normal(seed, H, cq, ck)
    with torch.no_grad():
        part.kernel.copy_(kernel.reshape(part.kernel.shape))
    allowed = random_mask(seed, B, H, T, S)
    z = normal(seed + 1, B, H, T, S)
    want = conv_oracle(z, kernel, allowed)
    got = part(z if on == "scores" or allowed is None else z.masked_fill(~allowed, 0.0), rows(z, allowed)).detach()
    if allowed is not None:
        if on == "weights":
            assert not got.masked_select(~allowed).any()
        # What a score map holds at masked places is never read.
        got, want = got.masked_fill(~allowed, 0.0), want.masked_fill(~allowed, 0.0)
    close(got, want)
    assert part.halo == cq - 1


@pytest.mark.parametrize(("H", "group"), [(4, None), (4, 2), (6, 3), (3, 1)])
def test_head_mix_equals_the_formula(H: int, group: int | None) -> None:
    part = HeadMix(H, group=group).double()
    weight = normal(H, *part.weight.shape)
    with torch.no_grad():
        part.weight.copy_(weight)
    z = normal(1, 2, H, 3, 4)
    close(part(z, rows(z, None)).detach(), mix_oracle(z, weight))
    assert weight.shape == (H // (group or H), group or H, group or H)


def norm_oracle(o: Tensor, weight: Tensor, layer: int | None) -> Tensor:
    scale = 1.0 if layer is None else 1 - (0.8 - 0.6 * math.exp(-0.3 * layer))
    out = torch.zeros_like(o)
    for b, h, t in np.ndindex(*o.shape[:3]):
        mean = sum(float(v) ** 2 for v in o[b, h, t]) / o.shape[3]
        out[b, h, t] = o[b, h, t] / math.sqrt(mean + 1e-5) * weight * scale
    return out


@pytest.mark.parametrize("case", ["c1_", "c2_", "c3_"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    H, G = {"c1_": (4, 2), "c2_": (6, 6), "c3_": (2, 2)}[case]
    D = z["Wq"].shape[0] // H
    x = z["x"].clone().requires_grad_()
    T = x.shape[1]
    allowed = z.get("mask", torch.ones(T, T, dtype=torch.bool).tril()[None, None])
    q, k, v = ((x @ z[n].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in ("Wq", "Wk", "Wv"))
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    named: dict[str, Tensor] = {}

    def convolution(name: str, on) -> KeyQueryConv:
        cq, ck = z[name].shape[-2:]
        part = KeyQueryConv(H, query_size=cq, key_size=ck, on=on).double()
        with torch.no_grad():
            part.kernel.copy_(z[name].reshape(part.kernel.shape))
        named[name] = part.kernel
        return part

    def mixing(weight: Tensor) -> HeadMix:
        part = HeadMix(H, group=weight.shape[-1]).double()
        with torch.no_grad():
            part.weight.copy_(weight)
        return part

    before = [convolution("kernel_pre", "scores")]
    after = []
    if "W_head_pre" in z:
        before.append(mixing(z["W_head_pre"][None]))
    if "kernel_post" in z:
        after.append(convolution("kernel_post", "weights"))
    if "head_kernel_post" in z:
        after.append(mixing(z["head_kernel_post"].transpose(-1, -2)))  # stored (from, to)
    weights = MixSequence(before)(scores, rows(scores, allowed)).masked_fill(~allowed, -math.inf).softmax(-1)
    final = MixSequence(after)(weights, rows(weights, allowed)) if after else weights
    out = final @ v
    plain = out
    if "norm_weight" in z:
        layer = 3 if case == "c2_" else None
        gate = HeadNormGate(D, layer=layer).double()
        with torch.no_grad():
            gate.norm_weight.copy_(z["norm_weight"])
            gate.proj.weight.copy_(z.get("gate_W", torch.zeros(1, D)))
            gate.proj.bias.copy_(z.get("gate_b", torch.full((1,), 60.0)))  # without a gate: open
        out = gate(out, x, "output")
        normed = norm_oracle(plain.detach(), z["norm_weight"], layer)
        if "gate_W" in z:
            normed = normed * torch.sigmoid(normed @ z["gate_W"].T + z["gate_b"])
        close(out.detach(), normed)
    out = out.transpose(1, 2).flatten(2) @ z["Wo"].T
    (out * z["w"]).sum().backward()
    close(final.detach(), z["final_map"])
    close(out.detach(), z["out"])
    close(x.grad, z["grad_x"])
    for name, parameter in named.items():
        close(parameter.grad.reshape(z[name].shape), z["grad_" + name])
    # The loops of this file give the same map.
    s = conv_oracle(scores.detach(), z["kernel_pre"][:, 0], allowed)
    s = mix_oracle(s, z["W_head_pre"][None]) if "W_head_pre" in z else s
    a = s.masked_fill(~allowed, -math.inf).softmax(-1)
    if "kernel_post" in z:
        a = conv_oracle(a, z["kernel_post"][:, 0], allowed).masked_fill(~allowed, 0.0)
    a = mix_oracle(a, z["head_kernel_post"].transpose(-1, -2)) if "head_kernel_post" in z else a
    close(a, z["final_map"])


def test_starts_as_plain_attention() -> None:
    z = normal(0, 2, 4, 5, 5)
    for part in (KeyQueryConv(4).double(), HeadMix(4).double(), HeadMix(4, group=2).double()):
        close(part(z, rows(z, None)).detach(), z, 1e-14)


def test_finds_two_neighbouring_keys_where_one_query_cannot() -> None:
    """The query before looks for B, this one for A: the score is high only at an A that follows a B."""
    matches = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    matches[0, 0, 5, [2, 4]] = 1.0  # query 5 likes keys 2 and 4
    matches[0, 0, 4, [1, 3]] = 1.0  # query 4 likes keys 1 and 3
    matches[0, 0, 4, 3] = 1.0
    matches[0, 0, 4, 1] = 0.0
    part = KeyQueryConv(1, query_size=2, key_size=3).double()
    with torch.no_grad():
        part.kernel.zero_()
        part.kernel.view(2, 3)[1, 1] = 1.0  # this query, this key
        part.kernel.view(2, 3)[0, 0] = 1.0  # the query before, the key before
    last = part(matches, rows(matches, torch.ones(6, 6, dtype=torch.bool).tril()[None, None]))[0, 0, 5]
    assert int(last.argmax()) == 4
    assert last[4] == 2
    assert last[2] == 1


def test_a_future_or_masked_score_is_never_read() -> None:
    part = KeyQueryConv(2, query_size=3, key_size=5).double()
    with torch.no_grad():
        part.kernel.copy_(normal(1, *part.kernel.shape))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    allowed[..., 1] = False
    z = normal(0, 1, 2, 6, 6)
    poisoned = z.masked_fill(~allowed, float("nan")).requires_grad_()
    clean, got = part(z, rows(z, allowed)), part(poisoned, rows(poisoned, allowed))
    assert torch.equal(got.masked_select(allowed), clean.masked_select(allowed))
    got.masked_fill(~allowed, 0.0).sum().backward()
    assert torch.isfinite(poisoned.grad).all()


def test_gradcheck() -> None:
    part = KeyQueryConv(2, query_size=2, key_size=3).double()
    with torch.no_grad():
        part.kernel.copy_(normal(1, *part.kernel.shape))
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    z = normal(0, 1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: part(z, rows(z, allowed)).masked_fill(~allowed, 0.0), (z,))


@pytest.mark.parametrize("sizes", [{"key_size": 4}, {"query_size": 0}])
def test_refuses_bad_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(sizes))):
        KeyQueryConv(2, **sizes)


def test_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="group"):
        HeadMix(4, group=3)


def layer_inputs(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every query head, from the layer's projections."""
    D, R = layer.head_dim, layer.num_heads // layer.num_kv_heads
    q, k, v = (
        (x @ getattr(layer, n + "_proj").weight.T).unflatten(-1, (-1, D)).transpose(1, 2).detach() for n in "qkv"
    )
    return q, k.repeat_interleave(R, 1), v.repeat_interleave(R, 1)


def randomised(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.7 * normal(50 + n, *parameter.shape))
    return layer.double()


@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_runs_the_stages_in_the_papers_order(causal: bool) -> None:
    sizes = {"query_size": 2, "key_size": 3, "head_group": 2}
    layer = randomised(regard.create("mta", dim=12, num_heads=4, num_kv_heads=2, causal=causal, **sizes))
    p = {name: value.detach() for name, value in layer.state_dict().items()}
    x = normal(1, 2, 6, 12)
    q, k, v = layer_inputs(layer, x)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    kernels = [p[f"{stage}.mixes.0.kernel"].reshape(4, 2, 3) for stage in ("score_mix", "weight_mix")]
    mixes = [p[f"{stage}.mixes.1.weight"] for stage in ("score_mix", "weight_mix")]
    s = mix_oracle(conv_oracle(q @ k.transpose(-1, -2) / math.sqrt(3), kernels[0], allowed), mixes[0])
    a = s.masked_fill(~allowed, -math.inf).softmax(-1)
    a = mix_oracle(conv_oracle(a, kernels[1], allowed).masked_fill(~allowed, 0.0), mixes[1])
    o = norm_oracle(a @ v, p["gate.norm_weight"], None)
    o = o * torch.sigmoid(o @ p["gate.proj.weight"].T + p["gate.proj.bias"])
    close(layer(x).detach(), o.transpose(1, 2).flatten(2) @ p["o_proj.weight"].T)
    assert mixes[0].shape == (1, 4, 4)  # all heads before the softmax
    assert mixes[1].shape == (2, 2, 2)  # groups after it

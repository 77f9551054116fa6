"""Query-key normalisation against loops, torch's own RMS norm, and the layer of transformers' Qwen3."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.heads import QKNorm
from regard.heads.qk_norm import normalised


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    B, G, R, T, S, D = (int(torch.randint(1, n, (), generator=g)) for n in (3, 3, 4, 5, 5, 6))
    eps = (1e-6, 1e-2)[seed % 2]
    part = QKNorm(D, eps=eps).double()
    weights = normal(seed, D), normal(seed + 1, D)
    with torch.no_grad():
        part.q_weight.copy_(weights[0])
        part.k_weight.copy_(weights[1])
    q, k, v = normal(seed + 2, B, G * R, T, D), normal(seed + 3, B, G, S, D), normal(seed + 4, B, G, S, D)
    got = part(q, k, v)
    assert torch.equal(got[2], v)
    for z, weight, result in zip((q, k), weights, got[:2], strict=True):
        want = torch.zeros_like(z)
        for row in np.ndindex(*z.shape[:-1]):
            size = math.sqrt(sum(float(value) ** 2 for value in z[row]) / D + eps)
            for d in range(D):
                want[row][d] = z[row][d] / size * weight[d]
        assert (result - want).abs().max() < 1e-12
        assert (result - torch.nn.functional.rms_norm(z, (D,), weight, eps)).abs().max() < 1e-12


@pytest.mark.parametrize("position", ["", "+rotary"])
def test_equals_transformers_qwen3(position: str) -> None:
    """Values and every gradient of a grouped causal layer, with and without rotation after the norm."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    config = qwen3.Qwen3Config(
        hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-5,
        attention_bias=False, attn_implementation="eager",
    )  # fmt: skip
    layer = regard.create(
        "qk_norm" + position, dim=12, num_heads=4, num_kv_heads=2, head_dim=6, causal=True, eps=1e-5
    ).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    names = {"heads.q_weight": "q_norm.weight", "heads.k_weight": "k_norm.weight"}
    other = qwen3.Qwen3Attention(config, layer_idx=0).double().eval()
    other.load_state_dict(regard.layer_state(layer, like=other))
    x, direction = normal(20, 2, 5, 12).requires_grad_(), normal(21, 2, 5, 12)
    still = torch.ones(2, 5, 6, dtype=torch.float64), torch.zeros(2, 5, 6, dtype=torch.float64)
    turned = qwen3.Qwen3RotaryEmbedding(config)(x, torch.arange(5).expand(2, 5))
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    want = other(x, position_embeddings=turned if position else still, attention_mask=mask[None, None])[0]
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # its norm, softmax and angles are always fp32
    ours, theirs = dict(layer.named_parameters()), dict(other.named_parameters())
    grads = torch.autograd.grad((got * direction).sum(), [x, *ours.values()])
    wanted = torch.autograd.grad((want * direction).sum(), [x, *(theirs[names.get(name, name)] for name in ours)])
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_logits_are_bounded_whatever_the_input() -> None:
    """sqrt(D) max|w_q w_k|, where plain products of the same queries and keys are many times that."""
    part = QKNorm(4).double()
    with torch.no_grad():
        part.q_weight.copy_(normal(1, 4))
        part.k_weight.copy_(normal(2, 4))
        bound = math.sqrt(4) * (part.q_weight * part.k_weight).abs().max()
        for size in (1.0, 1e3, 1e6):
            q, k = size * normal(3, 2, 3, 50, 4), size * normal(4, 2, 3, 60, 4)
            q, k, _ = part(q, k, k)
            assert (q @ k.mT / math.sqrt(4)).abs().max() <= bound


FORMS = [
    (n, w, b, v) for n in ("rms", "layer") for w in ("shared", "per_head", "joint") for b in (0, 1) for v in (0, 1)
]


@pytest.mark.parametrize(("norm", "weights", "bias", "value_norm"), FORMS)
def test_every_form_equals_its_formula(norm: str, weights: str, bias: int, value_norm: int) -> None:
    """Entry by entry: whose mean and mean square, whose weight."""
    H, G, D, eps = 4, 2, 6, 1e-3
    part = QKNorm(D, H, G, norm=norm, weights=weights, bias=bool(bias), value_norm=bool(value_norm), eps=eps).double()
    with torch.no_grad():
        for n, p in enumerate(part.parameters()):
            p.copy_(normal(n, *p.shape))
    q, k, v = normal(10, 2, H, 3, D), normal(11, 2, G, 5, D), normal(12, 2, G, 5, D)
    got = part(q, k, v)
    for z, name, result in zip((q, k), "qk", got[:2], strict=True):
        weight, shift = part.state_dict()[f"{name}_weight"], part.state_dict().get(f"{name}_bias")
        assert weight.shape == ((D,) if weights == "shared" else (z.shape[1], D))
        for b, h, t, d in np.ndindex(*z.shape):
            row = (z[b, :, t].flatten() if weights == "joint" else z[b, h, t]).tolist()
            mean = sum(row) / len(row) if norm == "layer" else 0.0
            size = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + eps)
            at = d if weights == "shared" else (h, d)
            want = (float(z[b, h, t, d]) - mean) / size * float(weight[at]) + (float(shift[at]) if bias else 0.0)
            assert abs(float(result[b, h, t, d]) - want) < 1e-12
    plain = torch.nn.functional.rms_norm(v, (D,), eps=eps) if value_norm else v
    assert (got[2] - plain).abs().max() < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norms_are_torchs(bias: bool) -> None:
    layer = torch.nn.LayerNorm(6, eps=1e-5, bias=bias).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    z = 100 + normal(3, 2, 3, 5, 6)
    got = normalised(z, layer.weight, layer.bias, norm="layer", eps=1e-5)
    assert (got - layer(z)).abs().max() < 1e-12
    half = normalised(z.half(), layer.weight.half(), norm="layer", eps=1e-5)
    assert half.dtype == torch.float16
    assert half.isfinite().all()  # squares are taken in fp32


def test_ngpt_is_per_head_weights_shared_by_both_sides() -> None:
    """Loshchilov et al. 2024 (2410.01131): q, k <- s * unit vectors, scores times sqrt(D)."""
    part, s = QKNorm(6, 4, 4, weights="per_head", eps=0.0).double(), normal(0, 4, 6)
    with torch.no_grad():
        part.q_weight.copy_(s)
        part.k_weight.copy_(s)
    q, k = normal(1, 2, 4, 3, 6), normal(2, 2, 4, 5, 6)
    here, there, _ = part(q, k, k)
    unit = [s[:, None] * z / z.norm(dim=-1, keepdim=True) for z in (q, k)]
    assert (here @ there.mT / math.sqrt(6) - math.sqrt(6) * unit[0] @ unit[1].mT).abs().max() < 1e-12


def test_layer_norm_bounds_logits_and_takes_the_mean_away() -> None:
    layer = regard.create("qk_layer_norm", dim=8, num_heads=2).double()
    x = normal(1, 2, 5, 8)
    q, k = (normal(s, 2, 2, 5, 4) for s in (2, 3))
    want = layer.heads(q, k, k)
    for size, shift in ((1e6, 0.0), (1.0, 50.0)):
        got = layer.heads(size * q + shift, size * k + shift, k)
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(got, want, strict=True))
        assert (got[0] @ got[1].mT).abs().max() / 2 <= 2 + 1e-9
    assert layer(x).isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"QKNorm: head_dim is too small \(got 0\); expected an int >= 1"):
        QKNorm(0)
    with pytest.raises(ValueError, match=r"QKNorm: eps is out of range \(got -1.0\); expected a finite number >= 0"):
        QKNorm(4, eps=-1.0)
    q, k = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 6)
    with pytest.raises(
        ValueError, match=r"QKNorm: k has the wrong shape \(got \(2, 3, 5, 6\)\); expected \(B = 2, G, S, D = 4"
    ):
        QKNorm(4)(q, k, q)
    with pytest.raises(ValueError, match=r"QKNorm: num_heads is needed for weights='joint' \(got None\); expected the"):
        QKNorm(4, weights="joint")
    with pytest.raises(ValueError, match=r"QKNorm: norm is unknown \(got 'l2'\); expected one of 'rms', 'layer'"):
        QKNorm(4, norm="l2")
    with pytest.raises(ValueError, match=r"QKNorm: weights is unknown \(got 'per_haed'\); .*did you mean 'per_head'"):
        QKNorm(4, 2, weights="per_haed")
    with pytest.raises(TypeError, match=r"QKNorm: value_norm has the wrong type \(got 1\)"):
        QKNorm(4, value_norm=1)

"""Multi-head, multi-query and grouped-query attention against the papers' formula and two libraries."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard


def naive(layer: regard.Attention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, one batch row, head, query and key at a time."""
    B, T, _ = x.shape
    H, G, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    merged = torch.zeros(B, T, H * D, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            q = x[b] @ layer.q_proj.weight[h * D : (h + 1) * D].T
            k = x[b] @ layer.k_proj.weight[g * D : (g + 1) * D].T
            v = x[b] @ layer.v_proj.weight[g * D : (g + 1) * D].T
            for i in range(T):
                keys = range(i + 1) if layer.causal else range(T)
                exps = [math.exp((q[i] @ k[j]).item() / math.sqrt(D)) for j in keys]
                merged[b, i, h * D : (h + 1) * D] = sum(e * v[j] for e, j in zip(exps, keys)) / sum(exps)
    return merged @ layer.o_proj.weight.T


def build(name: str, heads: int = 4, causal: bool = True, **options: int) -> regard.Attention:
    torch.manual_seed(0)
    layer = regard.create(name, dim=8, num_heads=heads, causal=causal, **options)
    assert isinstance(layer, regard.Attention)
    return layer.double()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "heads", "options", "groups"),
    [
        ("softmax", 4, {}, 4),
        ("softmax", 1, {}, 1),
        ("mqa", 4, {}, 1),
        ("gqa", 4, {}, 1),
        ("gqa", 4, {"num_kv_heads": 2}, 2),
        ("gqa", 8, {}, 2),
    ],
)
def test_equals_the_formula(name, heads, options, groups, length, causal):
    layer = build(name, heads, causal, **options)
    assert layer.num_kv_heads == groups
    x = torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x), rtol=1e-10, atol=1e-12)


def test_equals_torch_multihead_attention():
    layer = build("softmax", causal=False)
    other = nn.MultiheadAttention(8, 4, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        parts = (layer.q_proj, layer.k_proj, layer.v_proj)
        other.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        other.out_proj.weight.copy_(layer.o_proj.weight)
    x, context = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 7))
    torch.testing.assert_close(layer(x, context), other(x, context, context)[0])
    keep = torch.rand(2, 7) < 0.6
    keep[:, 0] = True
    expected = other(x, context, context, key_padding_mask=~keep)[0]  # there, True hides
    torch.testing.assert_close(layer(x, context, mask=regard.masks.padding(keep)), expected)


@pytest.mark.parametrize(("name", "groups"), [("softmax", 4), ("mqa", 1), ("gqa", 2)])
def test_equals_transformers_llama(name, groups):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention

    options = {"num_kv_heads": 2} if name == "gqa" else {}
    layer = build(name, **options)
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=groups, attn_implementation="eager")
    other = LlamaAttention(config, layer_idx=0).double().eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    still = torch.ones(2, 6, 2, dtype=torch.float64), torch.zeros(2, 6, 2, dtype=torch.float64)  # no rotation
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    expected = other(x, position_embeddings=still, attention_mask=mask[None, None])[0]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)  # its softmax is always fp32


def test_any_key_is_one_layer_away_from_any_query():
    layer = build("softmax", causal=False)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    change = torch.autograd.functional.jacobian(layer, x).square().sum((0, 2, 3, 5))
    assert (change > 0).all()


def test_the_cache_shrinks_by_the_heads_shared():
    sizes = {}
    for name, options in (("softmax", {}), ("gqa", {"num_kv_heads": 2}), ("mqa", {})):
        layer = build(name, **options)
        _, state = layer.step(torch.randn(1, 10, 8, dtype=torch.float64), layer.init_state(1, 10))
        sizes[name] = state.nbytes
    assert sizes["softmax"] == 2 * sizes["gqa"] == 4 * sizes["mqa"] == 2 * 10 * 8 * 8


@pytest.mark.parametrize("groups", [3, 0, -1, True])
def test_heads_must_divide(groups):
    with pytest.raises((ValueError, TypeError), match=r"num_kv_heads"):
        build("gqa", num_kv_heads=groups)


def test_mqa_has_one_group():
    with pytest.raises(ValueError, match=r"mqa|gqa"):
        build("mqa", num_kv_heads=2)

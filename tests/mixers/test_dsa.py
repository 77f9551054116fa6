"""DeepSeek sparse attention against loops over pairs, latent attention, and transformers' layer.

The loops' authors have read neither code nor this test.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32

from mixers.naive_mla import naive_mla
from regard import masks
from regard.laws.agreement import close
from regard.mixers.dsa import DeepseekSparseAttention
from regard.mixers.mla import MultiHeadLatentAttention
from routing import naive_lightning_indexer as naive

SIZES = {"q_rank": 5, "kv_rank": 7, "nope_dim": 3, "rope_dim": 4, "value_dim": 5}
INDEX = {"num_index_heads": 8, "index_dim": 6, "topk": 3}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(**options: Any) -> DeepseekSparseAttention:
    layer = DeepseekSparseAttention(10, 3, **{**SIZES, **INDEX, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(n, *p.shape))
    return layer.eval()


def angles(positions: Tensor, width: int = 4) -> Tensor:
    return positions[..., None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def indexer_scores(layer: DeepseekSparseAttention, x: Tensor) -> Tensor:
    part = layer.selector
    turns = torch.cat([angles(torch.arange(x.shape[1]))] * 2, -1).expand(len(x), -1, -1)
    latent = layer.q_a_layernorm(layer.q_a_proj(x))
    of_norm = part.k_norm.weight, part.k_norm.bias
    maps = part.wq_b.weight, part.wk.weight
    return naive.indexer_scores(x, latent, *maps, *of_norm, part.weights_proj.weight, turns.cos(), turns.sin())


@pytest.mark.parametrize("options", [{}, {"bias": True, "interleaved": False}, {"topk": 1}, {"topk": 99}])
def test_is_the_definition(options: dict[str, Any]) -> None:
    layer, x = filled(**options), normal(50, 2, 7, 10).requires_grad_()
    real = torch.arange(7) >= torch.tensor([[0], [2]])
    allow = torch.ones(7, 7, dtype=torch.bool).tril() & real[:, None]
    chosen = naive.top_keys(indexer_scores(layer, x).detach(), allow, layer.selector.topk)
    sizes = {"heads": 3, "nope": 3, "rope": 4, "value": 5, "interleaved": options.get("interleaved", True)}
    weights = dict(layer.named_parameters())
    want, _ = naive_mla(x, weights, angles=angles(torch.arange(7)).expand(2, -1, -1), allowed=chosen, **sizes)
    got = layer(x, mask=masks.padding(real))
    close(got, want, "out")
    direction, own = normal(51, 2, 7, 10), [p for n, p in weights.items() if not n.startswith("selector")]
    for mine, theirs in zip(*(torch.autograd.grad((o * direction).sum(), [x, *own]) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_is_transformers_layer() -> None:
    sizes = {"hidden_size": 10, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 5}
    widths = {"kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5}
    index = {"index_n_heads": 8, "index_head_dim": 6, "index_topk": 3}
    config = v32.DeepseekV32Config(**sizes, **widths, **index, attn_implementation="eager")
    theirs, layer = v32.DeepseekV32Attention(config, 0).double(), filled()
    theirs.load_state_dict({name.replace("selector.", "indexer."): p for name, p in layer.state_dict().items()})
    x, turns = normal(5, 2, 9, 10), torch.cat([angles(torch.arange(9))] * 2, -1).expand(2, -1, -1)
    hidden = torch.full((9, 9), -math.inf, dtype=torch.float64).triu(1).expand(2, 1, -1, -1)
    want, _ = theirs(x, (turns.cos(), turns.sin()), hidden)
    assert (layer(x) - want).abs().mean() < 1e-6, "their softmax is in float32"
    dense = MultiHeadLatentAttention(10, 3, **SIZES, causal=True).double()
    dense.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("selector")})
    assert (dense(x) - want).abs().mean() > 1e-2, "the choice counts"


@pytest.mark.parametrize("absorb", [True, False])
def test_steps_see_what_the_full_pass_sees(absorb: bool) -> None:
    """By one, by several, with padding; and the values of keys that aren't chosen change nothing."""
    layer, x = filled(absorb=absorb), normal(3, 2, 12, 10)
    real = torch.arange(12) >= torch.tensor([[0], [3]])
    want, state, outs = layer(x, mask=masks.padding(real)), layer.init_state(2, 12), []
    numbers = sum(z[0, ..., 0, :].numel() for z in state.buffers.values())
    assert numbers == 7 + 4 + 6, "what a token leaves behind"
    for piece, end in zip(x.split([1, 4, 1, 1, 5], 1), [1, 5, 6, 7, 12]):
        out, state = layer.step(piece, state, mask=masks.padding(real[:, :end]))
        outs.append(out)
    close(torch.cat(outs, 1)[real], want[real], "steps")
    seen = layer._prepare(x, None, None, None)[0].mask.dense(12)[0, 0, -1]
    assert seen.sum() == 3
    slope = torch.autograd.functional.jacobian(lambda z: layer.step(x[:1, -1:], _with(layer, x[:1], z))[0], x[:1])
    assert (slope[0, 0, :, 0].abs().amax((0, 2))[:11] > 0).tolist() == seen[:11].tolist()


def _with(layer: DeepseekSparseAttention, x: Tensor, z: Tensor) -> Any:
    """The state after all of x but the last token, its latents made of z."""
    _, state = layer.step(x[:, :-1], layer.init_state(1, 12))
    c, k_r = layer._latent(z, torch.arange(12))
    buffers = {**state.buffers, "c": c, "k_r": k_r}
    fresh = type(state)({name: torch.zeros_like(b) for name, b in buffers.items()})
    return fresh.append(**{name: b[..., :11, :] for name, b in buffers.items()})[1]


def test_the_loss_is_the_indexers_alone() -> None:
    layer, x = filled(), normal(1, 2, 7, 10)
    loss = layer.selector.divergence(layer, x.requires_grad_())
    others = [x] + [p for n, p in layer.named_parameters() if not n.startswith("selector")]
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True, retain_graph=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(layer.selector.parameters())))


def test_starts_as_written() -> None:
    with torch.device("meta"):
        layer = DeepseekSparseAttention(7168, 128)
    assert (layer.q_rank, layer.kv_rank, layer.nope_dim, layer.rope_dim, layer.value_dim) == (1536, 512, 128, 64, 128)
    assert (layer.selector.num_index_heads, layer.selector.index_dim, layer.selector.topk) == (64, 128, 2048)
    assert layer.causal


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rope_dim": 8}, "rope_dim is too large"), ({"topk": 0}, "topk"), ({"q_rank": 0}, "q_rank is too small")],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        filled(**options)

"""Multi-head latent attention against loops, transformers' DeepSeek layers and their numbers (mla.npz)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import regard
from mixers.naive_mla import naive_mla
from regard import masks
from regard.laws.agreement import close
from regard.mixers.mla import MultiHeadLatentAttention, absorb, expand
from regard.positions.yarn import YaRN

VECTORS = Path(__file__).parents[1] / "vectors" / "mla.npz"
SIZES = {"kv_rank": 7, "nope_dim": 3, "rope_dim": 4, "value_dim": 5}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = 10, heads: int = 3, seed: int = 0, **options) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(dim, heads, **{**SIZES, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer.eval()


def angles(positions: Tensor, width: int = 4, base: float = 10000.0) -> Tensor:
    return positions[..., None] * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def naive(layer: MultiHeadLatentAttention, x: Tensor, where: Tensor, **given) -> tuple[Tensor, Tensor]:
    sizes = {"heads": layer.num_heads, "nope": layer.nope_dim, "rope": layer.rope_dim, "value": layer.value_dim}
    return naive_mla(x, dict(layer.named_parameters()), angles=where, eps=layer.eps, **sizes, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("rope", [0, 4])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_rank", [None, 6])
def test_is_the_definition(q_rank: int | None, interleaved: bool, rope: int) -> None:
    layer = filled(q_rank=q_rank, interleaved=interleaved, rope_dim=rope, bias=True, eps=0.1)
    x = normal(1, 2, 4, 10).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    where = torch.tensor([[0, 1, 2, 3], [5, 6, 8, 9]])
    turns = angles(where, rope) if rope else torch.zeros(2, 4, 0)
    want, _ = naive(layer, x, turns, allowed=allowed, interleaved=interleaved)
    got = layer(x, mask=allowed[:, None], positions=where)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


def test_attends_to_other_tokens() -> None:
    layer = filled(q_rank=4)
    x, context = normal(1, 2, 3, 10).requires_grad_(), normal(2, 2, 5, 10).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    turns, of_keys = (angles(torch.arange(*ends)).expand(2, -1, -1) for ends in ((2, 5), (5,)))
    allowed = keep[:, None].expand(-1, 3, -1)
    want, _ = naive(layer, x, turns, context=context, angles_of_keys=of_keys, allowed=allowed)
    got = layer(x, context, mask=masks.padding(keep))
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize("case", ["a", "b"])
def test_gives_transformers_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    layer = filled(q_rank=5 if case == "a" else None, bias=case == "a", interleaved=case == "a")
    layer.load_state_dict({name: z[name] for name in layer.state_dict()})
    x, allow = z["x"].requires_grad_(), z["allow"][:, None]
    out = layer(x, mask=allow)
    close(out, z["out"])
    gx, g_up = torch.autograd.grad((out * z["w"]).sum(), [x, layer.kv_b_proj.weight])
    close(gx, z["gx"], "gradient of x")
    close(g_up, z["gkv_b"], "gradient of kv_b_proj")
    close(regard.inspect.effective_weights(layer, x.detach(), mask=allow), z["weights"], "weights")


def config(kind: type, q_rank: int | None, bias: bool, dim: int = 10, **more):
    sizes = {"hidden_size": dim, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": q_rank}
    widths = {"kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5}
    return kind(**{**sizes, **widths, **more}, attention_bias=bias, attn_implementation="eager")


@pytest.mark.parametrize(("q_rank", "bias", "interleaved"), [(5, True, True), (None, False, True), (6, False, False)])
def test_is_transformers_deepseek_v3(q_rank: int | None, bias: bool, interleaved: bool) -> None:
    theirs = v3.DeepseekV3Attention(config(v3.DeepseekV3Config, q_rank, bias, rope_interleave=interleaved), 0).double()
    layer = filled(q_rank=q_rank, bias=bias, interleaved=interleaved, causal=True)
    theirs.load_state_dict(layer.state_dict())
    x = normal(5, 2, 6, 10)
    turns = torch.cat([angles(torch.arange(6))] * 2, -1).expand(2, -1, -1)
    hidden = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    want, _ = theirs(x, (turns.cos(), turns.sin()), hidden)
    close_to_single(layer(x), want)


def close_to_single(got: Tensor, want: Tensor) -> None:
    """Their softmax or rotation is in float32, whatever goes in."""
    assert (got.double() - want.double()).abs().mean() < 1e-6


def test_is_transformers_deepseek_v2() -> None:
    theirs = v2.DeepseekV2Attention(config(v2.DeepseekV2Config, 5, True, 12, qk_nope_head_dim=4, kv_lora_rank=8), 0)
    layer = filled(12, q_rank=5, nope_dim=4, kv_rank=8, bias=True, causal=True).float()
    theirs.load_state_dict(layer.state_dict())
    x = normal(5, 2, 6, 12).float()
    turns = angles(torch.arange(6)).expand(2, -1, -1)
    hidden = torch.full((6, 6), -math.inf).triu(1)
    want, _ = theirs(x, hidden, position_embeddings=torch.polar(torch.ones_like(turns), turns).to(torch.complex64))
    close_to_single(layer(x), want)


def test_stretched_as_transformers_stretches_it() -> None:
    """YaRN: frequencies, and the scale by m^2."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
    rope |= {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    theirs_config = config(v3.DeepseekV3Config, None, False, rope_parameters=rope, max_position_embeddings=640)
    theirs = v3.DeepseekV3Attention(theirs_config, 0)
    turned = v3.DeepseekV3RotaryEmbedding(theirs_config)(torch.zeros(1), torch.arange(30)[None])
    m = 0.1 * math.log(40) + 1
    scaling = YaRN(40.0, 16, mscale=1.0, mscale_all_dim=1.0)
    layer = filled(scaling=scaling, scale=m**2 / math.sqrt(7), causal=True).float()
    theirs.load_state_dict(layer.state_dict())
    x = normal(5, 2, 30, 10).float()
    want, _ = theirs(x, turned, torch.full((30, 30), -math.inf).triu(1))
    close_to_single(layer(x), want)
    unscaled = filled(scaling=scaling, causal=True).float()
    assert (unscaled(x) - want).abs().max() > 1e-3, "the scale counts"


@pytest.mark.parametrize("rope", [0, 4])
def test_absorbed_is_expanded(rope: int) -> None:
    """The identity itself, of scores and of outputs."""
    up, q, c, k_r = normal(0, 3, 3 + 5, 7), normal(1, 2, 3, 4, 3 + rope), normal(2, 2, 6, 7), normal(3, 2, 6, rope)
    k, v = expand(c, k_r, up, 3)
    short = absorb(q, up, 3)
    close(short @ torch.cat([c, k_r], -1)[:, None].mT, q @ k.mT, "scores")
    weights = (q @ k.mT).softmax(-1)
    close(weights @ c[:, None] @ up[:, 3:].mT, weights @ v, "outputs")


@pytest.mark.parametrize("q_rank", [None, 5])
def test_steps_over_the_latents_give_the_full_pass(q_rank: int | None) -> None:
    """One token at a time and several, absorbed or not; and a token leaves C + R numbers of 8 bytes."""
    x = normal(1, 2, 9, 10)
    for absorbs in (True, False):
        layer = filled(q_rank=q_rank, causal=True, absorb=absorbs, bias=True)
        want = layer(x)
        state, outs = layer.init_state(2, 9, dtype=torch.float64), []
        for part in x.split([1, 1, 4, 1, 2], 1):
            assert layer._absorbs(part.shape[1]) == (absorbs and part.shape[1] * (2 * 7 - 8) < 8 * 7)
            out, state = layer.step(part, state)
            outs.append(out)
        close(torch.cat(outs, 1), want, f"absorb={absorbs}")
        assert state.nbytes == 2 * 9 * (7 + 4) * 8, "and with 3 heads of keys and values it would be 3 * (7 + 5)"


def test_many_tokens_at_once_are_expanded() -> None:
    """Over the latents 30 queries would cost more than keys and values for all."""
    layer, x = filled(causal=True), normal(1, 1, 30, 10)
    assert layer._absorbs(9)
    assert not layer._absorbs(30)
    close(layer.step(x, layer.init_state(1, 30, dtype=torch.float64))[0], layer(x))


def test_a_full_latent_holds_any_multi_head_attention() -> None:
    """With C as wide as all keys and values together, and nothing turned, the latent is these themselves."""
    heads, width, dim = 2, 3, 6
    layer = filled(dim, heads, kv_rank=12, nope_dim=width, rope_dim=0, value_dim=width)
    x = normal(1, 2, 5, dim)
    wk, wv = normal(7, 6, dim), normal(8, 6, dim)
    with torch.no_grad():
        layer.kv_a_proj_with_mqa.weight.copy_(torch.cat([wk, wv]))
        layer.kv_a_layernorm.weight.fill_(1)
        one = torch.eye(12, dtype=torch.float64)
        layer.kv_b_proj.weight.copy_(one[[0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]])  # of a head, keys and then values
    length = (torch.cat([x @ wk.T, x @ wv.T], -1).square().mean(-1, keepdim=True) + 1e-6).sqrt()
    q, k, v = (
        z.unflatten(-1, (heads, width)).transpose(1, 2) for z in (layer.q_proj(x), x @ wk.T / length, x @ wv.T / length)
    )
    mixed = (q @ k.mT / math.sqrt(width)).softmax(-1) @ v
    close(layer(x), layer.o_proj(mixed.transpose(1, 2).flatten(2)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rope_dim is no multiple of pair = 2 \(got 3\)"):
        MultiHeadLatentAttention(8, 2, rope_dim=3)
    with pytest.raises(ValueError, match="kv_rank is too small"):
        MultiHeadLatentAttention(8, 2, kv_rank=0)
    layer = filled(causal=True)
    with pytest.raises(TypeError, match="state has the wrong type"):
        layer.step(normal(0, 1, 1, 10), None)
    with pytest.raises(ValueError, match="a layer built with causal=True"):
        filled().init_state(1, 4)

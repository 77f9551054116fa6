"""Differential attention against loops, transformers' DiffLlama and its numbers (differential.npz)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers.naive_differential import naive_differential
from regard import masks
from regard.laws.agreement import close
from regard.mixers.differential import DifferentialAttention, difference, lambda_of_layer, paired_values

VECTORS = Path(__file__).parents[1] / "vectors" / "differential.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = 10, heads: int = 4, seed: int = 0, **options) -> DifferentialAttention:
    layer = DifferentialAttention(dim, heads, **{"head_dim": 4, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer.eval()


def angles(positions: Tensor, width: int = 4) -> Tensor:
    return positions[..., None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def naive(layer: DifferentialAttention, x: Tensor, **given) -> Tensor:
    sizes = {"heads": layer.num_heads, "groups": layer.num_kv_heads, "eps": layer.eps, "pairing": layer.pairing}
    return naive_differential(x, dict(layer.named_parameters()), lambda_init=layer.lambda_init, **sizes, **given)


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("pairing", ["adjacent", "split"])
@pytest.mark.parametrize(
    ("heads", "groups", "rotary", "weight"), [(4, 4, True, True), (8, 2, False, False), (4, 2, True, False)]
)
def test_is_the_definition(heads: int, groups: int, rotary: bool, weight: bool, pairing: str) -> None:
    options = {"num_kv_heads": groups, "pairing": pairing, "norm_weight": weight, "base": 1e4 if rotary else None}
    layer = filled(heads=heads, bias=True, layer_index=2, eps=0.1, **options)
    x = normal(1, 2, 4, 10).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    where = torch.tensor([[0, 1, 2, 3], [5, 6, 8, 9]])
    want = naive(layer, x, allowed=allowed, angles=angles(where) if rotary else None)
    got = layer(x, mask=allowed[:, None], positions=where)
    close(got, want, "out")
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("pairing", ["adjacent", "split"])
def test_attends_to_other_tokens(pairing: str) -> None:
    layer = filled(pairing=pairing)
    x, context = normal(1, 2, 3, 10).requires_grad_(), normal(2, 2, 5, 10).requires_grad_()
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    turns, of_keys = (angles(torch.arange(*ends)).expand(2, -1, -1) for ends in ((2, 5), (5,)))
    allowed = keep[:, None].expand(-1, 3, -1)
    want = naive(layer, x, context=context, angles=turns, angles_of_keys=of_keys, allowed=allowed)
    got = layer(x, context, mask=masks.padding(keep))
    close(got, want, "out")
    same_gradients(got, want, [x, context, *layer.parameters()])


@pytest.mark.parametrize(("case", "groups", "index"), [("a", 2, 0), ("b", 4, 3)])
def test_gives_transformers_numbers(case: str, groups: int, index: int) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    options = {"num_kv_heads": groups, "pairing": "split", "norm_weight": False, "bias": case == "b"}
    layer = filled(layer_index=index, **options)
    layer.load_state_dict({name: z[name] for name in layer.state_dict()})
    close(torch.tensor(layer.lambda_init, dtype=torch.float64), z["lambda_init"])
    close(layer.share().detach(), z["lambda"])
    x = z["x"].requires_grad_()
    out = layer(x, mask=z["allow"][:, None])
    close(out, z["out"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, layer.lambda_q1, layer.q_proj.weight])
    for got, name in zip(grads, ("gx", "glambda_q1", "gq"), strict=True):
        close(got, z[name], name)


@pytest.mark.parametrize(("groups", "index", "bias"), [(4, 0, False), (2, 5, True)])
def test_is_transformers_diffllama(groups: int, index: int, bias: bool) -> None:
    from transformers.models.diffllama.configuration_diffllama import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": groups, "head_dim": 4}
    config = DiffLlamaConfig(**sizes, attention_bias=bias, attn_implementation="eager", rms_norm_eps=1e-5)
    theirs = DiffLlamaAttention(config, index).double()
    options = {"num_kv_heads": groups, "pairing": "split", "norm_weight": False}
    layer = filled(16, layer_index=index, bias=bias, causal=True, **options)
    theirs.load_state_dict(layer.state_dict())
    x = normal(5, 2, 6, 16)
    turns = torch.cat([angles(torch.arange(6))] * 2, -1).expand(2, -1, -1)
    want, _ = theirs(x, (turns.cos(), turns.sin()), torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1))
    assert (layer(x) - want).abs().mean() < 1e-6, "their softmax is in float32"


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 4), (12, 4)])
def test_both_pairings_are_one_up_to_the_order_of_heads(heads: int, groups: int) -> None:
    adjacent = filled(heads=heads, num_kv_heads=groups)
    split = filled(heads=heads, num_kv_heads=groups, pairing="split")

    def sorted_apart(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (-1, 2, 4)).transpose(0, 1).flatten(0, 2)

    state = adjacent.state_dict()
    for name in "qkv":
        state[f"{name}_proj.weight"] = sorted_apart(state[f"{name}_proj.weight"])
    split.load_state_dict(state)
    x = normal(1, 2, 5, 10)
    if heads == groups:
        close(split(x), adjacent(x))
    else:  # grouped, neighbours of a pair read one key head, and heads far apart two
        assert (split(x) - adjacent(x)).abs().max() > 1e-3


def test_equal_maps_leave_lambda_without_effect() -> None:
    """o = (1 - lambda) A W, whose length the norm takes away."""
    layer, x = filled(heads=2, eps=0.0, norm_weight=False), normal(1, 2, 5, 10)
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj):
            proj.weight[4:] = proj.weight[:4]
        layer.lambda_q1.zero_()
        before = layer(x)
        layer.lambda_q2.zero_()
        assert 0 < layer.share() < 1
        out = layer(x)
        layer.lambda_q1.copy_(torch.tensor([0.1, 0, 0, 0]))
        layer.lambda_k1.copy_(torch.tensor([1.0, 0, 0, 0]))
        assert 0 < layer.share() < 1
        close(layer(x), out)
    assert torch.isfinite(before).all()


def test_noise_that_both_maps_see_cancels() -> None:
    """30 distractors and a needle that one map of the pair scores higher by 2. Softmax gives it a fifth; the difference
    of the maps, at lambda 0.8, points at it."""
    dim, n = 32, 31
    layer = DifferentialAttention(dim, 2, head_dim=16, lambda_init=0.8, base=None, norm_weight=False).double()
    tokens = torch.zeros(1, n, dim, dtype=torch.float64)
    tokens[0, :, 0] = 1  # what every key has
    tokens[0, 5, 1] = 1  # what marks the needle
    noise = normal(3, n, dim - 2)
    tokens[0, :, 2:] = noise / noise.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.q_proj.weight[0, 0] = 8.0  # the first map asks for the mark, the second for nothing
        layer.k_proj.weight[0, 1] = 1.0
        for row in range(dim - 2):
            layer.v_proj.weight[row, row + 2] = 1.0
        layer.o_proj.weight.copy_(torch.eye(dim))
        out = layer(tokens)[0, 0]
    needle = torch.cat([tokens[0, 5, 2:], torch.zeros(2, dtype=torch.float64)])
    others = torch.cat([tokens[0, :, 2:], torch.zeros(n, 2, dtype=torch.float64)], 1)
    likeness = torch.cosine_similarity(out[None], others)
    assert likeness.argmax() == 5
    assert torch.cosine_similarity(out, needle, 0) > 0.95
    weights = torch.full((n,), 1 / (n - 1 + math.exp(2)), dtype=torch.float64)
    weights[5] *= math.exp(2)
    assert torch.cosine_similarity(weights @ others, needle, 0) < 0.9, "the same scores and one softmax"
    assert weights[5] < 0.2


def test_rows_of_the_difference_sum_to_what_is_left() -> None:
    """1 - lambda, and some are negative: nothing is clamped or made to sum to 1."""
    maps = normal(0, 1, 4, 3, 6).softmax(-1)
    for pairing in ("adjacent", "split"):
        left = difference(maps, torch.tensor(0.7, dtype=torch.float64), pairing)
        close(left.sum(-1), torch.full((1, 2, 3), 0.3, dtype=torch.float64))
        assert (left < 0).any()


def test_values_of_a_pair_are_two_heads_side_by_side() -> None:
    v = normal(0, 1, 4, 3, 2)
    split, adjacent = paired_values(v, "split"), paired_values(v, "adjacent")
    for g, (s, a) in enumerate([((0, 2), (0, 1)), ((1, 3), (0, 1)), ((0, 2), (2, 3)), ((1, 3), (2, 3))]):
        assert torch.equal(split[:, g], torch.cat([v[:, h] for h in s], -1))
        assert torch.equal(adjacent[:, g], torch.cat([v[:, h] for h in a], -1))


def test_starts_as_the_authors_start() -> None:
    torch.manual_seed(0)
    layer = regard.create("differential", dim=512, num_heads=2, layer_index=4)
    assert layer.lambda_init == lambda_of_layer(4) == 0.8 - 0.6 * math.exp(-1.2)
    vectors = torch.cat([layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2]).detach()
    assert abs(vectors.std().item() / 0.1 - 1) < 4 / math.sqrt(2 * 1024)
    assert torch.equal(layer.norm_weight, torch.ones(512))
    assert lambda_of_layer(0) == pytest.approx(0.2)


def test_a_stream_keeps_plain_keys_and_values() -> None:
    layer = filled(num_kv_heads=2, causal=True)
    state = layer.init_state(1, 8, dtype=torch.float64)
    assert {name: tuple(b.shape) for name, b in state.buffers.items()} == {"k": (1, 2, 8, 4), "v": (1, 2, 8, 4)}


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"num_heads is no multiple of pair = 2 \(got 3\)"):
        DifferentialAttention(12, 3)
    with pytest.raises(ValueError, match=r"num_kv_heads is no multiple of pair = 2 \(got 1\)"):
        DifferentialAttention(12, 2, num_kv_heads=1)
    with pytest.raises(ValueError, match="lambda_init is out of range"):
        DifferentialAttention(8, 2, lambda_init=1.0)
    with pytest.raises(ValueError, match="head_dim is odd"):
        DifferentialAttention(12, 4)

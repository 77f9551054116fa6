"""Massive activations against loops, and planted in a model: found, attended to, taken out."""

import pytest
import torch
from tests.inspect.analyses.naive_massive_activations import naive_bias, naive_massive
from tests.inspect.analyses.test_rollout import maps
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from regard.inspect.analyses.head_behaviour import attention_mass
from regard.inspect.analyses.massive_activations import (
    attention_bias,
    block_outputs,
    blocks_of,
    magnitude_profile,
    marked_tokens,
    massive_activations,
    replace_activations,
)
from regard.laws.agreement import close


def planted() -> list[Tensor]:
    """Three layers: values of about 0.1, with a few great ones."""
    hidden = [0.1 * torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(3)]
    hidden[1][0, 0, 3], hidden[1][1, 2, 7] = 800.0, -300.0
    hidden[2][0, 0, 3] = 790.0
    hidden[2][1, 2, 7] = 99.0  # below the floor
    hidden[0][1] *= 100
    hidden[0][1, 4, 4] = 500.0  # less than 1000 times its median
    return hidden


def test_by_hand() -> None:
    found = massive_activations(planted())
    at = torch.stack(found[:4], 1).tolist()
    assert at == [[1, 0, 0, 3], [1, 1, 2, 7], [2, 0, 0, 3]]
    assert found.value.tolist() == [800.0, -300.0, 790.0]
    assert found.times_median.min() > 1000
    tokens = marked_tokens(found, 2, 5)
    assert tokens.nonzero().tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize(("floor", "ratio"), [(100.0, 1000.0), (0.15, 2.0), (0.0, 3.0)])
def test_equals_the_loops(floor: float, ratio: float) -> None:
    hidden = planted()
    found = massive_activations(hidden, floor=floor, ratio=ratio)
    assert list(zip(*(x.tolist() for x in found[:4]), strict=True)) == naive_massive(hidden, floor, ratio)
    weights, values = maps(1, 2, 3, 4, 6)[0], torch.randn(2, 3, 6, 5, dtype=torch.float64)
    tokens = torch.rand(2, 6) > 0.5
    bias, rest = attention_bias(weights, values, tokens)
    for b in range(2):
        for h in range(3):
            want = naive_bias(weights[b, h], values[b, h], tokens[b].tolist())
            close(bias[b, h], want[0])
            close(rest[b, h], want[1])
    close(bias + rest, weights @ values)


def test_profile_of_magnitudes() -> None:
    top, median = magnitude_profile(planted(), top=2)
    assert top.shape == (3, 2, 2)
    assert median.shape == (3, 2)
    assert top[1, 0, 0] == 800
    assert top[0, 0, 0] < 1
    assert (top[..., 0] >= top[..., 1]).all()


# --- In a model ---------------------------------------------------------------------------------------------


def gpt() -> GPT2LMHeadModel:
    """Width 5 of the first position is massive, and key 5 of layer 2's heads is read by all queries."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.transformer.wpe.weight[0, 5] = 2000.0
        second = model.transformer.h[1]
        query, key = second.attn.c_attn.weight[:, :16], second.attn.c_attn.weight[:, 16:32]
        query.zero_()
        key.zero_()
        second.attn.c_attn.bias[:32] = 1.0
        key[5] = 5.0
    return model


def test_sinks_of_a_model() -> None:
    """The claim, in small: what is massive marks the token that attention goes to, and without it the sink is gone."""
    model, ids = gpt(), torch.randint(20, (2, 6))
    blocks = blocks_of(model)
    assert blocks == list(model.transformer.h)
    with torch.no_grad(), block_outputs(blocks) as hidden:
        out = model(ids, output_attentions=True, output_hidden_states=True)
        assert len(hidden) == 3
        for got, want in zip(hidden[:2], out.hidden_states[1:], strict=False):
            assert torch.equal(got, want)
        model(ids[:1])
        assert [h.shape[0] for h in hidden] == [1] * 3, "each pass begins anew"
        model(ids)
    found = massive_activations(hidden[:2])
    tokens = marked_tokens(found, 2, 6)
    assert tokens.tolist() == [[True, False, False, False, False, False]] * 2
    assert set(found.width.tolist()) == {5}
    mass = attention_mass(out.attentions, tokens)
    assert mass[1].min() > 0.9 > mass[[0, 2]].max()
    places = torch.tensor([[0, 5]])
    with torch.no_grad(), replace_activations(blocks[0], places, 0.0):
        without = model(ids, output_attentions=True)
    assert attention_mass(without.attentions, tokens)[1].max() < 0.6
    mean = hidden[0][:, 0, 5].mean(0, keepdim=True)
    with torch.no_grad(), replace_activations(blocks[0], places, mean):
        torch.testing.assert_close(model(ids).logits, out.logits)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, out.logits), "the model is as it was"


def test_hooks_go_even_after_an_error() -> None:
    block = nn.Linear(3, 3)
    with pytest.raises(RuntimeError), block_outputs([block]):
        raise RuntimeError
    with pytest.raises(RuntimeError), replace_activations(block, torch.zeros(1, 2, dtype=torch.long), 0.0):
        raise RuntimeError
    assert not block._forward_hooks


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"massive_activations: hidden\[0\] .*\(got \(2, 3\)\); expected \(B, T, M\)"):
        massive_activations([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"massive_activations: ratio is out of range \(got -1\); expected .*>= 0"):
        massive_activations(planted(), ratio=-1)
    with pytest.raises(
        ValueError, match=r"magnitude_profile: top is too small \(got 0\); expected an int from 1 to 40"
    ):
        magnitude_profile(planted(), top=0)
    with pytest.raises(
        ValueError, match=r"attention_bias: values .*\(got \(1, 2, 4, 3\)\); expected \(B = 1, H = 2, S = 3, V\)"
    ):
        attention_bias(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attention_bias: tokens has the wrong dtype \(got torch.float32"):
        attention_bias(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"blocks_of: model has no list of like modules \(got Linear\)"):
        blocks_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"block_outputs: blocks is empty \(got \[\]\)"), block_outputs([]):
        pass
    places = torch.ones(1, 2)
    with (
        pytest.raises(TypeError, match=r"replace_activations: places has the wrong dtype \(got torch.float32"),
        replace_activations(nn.Linear(2, 2), places, 0.0),
    ):
        pass

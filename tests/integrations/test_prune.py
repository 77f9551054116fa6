"""Heads that are cut are gone: the model is smaller, gives what it gave with them silenced, and is saved as it is."""

import copy

import pytest
import torch

import regard
from integrations import tiny
from regard.integrations.interface import layers
from regard.integrations.transformers_check import outputs, quiet, self_check

transformers = pytest.importorskip("transformers")
GROUPED = {"llama", "qwen2", "qwen3", "gemma2", "gpt_oss"}
CHOSEN = {name: [2, 3] if name in GROUPED else [1] for name in tiny.MODELS}
"""Of those whose query heads share two key heads, the second group."""


def model(name):
    torch.manual_seed(0)
    return tiny.MODELS[name]().eval()


def run(its, inputs):
    with quiet(its):
        return outputs(its, inputs, cached=False)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_pruned_is_silenced_and_smaller(name):
    its = model(name)
    everywhere = dict.fromkeys(range(len(layers(its))), CHOSEN[name])
    inputs = self_check(its, None).inputs
    gates = [torch.ones(4) for _ in layers(its)]
    for gate in gates:
        gate[CHOSEN[name]] = 0
    with regard.scale_heads(its, gates):
        silenced = run(its, inputs)
    pruned = regard.prune_heads(its, everywhere)
    got = run(its, inputs)
    for key, reference in silenced.items():
        torch.testing.assert_close(got[key], reference, rtol=1e-4, atol=1e-5, msg=key)
    assert pruned.parameters[1] == sum(p.numel() for p in its.parameters()) < pruned.parameters[0]
    assert pruned.heads == {layer.name: CHOSEN[name] for layer in layers(its)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "t5"])
def test_what_the_config_holds_is_saved_and_loaded(name, tmp_path):
    its = model(name)
    pruned = regard.prune_heads(its, dict.fromkeys(range(len(layers(its))), CHOSEN[name]))
    assert pruned.in_config
    its.save_pretrained(tmp_path)
    again = type(its).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in again.parameters()) == pruned.parameters[1]
    inputs = self_check(its, None).inputs
    for key, reference in run(its, inputs).items():
        assert torch.equal(run(again, inputs)[key], reference), key


def test_what_no_config_can_hold_is_loaded_into_a_model_that_is_pruned_alike():
    its, heads = model("bert"), {0: [1, 3], 1: [0]}
    assert not regard.prune_heads(its, heads).in_config
    again = model("bert")
    regard.prune_heads(again, heads)
    again.load_state_dict(its.state_dict())
    inputs = self_check(its, None).inputs
    assert torch.equal(run(again, inputs)["last_hidden_state"], run(its, inputs)["last_hidden_state"])


def test_the_cache_of_a_pruned_model_is_smaller():
    its, ids = model("llama"), torch.arange(3, 9)[None]
    before = its(ids, use_cache=True).past_key_values.layers[0].keys.shape
    regard.prune_heads(its, {0: [0, 1], 1: [2, 3]})
    after = its(ids, use_cache=True).past_key_values.layers[0].keys.shape
    assert (before[1], after[1]) == (2, 1)
    assert its.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_a_pruned_model_trains_and_is_swapped():
    its, ids = model("llama"), torch.arange(3, 9)[None]
    regard.prune_heads(its, {0: [1, 3]})
    its(ids).logits.sum().backward()
    assert its.model.layers[0].self_attn.q_proj.weight.grad.shape[0] == 2 * 8
    before = its(ids).logits
    with regard.swap(its, "softmax"):
        torch.testing.assert_close(its(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_heads_are_cut_again_by_their_new_numbers():
    one, two = model("bert"), model("bert")
    regard.prune_heads(one, {0: [0]})
    regard.prune_heads(one, {0: [0]})
    regard.prune_heads(two, {0: [0, 1]})
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_another_model_of_the_same_config_stays_as_it_is():
    config = transformers.LlamaConfig(**tiny.GROUPED)
    its, other = transformers.LlamaModel(config), transformers.LlamaModel(config)
    assert regard.prune_heads(its, {0: [0, 1], 1: [0, 1]}).in_config
    assert (its.config.num_attention_heads, its.config.num_key_value_heads) == (2, 1)
    assert (other.config.num_attention_heads, other.config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize(
    ("name", "heads", "said"),
    [
        ("bert", {}, r"heads must map layers to heads \(got {}\)"),
        ("bert", {7: [0]}, r"heads names no layer \(got 7\); expected 0 to 1, or one of encoder"),
        ("bert", {"nowhere": [0]}, r"heads names no layer \(got 'nowhere'\)"),
        ("bert", {0: [4]}, r"encoder.layer.0.attention.self has no such head \(got 4\); expected 0 to 3"),
        ("bert", {0: [-1]}, r"heads is too small \(got -1\)"),
        ("bert", {0: range(4)}, r"would have no head left \(got all 4\)"),
        ("llama", {0: [1]}, r"must share alike \(got \[1, 2\] left in each group\)"),
        ("t5", {0: [1]}, r"does not run with layers of these sizes .*as T5 its positions"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_changes_nothing(name, heads, said):
    its = model(name)
    before, config = copy.deepcopy(its.state_dict()), copy.deepcopy(its.config.to_dict())
    with pytest.raises(ValueError, match=said):
        regard.prune_heads(its, heads)
    after = its.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert its.config.to_dict() == config
    self_check(its, None)


def test_queries_normalised_over_all_heads_are_refused():
    torch.manual_seed(0)
    its = transformers.Olmo2Model(transformers.Olmo2Config(**{**tiny.GROUPED, "num_key_value_heads": 4})).eval()
    with pytest.raises(ValueError, match=r"does not run|does not give"):
        regard.prune_heads(its, {0: [1]})
    self_check(its, None)


def test_a_swapped_model_is_refused():
    its = model("bert")
    with regard.swap(its, "softmax"), pytest.raises(ValueError, match="restore it first"):
        regard.prune_heads(its, {0: [1]})

"""Generation under a budget: with room the tokens of transformers' own cache, and never more bytes than told."""

import pytest
import torch
import transformers as tr

import regard
from integrations.tiny import GROUPED, shared, tiny
from regard.integrations.transformers_kept import turn_of

PADDED = {"input_ids": torch.tensor([[0, 0, 0, 0, 7, 9], [5, 6, 7, 8, 9, 10], [0, 11, 12, 13, 5, 3]])}
PADDED["attention_mask"] = (PADDED["input_ids"] != 0).long()
TIGHT = {"snapkv": "snapkv(budget=6, window=2)", "adakv": "adakv(budget=6, window=2)", "h2o": "h2o(budget=6)"}
ROOM = "expected_attention(budget=64)"
FEW_BITS = "kivi(group=4, residual=4)"


def generated(model, inputs=PADDED, new=12, **options):
    return model.generate(**inputs, min_new_tokens=new, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_room_for_all_changes_nothing(name):
    model = tiny(name)
    with regard.swap(model, "softmax", check=False):
        want = [generated(model, num_beams=n) for n in (1, 3)]
    for policy in ("snapkv(budget=64)", "adakv(budget=1.0)", "h2o(budget=1.0)", "kivi", ROOM):
        with regard.swap(model, cache=policy, check=False):
            assert torch.equal(generated(model), want[0]), policy
            assert torch.equal(generated(model, num_beams=3), want[1]), policy


@pytest.mark.parametrize("policy", [*TIGHT.values(), FEW_BITS])
def test_padded_rows_are_as_alone(policy):
    model = tiny("llama")
    with regard.swap(model, cache=policy, check=False):
        got = generated(model)[:, -12:]
        for row, keep, tokens in zip(PADDED["input_ids"], PADDED["attention_mask"].bool(), got, strict=True):
            assert torch.equal(generated(model, {"input_ids": row[keep][None]})[0, -12:], tokens)


@pytest.mark.parametrize("policy", [*TIGHT.values(), FEW_BITS])
def test_a_budget_is_felt(policy):
    model = tiny("llama")
    with regard.swap(model, cache=policy, check=False):
        got = generated(model)
    assert not torch.equal(generated(model), got)


@pytest.mark.parametrize("policy", [*TIGHT.values(), FEW_BITS])
def test_beams_keep_what_is_theirs(policy):
    """The score of each sequence is that of its tokens, told one by one to a cache of its own."""
    model = tiny("llama")
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])}
    with regard.swap(model, cache=policy, check=False):
        out = generated(
            model, prompt, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
        )
        alone, at = tr.DynamicCache(config=model.config), 8
        logits = model(out.sequences[:, :8], past_key_values=alone).logits[:, -1]
        total = 0.0
        while at < out.sequences.shape[1]:
            token = out.sequences[:, at : at + 1]
            allowed = logits.log_softmax(-1)
            total += float(allowed[0, token[0, 0]])
            logits, at = model(token, past_key_values=alone).logits[:, -1], at + 1
    assert total == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "adakv", "h2o", "tova", "streaming_llm", "keydiff", "pyramidkv"])
@pytest.mark.parametrize("budget", [64, 0.25])
def test_bytes_are_those_of_the_budget(name, budget):
    model = tr.AutoModelForCausalLM.from_pretrained("models/small")
    prompt = {"input_ids": torch.randint(32, 120, (2, 200), generator=torch.Generator().manual_seed(0))}
    options = {"window": 8} if name in ("snapkv", "adakv", "pyramidkv") else {}
    with regard.swap(model, cache=regard.create(name, budget=budget, **options), check=False):
        out = generated(model, prompt, new=40, return_dict_in_generate=True)
    config, n = model.config, budget if budget > 1 else budget * 239
    told = 2 * 3 * config.num_key_value_heads * 2 * config.hidden_size // config.num_attention_heads * 4 * n
    held = sum(_bytes(layer.held) for layer in out.past_key_values.layers)
    assert 0.8 * told <= held <= 1.1 * told
    assert held == sum(layer.nbytes for layer in out.past_key_values.layers)
    assert out.past_key_values.get_seq_length() == 239


def test_bytes_are_those_of_the_bits():
    model = tr.AutoModelForCausalLM.from_pretrained("models/small")
    prompt = {"input_ids": torch.randint(32, 120, (2, 200), generator=torch.Generator().manual_seed(0))}
    with regard.swap(model, cache="kivi(bits=4, group=16, residual=16)", check=False):
        out = generated(model, prompt, new=40, return_dict_in_generate=True)
    config, layers = model.config, out.past_key_values.layers
    told = 2 * 3 * config.num_key_value_heads * 2 * config.hidden_size // config.num_attention_heads * 4 * 239
    held = sum(_bytes(layer.held) for layer in layers)
    assert held == sum(layer.nbytes for layer in layers)
    assert held < 0.4 * told, "an eighth, as much again for scales of 16, the residual, and positions"


def test_queries_before_rotation():
    """What expected attention undoes is the rotation alone; where that isn't known it is refused."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    model = tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED, rope_parameters=yarn)).eval()
    rotary, layer = model.model.rotary_emb, model.model.layers[0].self_attn
    assert rotary.attention_scaling > 1.1
    turn, z, at = turn_of(model, layer, needed=True), torch.randn(1, 2, 7, 8), torch.arange(7)
    torch.testing.assert_close(turn(turn(z, at), -at), z)
    cos, sin = rotary(z, at[None])
    want = tr.models.llama.modeling_llama.apply_rotary_pos_emb(z, z, cos, sin)[0]
    torch.testing.assert_close(turn(z, at) * rotary.attention_scaling, want)
    with regard.swap(model, cache="expected_attention(budget=6, sinks=1)", check=False):
        assert generated(model).shape == (3, 18)
    assert turn_of(tiny("gpt2"), tiny("gpt2").transformer.h[0].attn, needed=True) is None
    moving = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    gemma = tr.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, layer_types=["full_attention"] * 2)
    for other, why in (
        (tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED, rope_parameters=moving)), "change with the length"),
        (tr.Gemma3ForCausalLM(gemma), "asks for more than positions"),
    ):
        with pytest.raises(ValueError, match=f"must know how .* rotates queries.*{why}"):
            regard.swap(other.eval(), cache="expected_attention", check=False)
        with regard.swap(other.eval(), cache="tova", check=False):
            pass


def _bytes(held, seen=None):
    """Of every tensor that can be reached, each memory once, whole."""
    seen = {} if seen is None else seen
    if isinstance(held, torch.Tensor):
        seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    elif isinstance(held, dict | tuple):
        [_bytes(one, seen) for one in (held.values() if isinstance(held, dict) else held)]
    elif hasattr(held, "__dict__"):
        _bytes(vars(held), seen)
    return sum(seen.values())


def test_a_trained_model_recalls_under_a_budget():
    model = tr.AutoModelForCausalLM.from_pretrained("models/small")
    ask = b"ab=xy\nqr=lm\ntz=kf\n" + b"".join(b"%c%c=no\n" % (97 + n, 98 + n) for n in range(12)) + b"qr="
    prompt = {"input_ids": torch.tensor([[256, *ask]])}
    want = generated(model, prompt, new=2)
    assert bytes(want[0, -2:].tolist()) == b"lm"
    for policy, right in (
        ("snapkv(budget=1.0)", True),
        ("snapkv(budget=40, window=4)", True),
        ("streaming_llm(budget=40)", False),
    ):
        with regard.swap(model, cache=policy, check=False):
            assert torch.equal(generated(model, prompt, new=2), want) is right, policy


def test_what_it_refuses():
    model = shared("llama")
    with pytest.raises(TypeError, match="swap: mechanism is missing"):
        regard.swap(model)
    with pytest.raises(TypeError, match="swap: cache has the wrong type"):
        regard.swap(model, cache=3, check=False)
    with pytest.raises(ValueError, match="counts keys that a policy drops"):
        regard.swap(model, "window", window=4, cache="tova", check=False)
    with pytest.raises(ValueError, match="is for a decoder alone"):
        regard.swap(shared("t5"), cache="tova", check=False)
    filled = tr.DynamicCache(config=model.config)
    model(PADDED["input_ids"], past_key_values=filled)
    with regard.swap(model, cache="tova", check=False) as swapped:
        with pytest.raises(ValueError, match="holds tokens from before"):
            model(PADDED["input_ids"], past_key_values=filled)
        with pytest.raises(ValueError, match="came with a cache policy"):
            swapped.save_pretrained("nowhere")
        inside = tr.DynamicCache(config=model.config)
        model(PADDED["input_ids"], past_key_values=inside)
        with pytest.raises(ValueError, match="asks for dropped keys again"):
            inside.crop(-1)
    with pytest.raises(ValueError, match="a restored swap"):
        model(PADDED["input_ids"][:, :1], past_key_values=inside)
    assert torch.equal(generated(model), generated(tiny("llama"))), "as before"

"""Mechanisms by name: `set_attn_implementation("regard:window")`."""

import copy

import pytest
import torch
import transformers as tr

import regard
from integrations.tiny import BASE, MODELS, batch, bound, off, outputs, tiny
from regard.integrations.transformers import register
from regard.integrations.transformers_check import under_eager

register()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma2", "gpt_oss", "bert", "t5", "vit", "whisper"])
def test_softmax_by_name_is_eager_attention_with_padding(kind):
    model, inputs = tiny(kind), batch(kind)
    with torch.no_grad():
        with under_eager(model):
            want = outputs(model, inputs)
        model.set_attn_implementation("regard:softmax")
        assert off(outputs(model, inputs), want) <= bound(kind)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize(
    ("told", "mechanism", "options"),
    [
        ("window(window=3)", "window", {"window": 3}),
        ("sparsemax", "sparsemax", {}),
        ("alibi", "alibi", {}),
        ("window(window=3)+entmax(alpha=1.4)", "window+entmax", {"window": 3, "alpha": 1.4}),
    ],
)
def test_a_name_does_what_the_swap_does(kind, told, mechanism, options):
    model, inputs = tiny(kind), batch(kind)
    with torch.no_grad():
        before = outputs(model, inputs)
        with regard.swap(model, mechanism, **options):
            want = outputs(model, inputs)
        model.set_attn_implementation(f"regard:{told}")
        got = outputs(model, inputs)
        assert off(got, want) <= 1e-12
        assert off(got, before) > 1e-4
        copied = copy.deepcopy(model)
        assert torch.equal(outputs(copied, inputs), got)
        model.set_attn_implementation("sdpa")
        assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_no_token_sees_later_ones(kind):
    model, ids = tiny(kind), batch(kind)["input_ids"][:1]
    model.set_attn_implementation("regard:window(window=4)")
    with torch.no_grad():
        assert off(model(ids[:, :5]).logits, model(ids).logits[:, :5]) <= 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_generation_with_a_cache_and_padding(kind):
    model, inputs = tiny(kind), batch(kind)
    inputs = {name: t[:2] for name, t in inputs.items() if not name.startswith("decoder")}
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with regard.swap(model, "window", window=3):
        want = model.generate(**inputs, **asked)
    model.set_attn_implementation("regard:window(window=3)")
    assert torch.equal(model.generate(**inputs, **asked), want)
    assert torch.equal(model.generate(**inputs, **asked, use_cache=False), want)


def test_a_token_alone_before_a_longer_text():
    model, ids = tiny("llama"), batch("llama")["input_ids"][:1]
    model.set_attn_implementation("regard:window(window=3)")
    with torch.no_grad():
        want, cache, steps = model(ids).logits, tr.DynamicCache(), []
        for t in range(ids.shape[1]):
            steps.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    assert off(torch.cat(steps, 1), want) <= bound("llama")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_from_pretrained_takes_the_name_and_a_checkpoint_does_not_keep_it(tmp_path, kind):
    model, inputs = tiny(kind), batch(kind)
    model.set_attn_implementation("regard:window(window=3)")
    model.save_pretrained(tmp_path)
    load = {"dtype": torch.float64, "attn_implementation": "regard:window(window=3)"}
    again = type(model).from_pretrained(tmp_path, **load).eval()
    assert again.config._attn_implementation == "regard:window(window=3)"
    with torch.no_grad():
        # Weights that lie elsewhere in memory may be summed in another order, under sdpa too.
        assert off(outputs(again, inputs), outputs(model, inputs)) <= 1e-13
        assert off(outputs(copy.deepcopy(again), inputs), outputs(model, inputs)) <= 1e-13
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_without_registering_the_error_is_transformers_own(monkeypatch):
    registered = tr.PreTrainedModel.get_correct_attn_implementation
    monkeypatch.setattr(tr.PreTrainedModel, "get_correct_attn_implementation", registered.__wrapped__)
    with pytest.raises(ValueError, match="The only possible arguments are"):
        tr.BertModel._from_config(tr.BertConfig(**BASE), attn_implementation="regard:window(window=59)")


def test_gradients_are_those_of_the_swap():
    model, inputs = tiny("llama"), batch("llama")

    def gradients():
        model.zero_grad()
        outputs(model, inputs).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with regard.swap(model, "entmax"):
        want = gradients()
    model.set_attn_implementation("regard:entmax")
    assert off(gradients(), want) <= 1e-12


def test_a_swap_and_gates_stand_on_a_name():
    model, inputs = tiny("llama"), batch("llama")
    model.set_attn_implementation("regard:window(window=3)")
    with torch.no_grad():
        want = outputs(model, inputs)
        with regard.swap(model, "sparsemax", layers=[1]):
            assert off(outputs(model, inputs), want) > 1e-4
        with regard.scale_heads(model, torch.ones(2, 4)):
            assert torch.equal(outputs(model, inputs), want)
        assert torch.equal(outputs(model, inputs), want)
    assert model.config._attn_implementation == "regard:window(window=3)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("regard:windw", "window"),
        ("regard:", "mechanism"),
        ("regard:window(windw=3)", "window"),
        ("regard:gated", r"regard\.swap\(model, 'gated'\)"),
        ("regard:biformer", "no softmax pipeline"),
    ],
)
def test_refused_names_leave_the_model_as_it_was(name, said):
    model = tiny("llama")
    with pytest.raises(ValueError, match=said):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_the_mechanism_cannot_serve_says_why():
    model, inputs = tiny("llama"), batch("llama")
    model.set_attn_implementation("regard:rotary")
    with pytest.raises(ValueError, match="the model has rotated them already"):
        model(**inputs)


def test_other_names_go_to_transformers_as_before():
    model = MODELS["bert"]()
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("window")

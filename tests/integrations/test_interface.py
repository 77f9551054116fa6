"""Switching a model to another attention function: what is passed on, and that nothing is left behind."""

import copy
import gc
import weakref

import pytest
import torch
import transformers as tr
from torch import nn

from integrations.tiny import BASE, IMAGE, batch, outputs, shared, tiny
from regard.integrations.interface import Interception, interceptions, layers
from regard.integrations.transformers import scale_heads, swap


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [("model.layers.0.self_attn", 0, "self", ""), ("model.layers.1.self_attn", 1, "self", "")]),
        (
            "t5",
            [
                ("encoder.block.0.layer.0.SelfAttention", 0, "self", "encoder"),
                ("encoder.block.1.layer.0.SelfAttention", 1, "self", "encoder"),
                ("decoder.block.0.layer.0.SelfAttention", 0, "self", "decoder"),
                ("decoder.block.0.layer.1.EncDecAttention", 0, "cross", "decoder"),
                ("decoder.block.1.layer.0.SelfAttention", 1, "self", "decoder"),
                ("decoder.block.1.layer.1.EncDecAttention", 1, "cross", "decoder"),
            ],
        ),
    ],
)
def test_layers_are_named_in_order(name, expected):
    assert [(layer.name, layer.index, layer.kind, layer.side) for layer in layers(shared(name))] == expected


def test_stacks_and_kinds_of_other_models():
    assert {layer.side for layer in layers(shared("clip"))} == {"text", "vision"}
    assert [layer.kind for layer in layers(shared("whisper"))] == ["self"] * 3 + ["cross", "self", "cross"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5", "clip"])
def test_passing_on_changes_no_bit(name, implementation):
    model, inputs, seen = tiny(name, torch.float32), batch(name, torch.float32), []
    model.set_attn_implementation(implementation)
    expected = outputs(model, inputs)

    def watched(original, module, *args, **options):
        seen.append(module)
        return original(module, *args, **options)

    with Interception(model, watched):
        assert torch.equal(outputs(model, inputs), expected)
    assert {id(module) for module in seen} == {id(layer.module) for layer in layers(model)}


def test_the_config_is_as_before_also_after_an_error():
    model = tiny("clip")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = [(c, c._attn_implementation, c.to_dict()) for c in (model.config, model.config.text_config)]

    def interrupted(original, *args, **options):
        assert model.config.text_config._attn_implementation.startswith("regard")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Interception(model, interrupted):
        outputs(model, batch("clip"))
    for config, name, held in before:
        assert config._attn_implementation == name
        assert config.to_dict() == held
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert interceptions(model) == []


def test_they_nest_and_end_in_any_order():
    model, inputs, order = tiny("bert"), batch("bert"), []

    def named(name):
        def function(original, *args, **options):
            order.append(name)
            return original(*args, **options)

        return function

    first, second, third = (Interception(model, named(name)) for name in "abc")
    outputs(model, inputs)
    assert order == ["c", "b", "a"] * 2
    order.clear()
    second.restore()
    second.restore()
    outputs(model, inputs)
    assert order == ["c", "a"] * 2
    first.restore()
    third.restore()
    assert model.config._attn_implementation == "sdpa"


def test_models_that_share_a_config_are_told_apart():
    config = tr.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61)
    one, two = tr.GPT2LMHeadModel(config).eval(), tr.GPT2LMHeadModel(config).eval()
    assert one.config is two.config
    ids = torch.arange(12).view(2, 6)
    expected = two(ids).logits
    with Interception(one, lambda original, *args, **options: (original(*args, **options)[0] * 0, None)):
        assert torch.equal(two(ids).logits, expected)
    with swap(one, "window", window=2):
        assert torch.equal(two(ids).logits, expected)


def test_two_models_at_once():
    one, two = tiny("gpt2"), tiny("bert")
    expected = outputs(two, batch("bert"))
    with swap(one, "window", window=2) as swapped:
        with swap(two, "softmax"):
            torch.testing.assert_close(outputs(two, batch("bert")), expected)
            outputs(one, batch("gpt2"))
        assert swapped.report().rows[0].density < 1
    assert one.config._attn_implementation == two.config._attn_implementation == "sdpa"


def test_a_forgotten_model_is_let_go():
    model = tiny("bert")
    swap(model, "window", window=3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copy_that_outlives_the_swap_stays_swapped():
    model, inputs = tiny("bert"), batch("bert")
    with torch.no_grad():
        plain = outputs(model, inputs)
        with swap(model, "entmax"):
            want, kept = outputs(model, inputs), copy.deepcopy(model)
        assert torch.equal(outputs(kept, inputs), want)
        assert torch.equal(outputs(model, inputs), plain)
        del model
        gc.collect()
        assert torch.equal(outputs(kept, inputs), want)
        kept.set_attn_implementation("sdpa")
        assert torch.equal(outputs(kept, inputs), plain)


# --- what outlives a swapped model ----------------------------------------------------------------------------


def test_a_config_that_outlives_a_swapped_model_is_as_before():
    config = tr.CLIPConfig(text_config=BASE, vision_config=IMAGE, projection_dim=16)
    first, second = tr.CLIPModel(config).eval(), tr.CLIPModel(config).eval()
    inputs = batch("clip", torch.float32)
    with torch.no_grad():
        want = outputs(second, inputs)
        swap(first, "entmax")
        copied = copy.deepcopy(config)
        del first
        gc.collect()
        names = {c._attn_implementation for c in (config, config.text_config, config.vision_config)}
        assert names == {"sdpa"}
        assert torch.equal(outputs(second, inputs), want)
        for other in (config, copied):  # the copy still has the name, which means what stood there before
            new = tr.CLIPModel(other).eval()
            new.load_state_dict(second.state_dict())
            assert torch.equal(outputs(new, inputs), want)
        text = tr.CLIPTextModel(copied.text_config).eval()
        assert text(inputs["input_ids"]).last_hidden_state.isfinite().all()


def test_a_config_is_shared_by_two_swapped_models_which_end_in_any_order():
    config = tr.BertConfig(**BASE)
    ids = torch.arange(12).view(2, 6)
    for first_ends_first in (True, False):
        models = [tr.BertModel(config).eval() for _ in range(2)]
        with torch.no_grad():
            plain = [m(ids).last_hidden_state for m in models]
            held = [swap(m, "entmax") for m in models]
            changed = [m(ids).last_hidden_state for m in models]
            assert not any(torch.equal(p, c) for p, c in zip(plain, changed))
            over, left = (0, 1) if first_ends_first else (1, 0)
            held[over].restore()
            assert torch.equal(models[over](ids).last_hidden_state, plain[over])
            assert torch.equal(models[left](ids).last_hidden_state, changed[left])
            held[left].restore()
            assert torch.equal(models[left](ids).last_hidden_state, plain[left])
        assert config._attn_implementation == "sdpa"


@pytest.mark.parametrize("what", ["entmax", "kerple", "gated"])
def test_a_part_that_outlives_a_swapped_model_stays_swapped(what):
    model = tiny("t5")
    ids = batch("t5")["input_ids"]
    with torch.no_grad():
        plain = model.get_encoder()(ids).last_hidden_state
        swap(model, what, layers=lambda layer: layer.kind == "self")
        encoder = model.get_encoder()
        want = encoder(ids).last_hidden_state
        assert not torch.equal(want, plain)
        del model
        gc.collect()
        assert torch.equal(encoder(ids).last_hidden_state, want)
        maps = encoder(ids, output_attentions=True).attentions
        assert [m.shape for m in maps] == [(3, 4, 9, 9)] * 2
        encoder.set_attn_implementation("eager")
        torch.testing.assert_close(encoder(ids).last_hidden_state, plain)


def test_nothing_of_a_collected_model_stays_in_the_registries():
    model = tiny("bert")
    swapped = swap(model, "kerple")
    parts = weakref.ref(next(iter(swapped.parts.values())))
    held = [weakref.ref(one._function) for one in interceptions(model)]
    assert parts() is not None
    assert held
    del model, swapped
    gc.collect()
    assert parts() is None
    assert all(one() is None for one in held)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "expected a transformers model.*Linear"),
        (
            lambda: tr.MambaModel(tr.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)),
            ValueError,
            "registry",
        ),
        (
            lambda: tr.LongformerModel(tr.LongformerConfig(**BASE, attention_window=4)),
            ValueError,
            "no layer of LongformerModel asks",
        ),
        (lambda: tr.DebertaV2Model(tr.DebertaV2Config(**BASE)), ValueError, "no layer of DebertaV2Model asks"),
    ],
)
def test_models_without_the_registry_are_refused(model, error, match):
    with pytest.raises(error, match=match):
        swap(model(), "softmax")


# --- gates on heads ------------------------------------------------------------------------------------------


def head_input(model, layer, inputs):
    """What goes into the output projection of a layer: the heads' outputs side by side."""
    held = {}
    projection = model.get_submodule(layer)
    hook = projection.register_forward_pre_hook(lambda module, args: held.update(x=args[0].detach()))
    model(**inputs)
    hook.remove()
    return held["x"]


@pytest.mark.parametrize(
    ("name", "projections", "grouped"),
    [
        ("gpt2", ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"], False),
        ("llama", ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"], True),
        ("bert", ["encoder.layer.0.attention.output.dense", "encoder.layer.1.attention.output.dense"], False),
    ],
)
def test_a_gate_scales_its_head_and_no_other(name, projections, grouped):
    model, inputs = shared(name), batch(name)
    gates = torch.ones(2, 4, dtype=torch.float64)
    gates[0, 1], gates[0, 2] = 0.0, 0.5
    before = head_input(model, projections[0], inputs).unflatten(-1, (4, -1))
    with scale_heads(model, gates):
        after = head_input(model, projections[0], inputs).unflatten(-1, (4, -1))
    torch.testing.assert_close(after, before * gates[0, :, None])
    assert before.abs().max() > 0


def test_gates_of_one_change_no_bit_and_others_can_be_learned():
    model, inputs = shared("gpt2"), batch("gpt2")
    expected = outputs(model, inputs)
    gates = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with scale_heads(model, gates):
        out = outputs(model, inputs)
        assert torch.equal(out, expected)
        (grad,) = torch.autograd.grad(out.square().mean(), gates)
        step = 1e-6
        moved = gates.detach().clone()
        moved[1, 2] += step
    with scale_heads(model, moved):
        slope = (outputs(model, inputs).square().mean() - expected.square().mean()) / step
    torch.testing.assert_close(grad[1, 2], slope, rtol=1e-4, atol=1e-8)


def test_gates_work_inside_a_swap_and_not_around_one():
    model, inputs = tiny("bert"), batch("bert")
    gates = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.3, 1.0, 1.0, 1.0]], dtype=torch.float64)
    with scale_heads(model, gates):
        expected = outputs(model, inputs)
        with pytest.raises(ValueError, match="scale them inside"):
            swap(model, "softmax")
    with swap(model, "softmax"), scale_heads(model, gates):
        torch.testing.assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("gates", "match"), [(torch.ones(3, 4), "2 attention layers, got 3"), (torch.ones(2, 5), r"must be \(4,\)")]
)
def test_gates_that_do_not_fit_are_refused(gates, match):
    model = tiny("bert")
    with pytest.raises(ValueError, match=match), scale_heads(model, gates):
        outputs(model, batch("bert"))
    assert model.config._attn_implementation == "sdpa"

"""Copies of a model that is swapped, traced or scaled compute what it does, or say why not (L55)."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import regard
from integrations.tiny import batch, off, outputs, tiny
from regard.integrations.interface import Interception, interceptions, layers
from regard.integrations.transformers import Swap


def replica(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes of a model, on the device that it is on already."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, new in made.items():
        for name, child in module._modules.items():
            new._modules[name] = None if child is None else made[child]
        for name, parameter in module._parameters.items():
            new._parameters[name] = parameter
    return made[model]


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "replica": replica}
"""How a model may be copied within a process."""

CHANGES = {
    "a mask": {"mechanism": regard.masks.window(2)},
    "parameters": {"mechanism": "kerple"},
    "a gate": {"mechanism": "gated"},
    "some layers": {"mechanism": regard.masks.window(2), "layers": 1},
    "some heads": {"mechanism": "entmax", "heads": [0, 2]},
    "a selector": {"mechanism": "moba", "block": 2, "topk": 1},
}


@contextmanager
def swapped(model: nn.Module, **options) -> Iterator[Swap]:
    """With parameters that are no longer what they start as, so that they tell."""
    with regard.swap(model, **options) as held, torch.no_grad():
        for n, parameter in enumerate(held.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
        yield held


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", CHANGES)
def test_a_copy_of_a_swapped_model_is_swapped(what: str, how: str):
    model, inputs = tiny("llama"), batch("llama")
    with torch.no_grad():
        plain = outputs(model, inputs)
        with swapped(model, **CHANGES[what]):
            want = outputs(model, inputs)
            assert off(want, plain) > 1e-4, "the swap changes nothing, so that nothing would be tested"
            twin = COPIES[how](model)
            assert torch.equal(outputs(twin, inputs), want)
            assert torch.equal(outputs(model, inputs), want)
        assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("name", ["t5", "clip", "whisper", "gpt2"])
def test_copies_of_models_of_several_stacks(name: str):
    model, inputs = tiny(name), batch(name)
    with torch.no_grad(), swapped(model, mechanism="entmax"):
        want = outputs(model, inputs)
        for make in COPIES.values():
            assert torch.equal(outputs(make(model), inputs), want)


def test_a_copy_has_parameters_of_its_own():
    model, inputs = tiny("llama"), batch("llama")
    with swapped(model, mechanism="kerple+gated"), torch.no_grad():
        want, twin = outputs(model, inputs), copy.deepcopy(model)
        own = [p for name, p in twin.named_parameters() if ".regard." in name]
        assert own
        for parameter in own:
            parameter.add_(1.0)
        assert off(outputs(twin, inputs), want) > 1e-4
        assert torch.equal(outputs(model, inputs), want)


def test_a_copy_counts_for_itself():
    model, inputs = tiny("llama"), batch("llama")
    with swapped(model, mechanism=regard.masks.window(2)) as held:
        held.forget()
        outputs(copy.deepcopy(model), inputs)
        assert [row.calls for row in held.report().rows] == [0, 0]


def test_a_copy_is_told_to_give_weights():
    model, inputs = tiny("bert"), batch("bert")
    with torch.no_grad(), swapped(model, mechanism="entmax"):
        want = model(**inputs, output_attentions=True).attentions
        got = copy.deepcopy(model)(**inputs, output_attentions=True).attentions
        assert len(got) == len(want) == 2
        assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_a_trace_of_a_copy_sees_the_swap():
    model, inputs = tiny("llama"), batch("llama")
    with torch.no_grad(), swapped(model, mechanism="kerple"):
        want = [layer.weights() for layer in regard.trace(model, inputs).layers]
        got = [layer.weights() for layer in regard.trace(copy.deepcopy(model), inputs).layers]
    assert len(got) == len(want) == 2
    assert all(torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_traced_model(how: str):
    """Made while it is traced, in a hook; and its own trace is the model's."""
    model, inputs, made = tiny("llama"), batch("llama"), []
    with torch.no_grad():
        want = outputs(model, inputs)

        def once(*_: object) -> None:
            if not made:
                made.append(COPIES[how](model))

        hook = model.model.layers[0].register_forward_pre_hook(once)
        held = regard.trace(model, inputs)
        hook.remove()
        twin = made[0]
        assert torch.equal(outputs(twin, inputs), want)
        for g, w in zip(regard.trace(twin, inputs).layers, held.layers, strict=True):
            assert torch.equal(g.weights(), w.weights())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_copy_of_a_scaled_model_is_scaled(name: str, how: str):
    model, inputs = tiny(name), batch(name)
    gates = torch.rand(len(layers(model)), 4, dtype=torch.float64, requires_grad=True)
    plain = outputs(model, inputs)
    with regard.scale_heads(model, gates):
        want: Tensor = outputs(model, inputs)
        got: Tensor = outputs(COPIES[how](model), inputs)
    assert off(want.detach(), plain.detach()) > 1e-4
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(out.sum(), gates)[0] for out in (got, want)]
    torch.testing.assert_close(*grads)
    assert grads[1].ne(0).all()
    assert torch.equal(outputs(model, inputs), plain)


def test_a_copy_of_a_swapped_and_scaled_model():
    """And of stacks with attention functions of their own before."""
    model, inputs = tiny("clip"), batch("clip")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    gates = torch.rand(len(layers(model)), 4, dtype=torch.float64)
    with torch.no_grad(), swapped(model, mechanism="entmax", layers=[0, 3]) as held:
        inside = outputs(copy.deepcopy(model), inputs)
        with regard.scale_heads(model, gates):
            twin = copy.deepcopy(model)
            assert torch.equal(outputs(twin, inputs), outputs(model, inputs))
            assert [type(one) for one in interceptions(twin)] == [Interception] * 2
        assert torch.equal(outputs(model, inputs), inside)
        held.restore()
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert interceptions(model) == []


def test_a_copy_goes_back_to_what_each_of_its_stacks_had():
    """Passing on is bit for bit what stood there, which differs by stack."""
    model, inputs = tiny("clip", torch.float32), batch("clip", torch.float32)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    want, names = outputs(model, inputs), {}

    def watched(original, module, *args, **options):
        names.setdefault(held.original_name(module), 0)
        return original(module, *args, **options)

    with Interception(model, watched) as held:
        twin = copy.deepcopy(model)
        assert torch.equal(outputs(twin, inputs), want)
    assert set(names) == {"eager", "sdpa"}


def test_a_copy_can_be_swapped_again():
    model, inputs = tiny("llama"), batch("llama")
    with torch.no_grad(), swapped(model, mechanism=regard.masks.window(3)):
        first, twin = outputs(model, inputs), copy.deepcopy(model)
        with regard.swap(twin, regard.masks.window(1)):
            assert off(outputs(twin, inputs), first) > 1e-4
            assert torch.equal(outputs(model, inputs), first)
        assert torch.equal(outputs(twin, inputs), first)


@pytest.mark.parametrize("what", CHANGES)
def test_a_pickled_model_is_swapped(what: str):
    model, inputs, file = tiny("llama"), batch("llama"), io.BytesIO()
    with torch.no_grad(), swapped(model, **CHANGES[what]):
        want = outputs(model, inputs)
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(outputs(twin, inputs), want)
    assert torch.equal(outputs(twin, inputs), want)


def test_a_pickled_model_is_swapped_in_another_process(tmp_path):
    """Where none of the names are known, and where transformers has not been imported."""
    model, inputs = tiny("t5"), batch("t5")
    regard.swap(model, "kerple", layers=lambda layer: layer.kind == "self")
    regard.swap(model, "entmax", layers=0)
    with torch.no_grad():
        torch.save((model, inputs, outputs(model, inputs)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)  # as here: sums over more threads round otherwise\n"
        "model, inputs, want = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): out = model(**inputs).logits\n"
        "print(torch.equal(out[inputs['attention_mask'].bool()] if out.shape[:2] == inputs['attention_mask'].shape"
        " else out, want))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_what_can_not_be_pickled_says_so():
    model = tiny("llama")
    plain, inputs = outputs(model, batch("llama")), batch("llama")
    with regard.scale_heads(model, torch.ones(2, 4)), pytest.raises(TypeError, match="or its state_dict"):
        pickle.dumps(model)
    rule = regard.masks.predicate(lambda b, h, i, j: i == j)
    with regard.swap(model, rule), pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(model)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), inputs), plain)
    regard.trace(model, inputs)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), inputs), plain)


def test_nothing_is_left_on_the_layers():
    model = tiny("llama")
    before = [set(vars(module)) for module in model.modules()]
    with swapped(model, mechanism="gated"), regard.scale_heads(model, torch.ones(2, 4)):
        pass
    assert [set(vars(module)) for module in model.modules()] == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())

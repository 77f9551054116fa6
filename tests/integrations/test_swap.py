"""Other mechanisms inside a model: sparse ones as they are, changed ones with new parameters, and what is refused."""

import pytest
import torch
import transformers as tr
from torch import nn

import regard
from integrations.tiny import BASE, batch, bound, off, outputs, shared, tiny
from regard import masks
from regard.integrations import transformers_check
from regard.integrations.transformers_check import under_eager
from regard.normalizers import Entmax
from regard.stages import Mix, Selector


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def dense(mask: masks.Mask, T: int) -> torch.Tensor:
    """The mask and causality as transformers takes a mask of the user's own."""
    allowed = (mask & masks.causal()).dense(T)
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float32).min)


SINKS = masks.window(3) | masks.global_tokens(2)


# --- sparse, without training --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("mask", [masks.window(3), SINKS, masks.dilated(2, 2), masks.blocks(4)], ids=str)
def test_a_pattern_equals_the_same_mask_given_to_eager_attention(name, mask):
    model, tokens = shared(name), ids(2, 10)
    with torch.no_grad():
        with under_eager(model):
            expected = model(tokens, attention_mask=dense(mask, 10).expand(2, 1, -1, -1)).logits
        with regard.swap(model, mask) as swapped:
            assert off(model(tokens).logits, expected) <= bound(name)
            kept = (mask & masks.causal()).dense(10).sum() / 55
            assert [row.density for row in swapped.report().rows] == pytest.approx([float(kept)] * 2)
            # Token by token, also where the cache drops what the model's own window can't see.
            swapped.forget()
            cache, steps = tr.DynamicCache(), []
            for t in range(10):
                steps.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
            assert off(torch.cat(steps, 1), expected) <= bound(name)
            assert [row.density for row in swapped.report().rows] == pytest.approx([float(kept)] * 2)
            assert [row.calls for row in swapped.report().rows] == [10, 10]


def test_sinks_stay_the_first_real_tokens_under_left_padding():
    model, tokens = shared("llama"), ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    keep = (padded != 0).long()
    with torch.no_grad(), regard.swap(model, SINKS):
        expected = model(tokens).logits
        assert off(model(padded, attention_mask=keep).logits[:, 4:], expected) <= 1e-6  # rotation has float32 angles
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        short, long = (
            model.generate(t, attention_mask=m, **options) for t, m in ((tokens, tokens * 0 + 1), (padded, keep))
        )
    assert torch.equal(short[:, 9:], long[:, 13:])


@pytest.mark.parametrize("mechanism", ["xattention", "moba"])
def test_selectors_that_keep_all_blocks_are_exact(mechanism):
    model, inputs = shared("llama"), batch("llama")
    with torch.no_grad():
        with under_eager(model):
            expected = outputs(model, inputs)
        with regard.swap(model, mechanism) as swapped:
            assert off(outputs(model, inputs), expected) <= bound("llama")
            assert [row.density for row in swapped.report().rows] == [1.0, 1.0]


def test_xattention_prunes_the_prompt_and_decodes_in_full():
    model, tokens = shared("llama"), ids(1, 24)
    options = {"block": 4, "stride": 2, "threshold": 0.3}
    with torch.no_grad(), regard.swap(model, "xattention", measure="mass", **options) as swapped:
        model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        rows = swapped.report().rows
        swapped.forget()
        model(tokens)
        prompt = swapped.report().rows
    for row, alone in zip(rows, prompt, strict=True):
        assert (row.calls, row.dense) == (5, 4)
        assert (alone.calls, alone.dense) == (1, 0)
        assert 0.2 < alone.density < row.density < 1
        assert alone.density < alone.kept_mass < 1  # it keeps what matters
        assert alone.kept_mass <= row.kept_mass < 1
    text = str(swapped.report())
    assert "kept mass" in text
    assert "model.layers.1.self_attn" in text


def test_moba_streams_to_what_the_whole_gives():
    model, tokens = shared("gpt2"), ids(2, 16)
    with torch.no_grad(), regard.swap(model, "moba", block=4, topk=2) as swapped:
        whole = model(tokens).logits
        assert swapped.report().rows[0].density < 0.9
        cache = tr.DynamicCache()
        steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(16)]
    assert off(torch.cat(steps, 1), whole) <= 1e-10


def test_kept_mass_is_the_weight_on_kept_pairs():
    model, inputs = shared("t5"), batch("t5")
    with torch.no_grad():
        with under_eager(model):
            weights = model(**inputs, output_attentions=True).decoder_attentions[0]
        first = 2  # the decoder's first self-attention
        with regard.swap(model, masks.window(2), layers=first, measure="mass") as swapped:
            model(**inputs)
        (row,) = swapped.report().rows
    seen = weights * masks.window(2).dense(6)
    assert row.kept_mass == pytest.approx(float(seen.sum(-1).mean()), abs=1e-9)
    assert row.density == pytest.approx(11 / 21)


def test_windows_of_the_model_are_kept_and_selectors_leave_such_layers_alone():
    model = shared("gemma2")
    with regard.swap(model, "xattention") as swapped:
        assert [layer.name for layer in swapped.layers] == ["model.layers.1.self_attn"]
        assert any(
            "layers.0.self_attn stays as it was: this layer sees only a window" in note for note in swapped.notes
        )
    with regard.swap(model, "window", window=2) as swapped:
        model.generate(ids(1, 6), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        first, second = swapped.report().rows
    # Of 4 tokens in sight 2 are kept, of all 9 likewise.
    assert first.density > second.density > 0


# --- where ---------------------------------------------------------------------------------------------------


def test_layers_and_heads_say_where():
    model, tokens = shared("llama"), ids(2, 8)
    projection = model.model.layers[1].self_attn.o_proj
    seen = []
    hook = projection.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().unflatten(-1, (4, -1)))
    )
    first = []
    below = model.model.layers[0].register_forward_hook(lambda module, args, out: first.append(out))
    with torch.no_grad():
        model(tokens)
        with regard.swap(model, "window", window=1, layers=-1):
            model(tokens)
        with regard.swap(model, "window", window=1, layers=[1], heads=[0, 2]):
            model(tokens)
    hook.remove()
    below.remove()
    checks = len(seen) // 3
    assert checks
    plain, all_heads, two = seen[0], seen[-1 - (len(seen) - 1) // 2], seen[-1]
    assert torch.equal(first[0], first[-1])
    assert torch.equal(two[:, :, [1, 3]], plain[:, :, [1, 3]])
    assert torch.equal(two[:, :, [0, 2]], all_heads[:, :, [0, 2]])
    assert (two - plain)[:, :, [0, 2]].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (slice(0, 2), ["encoder.block.0.layer.0.SelfAttention", "encoder.block.1.layer.0.SelfAttention"]),
        (lambda layer: layer.kind == "cross", [f"decoder.block.{n}.layer.1.EncDecAttention" for n in (0, 1)]),
        ([-1, 0], ["encoder.block.0.layer.0.SelfAttention", "decoder.block.1.layer.1.EncDecAttention"]),
    ],
)
def test_ways_to_choose_layers(layers, names):
    with regard.swap(shared("t5"), "entmax", layers=layers, check=False) as swapped:
        assert [layer.name for layer in swapped.layers] == names


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_layers_and_heads_get_the_mask_that_they_know(implementation):
    """A mask of numbers for eager attention, none or a boolean one for torch's."""
    model, inputs = tiny("gpt2"), batch("gpt2")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = outputs(model, inputs)
        for where in ({"layers": 0}, {"layers": 1}, {"heads": [1]}):
            with regard.swap(model, "softmax", **where):
                assert off(outputs(model, inputs), expected) <= bound("gpt2")


def test_swaps_nest():
    model, tokens = shared("gpt2"), ids(2, 8)
    with torch.no_grad():
        with regard.swap(model, "window", window=2):
            expected = model(tokens).logits
        with regard.swap(model, "window", window=2, layers=0):
            with regard.swap(model, "window", window=2, layers=1):
                assert torch.equal(model(tokens).logits, expected)
            assert not torch.equal(model(tokens).logits, expected)
    assert model.config._attn_implementation == "sdpa"


# --- changed, with new parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["cope", "shaw", "knocking_heads", "knocking_heads_linear"])
def test_these_start_as_the_model_was(mechanism):
    model = tiny("gpt2")
    with regard.swap(model, mechanism) as swapped:
        assert swapped.notes[-1] == "on the sample tokens the model puts out the same as before"
        assert sum(p.numel() for p in swapped.parameters()) > 0


@pytest.mark.parametrize("mechanism", ["entmax", "alibi", "kerple", "gated"])
def test_these_can_not_and_say_how_far_they_are(mechanism):
    with regard.swap(tiny("gpt2"), mechanism) as swapped:
        assert "something else, off by" in swapped.notes[-1]


def test_gates_start_open_are_trained_and_leave_with_the_swap():
    model, tokens = tiny("gpt2", torch.float32), ids(4, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    swapped = regard.swap(model, "gated")
    assert all(module.training for module in model.modules())
    new = {name for name, _ in model.named_parameters()} - before.keys()
    assert new == {f"transformer.h.{n}.attn.regard.gate.proj.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    gate = model.transformer.h[0].attn.regard.gate
    assert torch.equal(gate.proj.bias, torch.full((32,), 4.0))
    losses = []
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    assert losses[-1] < 0.9 * losses[0]
    assert gate.proj.weight.abs().max() > 1e-5
    swapped.restore()
    assert model.state_dict().keys() == before.keys()
    assert swapped.parts["transformer.h.0.attn"].gate is gate
    assert not model.transformer.h[0].attn._forward_pre_hooks


def test_entmax_gives_sparse_weights_that_sum_to_one():
    model, tokens = tiny("llama"), ids(2, 9)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(8)
    with torch.no_grad(), regard.swap(model, Entmax(alpha=1.5)):
        (first, _) = model(tokens, output_attentions=True).attentions
    torch.testing.assert_close(first.sum(-1), torch.ones_like(first[..., 0]))
    below = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (first[..., below] == 0).any()
    assert not first[..., ~below].any()


def test_gated_entmax_generates_and_names_join():
    model = tiny("llama")
    with regard.swap(model, "gated_headwise+entmax") as swapped:
        out = model.generate(ids(1, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 9)
    assert {type(part).__name__ for parts in swapped.parts.values() for part in parts.children()} == {
        "SigmoidGate",
        "Entmax",
    }


def test_what_a_cache_does_not_hold_is_refused_when_it_is_missed():
    model, tokens = tiny("gpt2"), ids(1, 6)
    with torch.no_grad(), regard.swap(model, "mta"):
        model(tokens)
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(tokens, max_new_tokens=2, do_sample=False)
        assert model.generate(tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=False).shape == (
            1,
            8,
        )


# --- refusals and restoring ----------------------------------------------------------------------------------


class Forgetful(Selector):
    def forward(self, q, k, mask):
        raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    ("name", "mechanism", "options", "error", "match"),
    [
        ("gpt2", "performer", {}, ValueError, "'performer' .TokenMixer, family 'linear'. is no softmax pipeline"),
        ("gpt2", "sofmax", {}, ValueError, "did you mean 'softmax'"),
        ("gpt2", "window", {"windw": 3}, ValueError, r"has no such option \(got 'windw'\); .*did you mean 'window'"),
        ("gpt2", "learned", {}, ValueError, "adds positions to tokens before they are projected"),
        ("gpt2", "mqa", {}, ValueError, "other key and value projections"),
        ("gpt2", "dcmha", {}, ValueError, "reads the tokens behind the keys"),
        ("gpt2", "diagonal_masked", {}, ValueError, "does not support causal attention"),
        ("gpt2", Entmax(), {"alpha": 2.0}, ValueError, "need a mechanism's name"),
        ("gpt2", {"nose": Entmax()}, {}, ValueError, r"swap: slot is unknown \(got 'nose'\); expected one of "),
        ("gpt2", {"gate": Entmax()}, {}, TypeError, "slot 'gate' has the wrong type .got Entmax.; expected a Gate"),
        ("gpt2", Mix(), {}, TypeError, "say which slot"),
        ("gpt2", 3, {}, TypeError, "mechanism has the wrong type .*expected a name, a part"),
        ("gpt2", "softmax", {"layers": 7}, ValueError, "layers must be numbers below 2, got 7"),
        ("gpt2", "softmax", {"layers": []}, ValueError, "none was chosen"),
        ("gpt2", "softmax", {"heads": [4]}, ValueError, "heads must be numbers below 4, got 4"),
        ("gpt2", "softmax", {"measure": "weight"}, ValueError, "measure must be 'density' or 'mass'"),
        ("gpt2", Forgetful(), {}, RuntimeError, "out of ideas"),
        ("llama", "rotary", {}, ValueError, "the model has rotated them already"),
        ("llama", "qk_norm", {}, ValueError, "the model has rotated them already"),
        ("bert", "moba", {}, ValueError, "does not support bidirectional attention"),
        ("gemma2", "mta", {}, ValueError, "caps its scores already"),
        ("gpt_oss", "entmax", {}, ValueError, "learned sinks"),
        ("t5", "window", {"layers": 3}, ValueError, "EncDecAttention can't be swapped: this is cross-attention"),
    ],
)
def test_what_can_not_be_swapped_is_refused_and_nothing_stays(name, mechanism, options, error, match):
    model = shared(name)
    before, held = model.config.to_dict(), list(model.state_dict())
    with pytest.raises(error, match=match):
        regard.swap(model, mechanism, **options)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert list(model.state_dict()) == held
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_restored_after_an_error_in_the_block():
    model, inputs = tiny("gpt2"), batch("gpt2")
    expected = outputs(model, inputs)
    with pytest.raises(KeyboardInterrupt), regard.swap(model, "gated"):
        raise KeyboardInterrupt
    assert torch.equal(outputs(model, inputs), expected)
    assert not hasattr(model.transformer.h[0].attn, "regard")


# --- the self-check ------------------------------------------------------------------------------------------


def test_the_check_changes_nothing():
    model = tiny("gpt2", torch.float32)
    model.transformer.h[1].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    with regard.swap(model, "softmax"):
        assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "broken",
    [
        {"softcap": 0.5},
        {"scaling": 0.05},
        {"position_bias": torch.linspace(-3, 3, 7, dtype=torch.float64).view(1, 1, 1, 7)},
    ],
    ids=["soft-cap", "scale", "bias"],
)
def test_the_check_finds_attention_that_it_does_not_know(broken, monkeypatch):
    """As if a model attended in a way that only its own eager function knows."""
    known = transformers_check.read

    def misread(module, q, k, v, mask, **options):
        given = {**options, **broken}
        if "position_bias" in broken and k.shape[2] != 7:
            given.pop("position_bias")
        return known(module, q, k, v, mask, **given)

    monkeypatch.setattr(transformers_check, "read", misread)
    model = shared("gpt2")
    with pytest.raises(ValueError, match="does not give what GPT2LMHeadModel gives with eager attention"):
        regard.swap(model, "softmax")
    assert model.config._attn_implementation == "sdpa"
    with regard.swap(model, "softmax", check=False):
        pass


def test_a_lost_mask_is_found(monkeypatch):
    known = transformers_check.read
    monkeypatch.setattr(
        transformers_check, "read", lambda module, q, k, v, mask, **o: known(module, q, k, v, None, **o)
    )
    for name in ("gpt2", "bert", "t5"):
        with pytest.raises(ValueError, match="does not give what"):
            regard.swap(shared(name), "softmax")


def test_a_batch_of_the_user_s_own():
    model = shared("bert")
    with regard.swap(model, "softmax", check=batch("bert")) as swapped:
        assert len(swapped.layers) == 2
    with pytest.raises(ValueError, match="check must be a batch of inputs"):
        regard.swap(model, "softmax", check={})


class Strange(tr.BertModel):
    """It wants what nobody knows."""

    def forward(self, moon, **options):
        return super().forward(moon, **options)


def test_models_whose_inputs_are_not_known():
    model = Strange(tr.BertConfig(**BASE)).double().eval()
    with pytest.raises(ValueError, match=r"no inputs are known for Strange.*pass a small batch"):
        regard.swap(model, "softmax")
    with regard.swap(model, "softmax", check={"moon": ids(2, 5)}) as swapped:
        assert len(swapped.layers) == 2


def test_without_the_check_layers_are_read_from_the_config():
    for name in ("gpt2", "gemma2", "t5", "bert", "vit"):
        model, inputs = shared(name), batch(name)
        with torch.no_grad():
            with under_eager(model):
                expected = outputs(model, inputs)
            with regard.swap(model, "softmax", check=False) as swapped:
                assert off(outputs(model, inputs), expected) <= bound(name)
                assert swapped.notes == []
    with pytest.raises(ValueError, match="does not support bidirectional"):
        regard.swap(shared("bert"), "moba", check=False)


def test_parts_with_parameters_are_copied_for_each_layer():
    model, position = tiny("gpt2"), regard.create("kerple", dim=32, num_heads=4).position
    with regard.swap(model, position) as swapped:
        held = [parts.position for parts in swapped.parts.values()]
    assert len({id(part) for part in (*held, position)}) == 3
    assert isinstance(held[0], nn.Module)

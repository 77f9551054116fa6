"""Exact attention in a swapped model: the outputs, gradients and generations of the model's own eager attention."""

import pytest
import torch
import transformers as tr

import regard
from integrations.tiny import DECODERS, MODELS, batch, bound, off, outputs, shared, tiny
from regard.integrations.transformers_call import compute, read
from regard.integrations.transformers_check import under_eager


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_weights_are_those_of_eager_attention(name):
    model, inputs = shared(name), batch(name)
    with torch.no_grad():
        with under_eager(model):
            expected, weights = outputs(model, inputs), model(**inputs, output_attentions=True)
        with regard.swap(model, "softmax") as swapped:
            got, ours = outputs(model, inputs), model(**inputs, output_attentions=True)
    assert off(got, expected) <= bound(name)
    assert len(swapped.layers) in (2, 4, 6)
    assert swapped.notes == ["on the sample tokens the model puts out the same as before"]
    keep = inputs.get("attention_mask")
    for key in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for a, b in zip(ours.get(key) or (), weights.get(key) or (), strict=True):
            # Rows of padding see nothing: 0 here, anything in eager attention.
            rows = keep[:, None, :].expand(a.shape[:3]).bool() if keep is not None and a.shape[2] == 9 else ...
            assert off(a[rows], b[rows]) <= bound(name)


def test_the_comparison_can_tell_a_leak():
    model, inputs = shared("gpt2"), batch("gpt2")
    with torch.no_grad(), under_eager(model):
        expected = outputs(model, inputs)
        assert off(outputs(model, {"input_ids": inputs["input_ids"]})[inputs["attention_mask"].bool()], expected) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_gradients_are_those_of_eager_attention(name):
    model, inputs = tiny(name), batch(name)

    def gradients():
        model.zero_grad()
        outputs(model, inputs).square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with under_eager(model):
        expected = gradients()
    with regard.swap(model, "softmax"):
        got = gradients()
    assert got.keys() == expected.keys()
    assert max(off(got[n], g) for n, g in expected.items()) <= 100 * bound(name)
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_caches_and_left_padding(name):
    """13 new tokens: windows of 4 have long moved on."""
    model, prompt, keep = shared(name), ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    keep[1, :3] = 0
    options = {"attention_mask": keep, "max_new_tokens": 13, "min_new_tokens": 13, "do_sample": False}
    asked = {"output_scores": True, "return_dict_in_generate": True}
    with under_eager(model):
        expected = model.generate(prompt, **options, **asked)
        beams = model.generate(prompt, **options, num_beams=3)
    with regard.swap(model, "softmax"):
        got = model.generate(prompt, **options, **asked)
        assert torch.equal(got.sequences, expected.sequences)
        for a, b in zip(got.scores, expected.scores, strict=True):
            seen = b.isfinite()
            assert off(a[seen], b[seen]) <= bound(name)
        assert torch.equal(model.generate(prompt, **options, num_beams=3), beams)
        static = model.generate(prompt, **options, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, expected.sequences)


def test_generation_of_encoder_decoders():
    for name in ("t5", "whisper"):
        model, inputs = shared(name), batch(name)
        inputs.pop("decoder_input_ids")
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
        with under_eager(model):
            expected = model.generate(**inputs, **options)
        with regard.swap(model, "softmax"):
            assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_through_a_cache(name, kind):
    model, tokens = shared(name), ids(2, 12)
    with torch.no_grad():
        with under_eager(model):
            expected = model(tokens).logits
        with regard.swap(model, "softmax"):
            if kind == "dynamic":
                cache = tr.DynamicCache(config=model.config)
            else:
                cache = tr.StaticCache(config=model.config, max_cache_len=20)
            parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    assert off(torch.cat(parts, 1), expected) <= bound(name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_sequences_do_not_see_each_other(name):
    model, one, two = shared(name), ids(1, 5, 1), ids(1, 4, 2)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with torch.no_grad(), under_eager(model):
        expected = torch.cat([model(one).logits, model(two).logits], 1)
    with torch.no_grad(), regard.swap(model, "softmax"):
        got = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    assert off(got, expected) <= bound(name)


@pytest.mark.parametrize("told", [{}, {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])}], ids=["", "both"])
def test_packed_sequences_by_their_cumulative_lengths(told):
    """As the flash kernels are told of them; rotary positions may go on or start again."""
    model, one, two = shared("llama"), ids(1, 5, 1), ids(1, 4, 2)
    ends = torch.tensor([0, 5, 9], dtype=torch.int32)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    with torch.no_grad(), under_eager(model):
        expected = torch.cat([model(one).logits, model(two).logits], 1)
    with torch.no_grad(), regard.swap(model, "softmax"):
        got = model(torch.cat([one, two], 1), use_cache=False, **flash, **told).logits
        assert off(got, expected) <= bound("llama")
        with pytest.raises(ValueError, match="other keys than queries"):
            model(one, use_cache=False, **flash | {"cu_seq_lens_k": ends + 1})


def test_masks_of_the_user_s_own():
    model, tokens = shared("llama"), ids(2, 6)
    allowed = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    allowed |= torch.eye(6, dtype=torch.bool)
    added = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        with under_eager(model):
            expected = model(tokens, attention_mask=added).logits
        with regard.swap(model, "softmax"):
            for mask in (added, allowed):
                assert off(model(tokens, attention_mask=mask).logits, expected) <= bound("llama")


@pytest.mark.parametrize(
    ("module_says", "call_says", "causal"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_without_a_mask_the_layer_says_whether_it_is_causal(module_says, call_says, causal):
    """As torch's kernel is told in transformers: the first query then sees the first key alone."""
    module = torch.nn.Module()
    module.is_causal = module_says
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    call = read(module, q, k, k, None, is_causal=call_says)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal)
    torch.testing.assert_close(compute(call.problem), expected.transpose(1, 2))
    one = read(module, q[:, :, :1], k, k, None, is_causal=call_says)
    torch.testing.assert_close(compute(one.problem), (torch.softmax(q[:, :, :1] @ k.mT / 2, -1) @ k).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_check_themselves(dtype):
    for name in ("gpt2", "llama", "t5", "vit"):
        model = tiny(name, dtype)
        with regard.swap(model, "softmax"):
            assert outputs(model, batch(name, dtype)).dtype == dtype


def test_autocast():
    model, tokens = tiny("llama", torch.float32), ids(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens).logits
        with regard.swap(model, "softmax"):
            got = model(tokens).logits
    assert got.dtype == expected.dtype
    assert off(got.float(), expected.float()) < 0.05


def test_dropout_falls_on_the_weights_in_training_alone():
    """One layer whose values are all one: an output is the sum of the kept weights over 1 - p, 1 in the mean."""
    config = tr.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=61, attn_pdrop=0.4, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model = tr.GPT2LMHeadModel(config).double()
    attn, seen = model.transformer.h[0].attn, []
    with torch.no_grad():
        attn.c_attn.weight[:, 16:], attn.c_attn.bias[16:] = 0.0, 1.0
    attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    tokens = ids(64, 12)
    with regard.swap(model, "softmax"):
        model.eval()(tokens)
        evaluated = seen[-1]
        model.train()(tokens)
    trained = seen[-1]
    torch.testing.assert_close(evaluated, torch.ones_like(evaluated))
    # The first token sees itself alone: its weight is dropped (0), or 1 / 0.6.
    first = trained[:, 0]
    assert set(first.unique().tolist()) <= {0.0, 1 / 0.6}
    heads = trained.unflatten(-1, (2, 4))[..., 0]
    deviation = heads.std() / heads.numel() ** 0.5
    assert (heads.mean() - 1).abs() < 4.5 * deviation


def test_kernels_can_be_chosen():
    model, inputs = shared("gpt2"), batch("gpt2")
    with torch.no_grad(), under_eager(model):
        expected = outputs(model, inputs)
    for kernel in ("eager", "chunked", "sdpa"):
        with torch.no_grad(), regard.swap(model, "softmax", kernel=kernel):
            assert off(outputs(model, inputs), expected) <= bound("gpt2")
    with pytest.raises(ValueError, match="kernel is unknown"):
        regard.swap(model, "softmax", kernel="fastest")

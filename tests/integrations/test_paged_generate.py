"""Generation with keys and values in pages: the tokens of transformers' own cache, with beams that share pages."""

import contextlib
import copy

import pytest
import torch
import transformers as tr

import regard
from integrations.tiny import GROUPED, tiny
from regard.integrations.transformers_cache import PagedCache, PagedLayer

PADDED = {"input_ids": torch.tensor([[0, 0, 0, 0, 7, 9], [5, 6, 7, 8, 9, 10], [0, 11, 12, 13, 5, 3]])}
PADDED["attention_mask"] = (PADDED["input_ids"] != 0).long()
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several of the beams": {"num_beams": 3, "num_return_sequences": 2},
}


def generated(model, inputs=PADDED, **options):
    return model.generate(**inputs, min_new_tokens=12, max_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("mechanism", [None, "softmax"])
def test_the_same_tokens(name, mechanism):
    model = tiny(name)
    with regard.swap(model, mechanism) if mechanism else contextlib.nullcontext():
        for search in SEARCHES.values():
            cache = PagedCache(model.config, 256, page_size=4)
            got = generated(model, past_key_values=cache, **search)
            assert torch.equal(got, generated(model, **search)), search
            assert cache.get_seq_length() == got.shape[1] - 1


def test_a_swapped_window_on_pages():
    model = tiny("llama")
    with regard.swap(model, "window", window=3):
        assert torch.equal(generated(model, past_key_values=PagedCache(model.config, 256)), generated(model))


def test_beams_share_pages():
    model = tiny("llama")
    prompt = {"input_ids": torch.randint(3, 61, (1, 40)), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    cache = PagedCache(model.config, 256, page_size=4)
    generated(model, prompt, past_key_values=cache, num_beams=4)
    assert cache.used_pages <= 2 * (10 + 4 * 3), "the prompt's ten pages once a layer, and at most three for each beam"
    assert cache.nbytes == cache.used_pages * cache.pools[0].page_nbytes
    assert repr(cache).startswith(
        f"PagedCache(2 layers, 51 tokens; {cache.used_pages} of 256 pages of 4 tokens in use,"
    )


@torch.no_grad()
def test_one_prompt_many_continuations():
    model = tiny("llama")
    prompt, more = torch.randint(3, 61, (1, 16)), torch.randint(3, 61, (8, 3))
    cache = PagedCache(model.config, 64, page_size=4)
    model(prompt, past_key_values=cache)
    assert cache.used_pages == 2 * 4
    cache.batch_repeat_interleave(8)
    assert cache.used_pages == 2 * 4
    got = model(more, past_key_values=cache).logits
    assert cache.used_pages == 2 * (4 + 8)
    want = model(torch.cat([prompt.expand(8, -1), more], 1)).logits[:, 16:]
    torch.testing.assert_close(got, want)
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.used_pages == 2 * 5
    cache.crop(-3)
    torch.testing.assert_close(model(more[:1], past_key_values=cache).logits, want[:1])
    cache.reset()
    assert (cache.used_pages, cache.get_seq_length()) == (0, 0)


@torch.no_grad()
def test_a_copy_goes_its_own_way():
    model = tiny("llama")
    prompt, a, b = torch.randint(3, 61, (3, 1, 6)).unbind()
    cache = PagedCache(model.config, 64, page_size=4)
    model(prompt, past_key_values=cache)
    twin = copy.deepcopy(cache)
    got = model(a, past_key_values=cache).logits, model(b, past_key_values=twin).logits
    for part, logits in zip((a, b), got, strict=True):
        torch.testing.assert_close(logits, model(torch.cat([prompt, part], 1)).logits[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize(("name", "more"), [("llama", 12), ("qwen2", 16)])
def test_a_full_pool_leaves_all_layers_as_they_were(name, more):
    """Of two layers one could take the tokens in: neither does, and what was computed stays."""
    model = tiny(name)
    ids = torch.randint(3, 61, (1, 14))
    cache = PagedCache(model.config, 7, page_size=4)
    model(ids[:, :8], past_key_values=cache)
    used, kept = cache.used_pages, [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match=r"PagePool: num_pages is too small: .* nothing was written"):
        model(torch.randint(3, 61, (1, more)), past_key_values=cache)
    assert cache.used_pages == used
    assert all(torch.equal(layer.keys, k) for layer, k in zip(cache.layers, kept, strict=True))
    got = model(ids[:, 8:9], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids[:, :9]).logits[:, 8:])


def test_windows_give_pages_back():
    model = tiny("gemma2")
    cache = PagedCache(model.config, 64, page_size=4)
    generated(model, past_key_values=cache)
    sliding, full = cache.layers
    assert (sliding.get_max_length(), full.get_max_length()) == (4, -1)
    assert all(row.count <= 2 for row in sliding.state.rows)
    assert all(row.count == 5 for row in full.state.rows)


def test_what_it_can_not_keep():
    with pytest.raises(TypeError, match=r"PagedCache: config has the wrong type .*PagedCache"):
        PagedCache(64, 64)
    with pytest.raises(ValueError, match="PagePool: page_size is too small"):
        PagedCache(tiny("llama").config, 64, page_size=0)
    config = tr.LlamaConfig(**GROUPED)
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="PagedCache: config has a layer 0 that keeps more than keys"):
        PagedCache(config, 64)
    layer = PagedCache(tiny("llama").config, 64).layers[0]
    assert isinstance(layer, PagedLayer)
    assert layer.keys is None
    with pytest.raises(NotImplementedError, match="pages stay on their device"):
        layer.offload()
    with pytest.raises(ValueError, match="crop: tokens_to_remove is too large"):
        layer.crop(3)


def test_a_training_step_is_refused():
    model = tiny("llama").train()
    with pytest.raises(ValueError, match="want a gradient, and pages are written in place"):
        model(torch.tensor([[3, 4]]), past_key_values=PagedCache(model.config, 8))

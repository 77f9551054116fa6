"""Attention maps of swapped models: asked for in any of the ways that transformers has, and shaped as eager's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor

import regard
from integrations.tiny import BASE, GROUPED, batch, tiny
from regard.integrations.transformers_check import under_eager

IDS = torch.arange(3, 9)[None]


def llama(**options) -> tr.LlamaForCausalLM:
    torch.manual_seed(0)
    return tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED, attn_implementation="eager", **options)).eval()


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_config_that_asks_for_maps_gets_them(when: str):
    model = llama(output_attentions=when == "before")
    with torch.no_grad():
        want = model(IDS, output_attentions=True).attentions
        with regard.swap(model, "softmax"):
            model.config.output_attentions = True
            same(model(IDS).attentions, want)
            same(model.model(IDS).attentions, want)
            assert not model(IDS, output_attentions=False).attentions


def test_configs_of_other_models_are_refused_as_before():
    plain = tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED, attn_implementation="sdpa"))
    with regard.swap(llama(), "softmax"), pytest.raises(ValueError, match="output_attentions"):
        plain.config.output_attentions = True
    assert plain.config.output_attentions is False


def test_a_config_of_a_part_asks_for_its_maps():
    config = tr.CLIPConfig(
        text_config={**BASE, "output_attentions": True},
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
                       "image_size": 12, "patch_size": 4},
        projection_dim=16,
        attn_implementation="eager",
    )  # fmt: skip
    model, inputs = tr.CLIPModel(config).eval(), batch("clip", torch.float32)
    del inputs["attention_mask"]  # rows that see nothing have other maps: 0 here, an even mean in eager attention
    with torch.no_grad():
        want = model(**inputs)
        with regard.swap(model, "softmax", check=False):
            got = model(**inputs)
    same(got.text_model_output.attentions, want.text_model_output.attentions)
    assert not got.vision_model_output.attentions
    assert not want.vision_model_output.attentions


def test_sub_models_are_asked_by_themselves():
    model, inputs = tiny("t5"), batch("t5")
    with torch.no_grad():
        with under_eager(model):
            want = model.get_encoder()(inputs["input_ids"], output_attentions=True).attentions
        with regard.swap(model, "softmax", check=False):
            same(model.get_encoder()(inputs["input_ids"], output_attentions=True).attentions, want)
            assert not model.get_encoder()(inputs["input_ids"]).get("attentions")


def test_in_single_precision_nothing_is_further_from_the_truth_than_eager_rounds():
    """T5's positions reach the kernels as a view by heads, and those of single precision are others than of double."""

    def run(dtype: torch.dtype, way: Callable[[Any], Any]) -> list[Tensor]:
        model = tiny("t5", dtype)
        with torch.no_grad(), way(model):
            out = model.get_encoder()(batch("t5")["input_ids"], output_attentions=True)
        return [out.last_hidden_state.double(), *(seen.double() for seen in out.attentions)]

    def swapped(model: Any) -> Any:
        return regard.swap(model, "softmax", check=False)

    truth, eager = run(torch.float64, under_eager), run(torch.float32, under_eager)
    for exact, rounded, ours in zip(truth, eager, run(torch.float32, swapped), strict=True):
        assert (ours - exact).abs().max() <= 2 * (rounded - exact).abs().max()


def test_generation_gives_all_maps():
    model, inputs = tiny("t5"), batch("t5")
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "return_dict_in_generate": True, "output_attentions": True}
    with torch.no_grad():
        with under_eager(model):
            want = model.generate(inputs["input_ids"], do_sample=False, **options)
        with regard.swap(model, "softmax", check=False):
            got = model.generate(inputs["input_ids"], do_sample=False, **options)
    same(got.encoder_attentions, want.encoder_attentions)
    for kind in ("decoder_attentions", "cross_attentions"):
        for ours, theirs in zip(got[kind], want[kind], strict=True):
            same(ours, theirs)


def test_an_error_inside_leaves_no_wish_for_maps():
    model = llama()
    with regard.swap(model, "softmax") as swapped, torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.tensor([[999]]), output_attentions=True)
        assert not any(entry.called.heard for entry in swapped._entries)


@pytest.mark.parametrize("where", [{}, {"heads": [1, 2]}, {"layers": 0}])
def test_maps_under_a_static_cache_are_shaped_as_eager_s(where: dict):
    model = llama()

    def maps() -> list[Tensor]:
        cache = tr.StaticCache(config=model.config, max_cache_len=12)
        found = list(model(IDS, past_key_values=cache, output_attentions=True).attentions)
        return found + list(model(IDS[:, :1], past_key_values=cache, output_attentions=True).attentions)

    with torch.no_grad():
        want = maps()
        with regard.swap(model, "softmax", **where):
            got = maps()
    assert {m.shape[-1] for m in want} == {12}
    same(tuple(got), tuple(want))

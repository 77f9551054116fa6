"""Generation by tiny models, compared with eager attention token by token: the sdist lacks transformers' own tests."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peers.transformers_models import cases

NEW = 6


class GenerationTests:
    """Of every class that generates, its weights drawn wide."""

    def _both(self) -> Iterator[tuple[nn.Module, nn.Module, dict[str, Tensor]]]:
        """The model, its copy with eager attention, and a batch padded on the left."""
        for cls in (c for c in self.all_model_classes if c.can_generate()):
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
                config.is_decoder = True
            torch.manual_seed(0)
            model = cls(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)
            plain = copy.deepcopy(model)
            plain.set_attn_implementation("eager")
            yield model, plain, {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _agrees(self, **options: Any) -> None:
        for model, plain, inputs in self._both():
            got, want = (_generate(m, inputs, **options) for m in (model, plain))
            assert torch.equal(got, want), f"{type(model).__name__}: {got.tolist()} for {want.tolist()}"

    def test_greedy(self) -> None:
        self._agrees()

    def test_sampled(self) -> None:
        self._agrees(do_sample=True, temperature=2.0, top_k=0)

    def test_beams(self) -> None:
        self._agrees(num_beams=3, num_return_sequences=2)

    def test_sampled_beams(self) -> None:
        self._agrees(do_sample=True, num_beams=2)

    def test_without_a_cache(self) -> None:
        self._agrees(use_cache=False)

    def test_static_cache(self) -> None:
        self._agrees(cache_implementation="static")

    def test_static_cache_gives_what_dynamic_gives(self) -> None:
        for model, _, inputs in self._both():
            assert torch.equal(_generate(model, inputs, cache_implementation="static"), _generate(model, inputs))

    def test_padding_on_the_left_changes_nothing(self) -> None:
        """A padded row gives what it gives alone, without padding."""
        for model, _, inputs in self._both():
            pads = int((inputs["attention_mask"][1] == 0).sum())
            alone = _generate(model, {name: t[1:2, pads:] for name, t in inputs.items()})
            assert torch.equal(_generate(model, inputs)[1, -NEW:], alone[0, -NEW:]), type(model).__name__

    def test_maps_while_generating(self) -> None:
        """As many and as large as eager's, with the same numbers. transformers' sdpa gives none: it fails there."""
        asked = {"return_dict_in_generate": True, "output_attentions": True}
        for model, plain, inputs in self._both():
            whole = {"input_ids": inputs["input_ids"][::2]}  # rows that may attend to nothing are eager's own affair
            got, want = (_generate(m, whole, **asked) for m in (model, plain))
            for name in ("attentions", "decoder_attentions", "cross_attentions"):
                for step, step_plain in zip(got.get(name) or (), want.get(name) or (), strict=True):
                    for maps, maps_plain in zip(step, step_plain, strict=True):
                        torch.testing.assert_close(maps, maps_plain, rtol=1e-4, atol=1e-5)


def _generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(1)
    return model.generate(**inputs, **{"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, **options})


globals().update(cases("GenerationTest", GenerationTests))

"""transformers' common tests of models, for tiny models of six kinds.

`tests/test_modeling_common.py` comes from the sdist, in the folder $PEERS. It imports two mixins that the sdist lacks,
of exporting and generating, which are empty here; `transformers_generation` has a few tests in place of the latter.
"""

import os
import sys
import unittest
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers as tr
from transformers.models.auto import modeling_auto as auto


def common_tests(folder: Path) -> ModuleType:
    """Their module of tests, with what the sdist lacks beside it."""
    for name in ("tests", "tests.exporters", "tests.generation"):
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(folder)]
    for name, mixin in (("exporters.test_export", "Export"), ("generation.test_utils", "Generation")):
        sys.modules[f"tests.{name}"] = module = ModuleType(f"tests.{name}")
        setattr(module, f"{mixin}TesterMixin", type(f"{mixin}TesterMixin", (), {}))
    return import_module("tests.test_modeling_common")


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "Llama": lambda: tr.LlamaConfig(**GROUPED),
    "Bert": lambda: tr.BertConfig(**SIZES, type_vocab_size=2),
    "T5": lambda: tr.T5Config(
        d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    ),
    "GPT2": lambda: tr.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "Qwen3": lambda: tr.Qwen3Config(**GROUPED, head_dim=8),
    "Gemma2": lambda: tr.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
}
KINDS = (
    auto.MODEL_MAPPING,
    auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    auto.MODEL_FOR_MASKED_LM_MAPPING,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
)
LEFT_OUT = (
    "T5ForSequenceClassification",  # wants an end token in rows that their tests draw
    "T5ForTokenClassification",  # an encoder alone, unlike the others
)


class Tester:
    """What their tests ask about a kind of model: sizes, a config, a batch."""

    batch_size, seq_length, num_choices, is_training = 3, 7, 3, True
    hidden_size, num_attention_heads, num_hidden_layers = 32, 4, 2

    def __init__(self, name: str) -> None:
        self.name = name

    def get_config(self) -> Any:
        return CONFIGS[self.name]()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """One row is padded, on the left."""
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        keep = torch.ones_like(ids)
        keep[1, :2] = 0
        inputs = {"input_ids": ids.where(keep.bool(), 0), "attention_mask": keep}
        if self.name == "T5":
            inputs |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
        return self.get_config(), inputs


def classes(name: str) -> tuple[type, ...]:
    """The models of a kind, each once."""
    config = type(CONFIGS[name]())
    found = dict.fromkeys(kind[config] for kind in KINDS if config in kind)
    return tuple(cls for cls in found if cls.__name__ not in LEFT_OUT)


def cases(what: str, *mixins: type) -> dict[str, type[unittest.TestCase]]:
    """A case of these tests for each kind of model."""
    return {
        f"{name}{what}": type(
            f"{name}{what}",
            (*mixins, unittest.TestCase),
            {
                "all_model_classes": classes(name),
                "is_encoder_decoder": name == "T5",
                "model_tester": Tester(name),
            },
        )
        for name in CONFIGS
    }


if "PEERS" in os.environ:
    common = common_tests(Path(os.environ["PEERS"]) / "tests")
    globals().update(cases("ModelTest", common.ModelTesterMixin, common.GenerationTesterMixin))

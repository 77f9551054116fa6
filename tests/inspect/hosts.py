"""Tiny models of transformers of every kind that a trace reads, random and offline, with inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 3], [2, 4, 6, 8, 10, 12, 14]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
LEFT = RIGHT.flip(1)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Host:
    """A kind of model, and where its output keeps the eager weights."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    attentions: Callable[[Any], dict[tuple[str, str], Any]]
    """Of the output, by kind and side."""
    kernels: tuple[str, ...] = ("sdpa", "eager")
    dtype: torch.dtype = torch.float64
    """float32 where a padded query sees nothing: the least float64 is no number in some models' float32 softmax."""


def _plain(side: str = "") -> Callable[[Any], dict[tuple[str, str], Any]]:
    return lambda out: {("self", side): out.attentions}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL, **TEXT))


def _bert_decoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL, **TEXT, is_decoder=True, add_cross_attention=True))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=4, n_positions=32))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2))


def _gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3, "query_pre_attn_scalar": 9}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **TEXT, attn_logit_softcapping=0.05))


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 3, "num_local_experts": 2}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **TEXT, num_experts_per_tok=1))
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.sinks)
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**TEXT, **sizes))
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            nn.init.normal_(module.relative_attention_bias.weight)
    return model


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    stacks = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 16, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 9}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**TEXT, **stacks, **sizes, **widths))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL, image_size=12, patch_size=4))


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {**SMALL, **TEXT, "max_position_embeddings": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 8, "patch_size": 4}))


def _two_stacks(out: Any) -> dict[tuple[str, str], Any]:
    return {
        ("self", "encoder"): out.encoder_attentions,
        ("self", "decoder"): out.decoder_attentions,
        ("cross", "decoder"): out.cross_attentions,
    }


def _towers(out: Any) -> dict[tuple[str, str], Any]:
    return {
        ("self", "text"): out.text_model_output.attentions,
        ("self", "vision"): out.vision_model_output.attentions,
    }


def _picture(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


_memory = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
_sound = torch.randn(2, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

HOSTS: dict[str, Host] = {
    "bert": Host(_bert, {"input_ids": IDS, "attention_mask": RIGHT}, _plain()),
    "bert-decoder": Host(
        _bert_decoder,
        {"input_ids": IDS, "attention_mask": RIGHT, "encoder_hidden_states": _memory},
        lambda out: {("self", ""): out.attentions, ("cross", ""): out.cross_attentions},
    ),
    "gpt2": Host(_gpt2, {"input_ids": IDS}, _plain()),
    "gpt2-left": Host(_gpt2, {"input_ids": IDS, "attention_mask": LEFT}, _plain(), dtype=torch.float32),
    "llama": Host(_llama, {"input_ids": IDS}, _plain()),
    "llama-left": Host(_llama, {"input_ids": IDS, "attention_mask": LEFT}, _plain(), dtype=torch.float32),
    "gemma2": Host(_gemma, {"input_ids": IDS, "attention_mask": LEFT}, _plain(), ("eager",), torch.float32),
    "gpt-oss": Host(_gpt_oss, {"input_ids": IDS}, _plain(), ("eager",), torch.float32),
    "t5": Host(_t5, {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS[:, :4]}, _two_stacks),
    "whisper": Host(_whisper, {"input_features": _sound, "decoder_input_ids": IDS[:, :4]}, _two_stacks),
    "vit": Host(_vit, {"pixel_values": _picture(12)}, _plain()),
    "clip": Host(_clip, {"input_ids": IDS, "attention_mask": RIGHT, "pixel_values": _picture(8)}, _towers),
}


def made(name: str, attention: str = "sdpa") -> nn.Module:
    """The model, with weights large enough that attention is not even, the same at every call."""
    torch.manual_seed(0)
    model = HOSTS[name].make().to(HOSTS[name].dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    model.set_attn_implementation(attention)
    return model

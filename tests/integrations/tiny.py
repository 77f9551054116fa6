"""Tiny random models of many kinds, and batches for them."""

from functools import cache

import torch
import transformers as tr
from torch import Tensor, nn

VOCABULARY = 61
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "num_key_value_heads": 2}
IMAGE = {key: BASE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
IMAGE |= {"image_size": 12, "patch_size": 4}

MODELS = {
    "gpt2": lambda: tr.GPT2LMHeadModel(
        tr.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)),
    "qwen2": lambda: tr.Qwen2ForCausalLM(
        tr.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GROUPED, head_dim=6)),
    "gemma2": lambda: tr.Gemma2ForCausalLM(
        tr.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0)
    ),
    "gpt_oss": lambda: tr.GptOssForCausalLM(
        tr.GptOssConfig(
            **GROUPED,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
            experts_implementation="eager",
        )
    ),
    "bert": lambda: tr.BertModel(tr.BertConfig(**BASE)),
    "roberta": lambda: tr.RobertaModel(tr.RobertaConfig(**BASE)),
    "t5": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(
            d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ),
    "vit": lambda: tr.ViTModel(tr.ViTConfig(**IMAGE)),
    "clip": lambda: tr.CLIPModel(tr.CLIPConfig(text_config=BASE, vision_config=IMAGE, projection_dim=16)),
    "whisper": lambda: tr.WhisperForConditionalGeneration(
        tr.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=30,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gpt_oss")
ROUNDS = {"llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "vit", "clip"}
"""Their eager attention takes the softmax in float32, whatever the model's dtype."""


def tiny(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A fresh model, its weights drawn larger than usual so that attention is far from uniform."""
    tr.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


@cache
def shared(name: str) -> nn.Module:
    """The same for tests that leave the model as it is."""
    return tiny(name)


def batch(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Three rows: whole, padded left, padded right (where the model has tokens)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 1, (3, 9), generator=generator)
    keep = torch.ones_like(ids)
    keep[1, :3] = keep[2, -2:] = 0
    ids[0, -1] = ids[1, -1] = ids[2, -3] = VOCABULARY - 1  # where CLIP takes its summary: at the greatest id
    text = {"input_ids": ids, "attention_mask": keep}
    pixels = {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator, dtype=dtype)}
    if name == "vit":
        return pixels
    if name == "clip":
        return {**text, **pixels}
    if name == "whisper":
        sound = torch.randn(3, 8, 20, generator=generator, dtype=dtype)
        return {"input_features": sound, "decoder_input_ids": ids[:, :6]}
    return {**text, "decoder_input_ids": ids.flip(1)[:, :6]} if name == "t5" else text


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The outputs at real tokens, as one vector."""
    out = model(**inputs)
    found = out[next(key for key in ("logits", "last_hidden_state", "logits_per_image") if key in out)]
    keep = inputs.get("attention_mask")
    return found[keep.bool()] if keep is not None and found.shape[:2] == keep.shape else found


def off(got: Tensor, want: Tensor) -> float:
    """The largest difference, of 1 + the largest value."""
    assert got.shape == want.shape
    assert want.isfinite().all()
    return float((got - want).abs().max() / (1 + want.abs().max()))


def bound(name: str) -> float:
    """What float64 outputs may differ by from eager's."""
    return 2e-6 if name in ROUNDS else 1e-10

"""Small random batches that a transformers model can be tried on: tokens, pictures, sounds."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 7


def sample_batches(model: "PreTrainedModel") -> list[dict[str, Tensor]]:
    """Small batches of random tokens, pictures and sounds, likeliest first."""
    config = model.config
    text = config.get_text_config()
    random = torch.Generator().manual_seed(0)
    ids: dict[str, Tensor] = {}
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary:
        special = {v for k, v in vars(text).items() if k.endswith("token_id") and isinstance(v, int)}
        plain = torch.tensor([n for n in range(min(vocabulary, 4096)) if n not in special] or [0])
        pick = torch.randint(len(plain), (3, TOKENS), generator=random)
        keep = torch.ones(3, TOKENS, dtype=torch.long)
        keep[1, :2] = keep[2, -3:] = 0
        tokens = plain[pick]
        # CLIP and some classifiers read the row of the end token, which must not be padding.
        if isinstance(end := getattr(text, "eos_token_id", None), int) and 0 <= end < vocabulary:
            tokens[[0, 1, 2], [-1, -1, -4]] = end
        # Others find their row by what is no padding.
        pad = getattr(text, "pad_token_id", None)
        tokens[keep == 0] = pad if isinstance(pad, int) and 0 <= pad < vocabulary else plain.min()
        ids = {"input_ids": tokens, "attention_mask": keep}
        if config.is_encoder_decoder:
            ids["decoder_input_ids"] = plain[pick.flip(1)[:, :-2]]
    pictures = _picture(getattr(config, "vision_config", None) or config, random)
    sounds = _sounds(config, random)
    if config.is_encoder_decoder and ids:
        sounds = [{**sound, "decoder_input_ids": ids["decoder_input_ids"][:1]} for sound in sounds]
    # Some take no padding, some want as many tokens to decode as to encode, and some several texts a question.
    alone = {name: t[:1] for name, t in ids.items()}
    even = {name: ids["input_ids"] if name == "decoder_input_ids" else t for name, t in ids.items()}
    choices = {"input_ids": plain[pick][None], "attention_mask": torch.ones_like(keep)[None]} if ids else {}
    found = [ids, {**ids, **pictures}, pictures, *sounds, alone, even, choices]
    found = sorted((c for c in found if c), key=lambda c: model.main_input_name not in c)
    return [{name: _placed(t, model) for name, t in c.items()} for c in found]


def _picture(config: Any, random: torch.Generator) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None)
    if size is None:
        return {}
    sides = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return {"pixel_values": torch.randn(3, getattr(config, "num_channels", 3), *sides, generator=random)}


def _sounds(config: Any, random: torch.Generator) -> list[dict[str, Tensor]]:
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    wave = {"input_values": torch.randn(1, 4000, generator=random)}
    return [{"input_features": torch.randn(1, bins, 2 * frames, generator=random)}, wave] if bins and frames else [wave]


def _placed(t: Tensor, model: "PreTrainedModel") -> Tensor:
    return t.to(model.device, model.dtype if t.is_floating_point() else t.dtype)

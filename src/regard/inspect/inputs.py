"""What a model is called with: text becomes tokens, tensors stay as they are; and what is shown for each token."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from regard.checks import refuse
from regard.models.lm import LanguageModel

Tokens = tuple[tuple[str, ...], ...]

SEEING = ("", "vision", "encoder")
"""Sides of a model whose layers may see a picture."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model, and the tokens of it."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokens: Tokens | None = None
    decoder_tokens: Tokens | None = None

    @property
    def pictures(self) -> Tensor | None:
        """The images that go in, if any do: (B, 3, Y, X)."""
        found = self.kwargs.get("pixel_values", self.args[0] if self.args else None)
        return found if isinstance(found, Tensor) and found.dim() == 4 and found.is_floating_point() else None


def call_of(model: nn.Module, inputs: Any, tokenizer: Any) -> Call:
    """How `model` is called for these inputs. ValueError where text comes without a tokenizer."""
    texts = _texts(inputs)
    if texts is not None:
        return _of_bytes(texts) if tokenizer is None and _reads_bytes(model) else _of_text(model, texts, tokenizer)
    if isinstance(inputs, Mapping):
        decoder = inputs.get("decoder_input_ids")
        return Call((), dict(inputs), _shown(inputs.get("input_ids"), tokenizer), _shown(decoder, tokenizer))
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    ids = args[0] if args and isinstance(args[0], Tensor) and not args[0].is_floating_point() else None
    if ids is not None and tokenizer is None and _reads_bytes(model):
        return Call(args, {}, tuple(tuple(map(_byte, row)) for row in ids.tolist()))
    return Call(args, {}, _shown(ids, tokenizer))


def grid_of(model: nn.Module, pictures: Tensor | None, length: int) -> tuple[tuple[int, int] | None, int]:
    """Rows and columns of patches, and how many of `length` tokens stand before them; None where there are too few."""
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    height, width = (size, size) if isinstance(size, int) else size if _is_pair(size) else (0, 0)
    if pictures is None or not height or not width:
        return None, 0
    grid = pictures.shape[2] // int(height), pictures.shape[3] // int(width)
    extra = length - grid[0] * grid[1]
    return (grid, extra) if extra >= 0 else (None, 0)


def _is_pair(size: object) -> TypeGuard[Sequence[int]]:
    return isinstance(size, list | tuple) and len(size) == 2


def shown(ids: Sequence[int], tokenizer: Any) -> tuple[str, ...]:
    """Each token as people read it: with the blank before it, where the tokenizer writes that as a sign."""
    return tuple(_readable(str(token), tokenizer) for token in tokenizer.convert_ids_to_tokens(list(ids)))


def separators(tokens: Sequence[str]) -> list[bool]:
    """Which tokens look like marks that stand for no text: [SEP], </s>, <|endoftext|>."""
    return [re.fullmatch(r"\[[A-Z]+\d*\]|<[^<>\s]+>", token.strip()) is not None for token in tokens]


def _shown(ids: Any, tokenizer: Any) -> Tokens | None:
    if tokenizer is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    return tuple(shown(row, tokenizer) for row in ids.tolist())


def _readable(token: str, tokenizer: Any) -> str:
    if token.startswith("▁"):  # sentencepiece's blank
        return " " + token[1:]
    text = tokenizer.convert_tokens_to_string([token]) if hasattr(tokenizer, "convert_tokens_to_string") else token
    return token if not text or "\ufffd" in text else text


def _texts(inputs: Any) -> list[str] | None:
    if isinstance(inputs, str):
        return [inputs]
    if isinstance(inputs, list | tuple) and inputs and all(isinstance(text, str) for text in inputs):
        return list(inputs)
    return None


def _of_text(model: nn.Module, texts: list[str], tokenizer: Any) -> Call:
    if tokenizer is None:
        refuse("trace", "inputs", "is text, which needs a tokenizer", type(model).__name__, "tokenizer=, or tensors")
    encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    kwargs = {name: t.to(device) for name, t in encoded.items()}
    ids, config = kwargs["input_ids"], getattr(model, "config", None)
    if ids.shape[1] == 0:
        refuse("trace", "inputs", "has no tokens", repr(texts[0]), "one word at least")
    if getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", None)
        start = getattr(config, "bos_token_id", None) if start is None else start
        if start is None:
            got = "a configuration that names none"
            refuse("trace", "inputs", "leaves the decoder without a first token", got, "a dict with decoder_input_ids")
        kwargs["decoder_input_ids"] = ids.new_full((len(texts), 1), start)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and ids.shape[1] > limit:
        refuse("trace", "inputs", "is longer than the model's positions", f"{ids.shape[1]} tokens", f"at most {limit}")
    return Call((), kwargs, _shown(ids, tokenizer), _shown(kwargs.get("decoder_input_ids"), tokenizer))


def _reads_bytes(model: nn.Module) -> bool:
    return isinstance(model, LanguageModel) and model.embedding.num_embeddings == 256


def _of_bytes(texts: list[str]) -> Call:
    """For regard's own language models, whose tokens are bytes."""
    rows = [list(text.encode()) for text in texts]
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        got = f"{sorted(map(len, rows))} bytes"
        refuse("trace", "inputs", "is no batch of texts for a byte-level model", got, "one length, at least 1")
    return Call((torch.tensor(rows),), {}, tuple(tuple(map(_byte, row)) for row in rows))


def _byte(value: int) -> str:
    """ASCII as it is; of a longer character, no byte alone is text."""
    return chr(value) if value < 128 else f"<{value:02X}>"

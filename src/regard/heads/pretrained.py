"""Norms of queries and keys in pretrained layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard.checks import refuse
from regard.heads.qk_norm import CARD, LAYER, QKNorm
from regard.weights import Loaded, Move, reshaped, same, setting

_BOTH = {"heads.q_weight": "q_norm.weight", "heads.k_weight": "k_norm.weight"}


@CARD.loads(
    "transformers",
    *("Qwen3Attention", "Qwen3MoeAttention", "Qwen3VLTextAttention", "Qwen3VLMoeTextAttention", "Dots1Attention"),
    *("Exaone4Attention", "ExaoneMoeAttention", "Glm4MoeAttention", "AfmoeAttention", "ApertusAttention"),
)
def _each_head(theirs: Any) -> Loaded | None:
    """The same weights in all heads."""
    if not getattr(theirs, "use_qk_norm", True):
        return None
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=_eps(theirs.q_norm)), same(theirs, _BOTH))


@CARD.loads("transformers", "Gemma3nTextAttention", "Gemma4TextAttention")
def _values_too(theirs: Any) -> Loaded:
    return Loaded(lambda: QKNorm(theirs.head_dim, value_norm=True, eps=_eps(theirs.q_norm)), same(theirs, _BOTH))


@CARD.loads(
    "transformers",
    *("Gemma3Attention", "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"),
)
def _around_one(theirs: Any) -> Loaded:
    """Their weights are differences from 1, which adding it rounds: there is no way back."""
    moves = [Move((f"heads.{n}_weight",), (f"{n}_norm.weight",), lambda w: [1 + w], None) for n in "qk"]
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=theirs.q_norm.eps), moves)


@CARD.loads(
    "transformers",
    *("Olmo2Attention", "Olmo3Attention", "OlmoeAttention", "FlexOlmoAttention", "MiniMaxM2Attention"),
)
def _all_heads(theirs: Any) -> Loaded:
    """One norm over the channels of all heads."""
    H, G = _heads(theirs)
    D = theirs.head_dim

    def split(w: Tensor) -> Tensor:
        return w.unflatten(0, (-1, D))

    moves = [reshaped(ours, name, split, lambda w: w.flatten()) for ours, name in _BOTH.items()]
    return Loaded(lambda: QKNorm(D, H, G, weights="joint", eps=_eps(theirs.q_norm)), moves)


@LAYER.loads("transformers", "PhiAttention", "PersimmonAttention")
def _layer_norm(theirs: Any) -> Loaded | None:
    if not theirs.qk_layernorm:
        return None
    kinds = ("weight", "bias")
    names = {f"heads.{n}_{kind}": f"{n}_layernorm.{kind}" for n in "qk" for kind in kinds}
    options: dict[str, Any] = {"norm": "layer", "bias": True, "eps": theirs.q_layernorm.eps}
    return Loaded(lambda: QKNorm(theirs.head_dim, **options), same(theirs, names))


@LAYER.loads("transformers", "CohereAttention", "ChameleonAttention")
def _weights_of_heads(theirs: Any) -> Loaded | None:
    if not getattr(theirs, "use_qk_norm", True):
        return None
    H, G = _heads(theirs)
    bias = hasattr(theirs.q_norm, "bias")
    options: dict[str, Any] = {"norm": "layer", "weights": "per_head", "bias": bias, "eps": _eps(theirs.q_norm)}
    names = {**_BOTH, "heads.q_bias": "q_norm.bias", "heads.k_bias": "k_norm.bias"}
    return Loaded(lambda: QKNorm(theirs.head_dim, H, G, **options), same(theirs, names))


@LAYER.loads("transformers", "StableLmAttention")
def _modules_of_heads(theirs: Any) -> Loaded | None:
    """A module for each head."""
    if not theirs.qk_layernorm:
        return None
    H, G = _heads(theirs)
    options = {"norm": "layer", "weights": "per_head", "eps": theirs.q_layernorm.norms[0].eps}

    def stack(*rows: Tensor) -> Sequence[Tensor]:
        return [torch.stack(rows)]

    moves = [
        Move(
            (f"heads.{n}_weight",), tuple(f"{n}_layernorm.norms.{h}.weight" for h in range(heads)), stack, torch.unbind
        )
        for n, heads in (("q", H), ("k", G))
    ]
    return Loaded(lambda: QKNorm(theirs.head_dim, H, G, **options), moves)


@CARD.loads("timm.layers", "Attention")
def _timm(theirs: Any) -> Loaded | None:
    if isinstance(theirs.q_norm, nn.Identity):
        return None
    if type(theirs.q_norm).__name__ not in ("RmsNorm", "RMSNorm"):
        refuse(theirs, "q_norm", "is another norm", type(theirs.q_norm).__name__, "timm's RmsNorm")
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=theirs.q_norm.eps), same(theirs, _BOTH))


def _heads(theirs: Any) -> tuple[int, int]:
    H, G = (setting(theirs.config, name) for name in ("num_attention_heads", "num_key_value_heads"))
    return H, G


def _eps(norm: Any) -> float:
    """Chameleon's has it in its forward alone: 1e-5, which is LayerNorm's own."""
    return float(setting(norm, "variance_epsilon", "eps"))

"""The rotation of pretrained layers: it stands in their model's config, beside them."""

from typing import Any

from regard.checks import refuse
from regard.positions.rotary import CARD, Rotary, Scaling
from regard.positions.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE
from regard.positions.yarn import YaRN
from regard.weights import Loaded, setting

_HALVES = (
    *("LlamaAttention", "MistralAttention", "MixtralAttention", "MinistralAttention", "GemmaAttention"),
    *("Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "GraniteAttention"),
    *("ArceeAttention", "Starcoder2Attention", "OlmoAttention", "SeedOssAttention", "Gemma3Attention"),
    *("GPTNeoXAttention", "Phi3Attention", "Qwen3NextAttention", "Qwen3_5Attention"),
)
_NEIGHBOURS = ("CohereAttention", "HeliumAttention", "Ernie4_5Attention")


@CARD.loads("transformers", *_HALVES)
def _halves(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs, interleaved=False))


@CARD.loads("transformers", *_NEIGHBOURS)
def _neighbours(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs, interleaved=True))


def _rotary(theirs: Any, *, interleaved: bool) -> Rotary:
    """What the config says of this layer: for all layers, or of each type of layers in a config of its own."""
    said: dict[str, Any] = setting(theirs, "rope_parameters", default={})
    said = said.get(getattr(theirs, "layer_type", None) or "", said)
    if (share := said.get("partial_rotary_factor", 1.0)) != 1:
        refuse(theirs, "partial_rotary_factor", "has no counterpart here", share, "1: all channels are rotated")
    D = setting(theirs, "head_dim", "head_size")
    return Rotary(D, base=float(said["rope_theta"]), scaling=_scaling(theirs, said), interleaved=interleaved)


def _scaling(theirs: Any, said: dict[str, Any]) -> Scaling | None:
    kind, longest = said.get("rope_type", "default"), setting(theirs, "max_position_embeddings")
    trained = said.get("original_max_position_embeddings") or longest
    factor = said.get("factor") or 1.0
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor)
    if kind == "dynamic":
        return DynamicNTK(factor, trained)
    if kind == "llama3":
        return Llama3(factor, trained, said["low_freq_factor"], said["high_freq_factor"])
    if kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        return YaRN(factor, trained, **{name: said[name] for name in names if said.get(name) is not None})
    if kind == "longrope" and said.get("attention_factor") is None:
        stretch = said.get("factor") or longest / trained
        return LongRoPE(stretch, trained, tuple(said["short_factor"]), tuple(said["long_factor"]))
    refuse(theirs, "rope_type", "is unknown", repr(kind), "default, linear, dynamic, llama3, yarn or longrope")

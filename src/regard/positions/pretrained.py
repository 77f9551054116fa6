"""The rotation of pretrained layers: it stands in their model's config, beside them."""

from typing import Any, Literal

from regard.checks import refuse
from regard.positions.axial import CARD as AXIAL
from regard.positions.axial import AxialRotary
from regard.positions.mrope import CARD as MROPE
from regard.positions.mrope import MRope
from regard.positions.rotary import CARD, Rotary, Scaling
from regard.positions.rotary_scaling import DynamicNTK, Linear, Llama3, LongRoPE, Proportional
from regard.positions.yarn import YaRN
from regard.weights import Loaded, setting

_HALVES = (
    *("LlamaAttention", "MistralAttention", "MixtralAttention", "MinistralAttention", "GemmaAttention"),
    *("Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "GraniteAttention"),
    *("ArceeAttention", "Starcoder2Attention", "OlmoAttention", "SeedOssAttention", "Gemma2Attention"),
    *("Gemma3Attention", "Gemma3nTextAttention", "Gemma4TextAttention", "VaultGemmaAttention", "GptOssAttention"),
    *("Olmo2Attention", "Olmo3Attention", "OlmoeAttention", "FlexOlmoAttention", "ChameleonAttention"),
    *("Dots1Attention", "CwmAttention", "EuroBertAttention", "GraniteMoeAttention", "GraniteMoeSharedAttention"),
    *("ApertusAttention", "Emu3Attention", "CsmAttention"),
)
_NEIGHBOURS = ("CohereAttention", "HeliumAttention", "Ernie4_5Attention", "Ernie4_5_MoeAttention")
_SOME_HALVES = (
    *("GPTNeoXAttention", "PhiAttention", "Phi3Attention", "StableLmAttention", "PersimmonAttention"),
    *("Qwen3NextAttention", "Glm4MoeAttention", "MiniMaxM2Attention", "NemotronAttention"),
)
_SOME_NEIGHBOURS = ("GlmAttention", "Glm4Attention")
_CHUNKS = ("Qwen2VLAttention", "Qwen2_5_VLAttention")
_PATCHES = (
    *("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention"),
    *("Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention"),
)
"""The first is Qwen2-VL's."""
_INTERLEAVED = ("Qwen3VLTextAttention", "Qwen3VLMoeTextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")


@CARD.loads("transformers", *_HALVES)
def _halves(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs))


@CARD.loads("transformers", *_NEIGHBOURS)
def _neighbours(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs, interleaved=True))


@CARD.loads("transformers", *_SOME_HALVES)
def _some_halves(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs, partly=True))


@CARD.loads("transformers", *_SOME_NEIGHBOURS)
def _some_neighbours(theirs: Any) -> Loaded:
    return Loaded(lambda: _rotary(theirs, interleaved=True, partly=True))


@CARD.loads("transformers", "SmolLM3Attention")
def _unless_told(theirs: Any) -> Loaded | None:
    """Some layers turn nothing, as their config lists."""
    return _halves(theirs) if theirs.use_rope else None


@CARD.loads("transformers", "Exaone4Attention", "ExaoneMoeAttention")
def _unless_whole(theirs: Any) -> Loaded | None:
    """Where some layers have windows, the others turn nothing."""
    return _halves(theirs) if theirs.sliding_window is None or theirs.is_sliding else None


@CARD.loads("transformers", "AfmoeAttention")
def _where_local(theirs: Any) -> Loaded | None:
    return _halves(theirs) if theirs.is_local_attention else None


@CARD.loads("transformers", "Cohere2Attention")
def _in_windows(theirs: Any) -> Loaded | None:
    """A layer without a window turns nothing."""
    return _neighbours(theirs) if theirs.sliding_window is not None else None


@MROPE.loads("transformers", *_CHUNKS)
def _chunks(theirs: Any) -> Loaded:
    return Loaded(lambda: _multimodal(theirs, (16, 24, 24), "chunks"))


@MROPE.loads("transformers", "Glm4vTextAttention", "Glm4vMoeTextAttention")
def _glm(theirs: Any) -> Loaded:
    interleaved = type(theirs).__name__ == "Glm4vTextAttention"
    return Loaded(lambda: _multimodal(theirs, (8, 12, 12), "chunks", interleaved=interleaved, partly=True))


@MROPE.loads("transformers", *_INTERLEAVED)
def _interleaved(theirs: Any) -> Loaded:
    partly = not type(theirs).__name__.startswith("Qwen3VL")
    usual = (11, 11, 10) if partly else (24, 20, 20)
    return Loaded(lambda: _multimodal(theirs, usual, "interleaved", partly=partly))


@MROPE.loads("transformers", "Ernie4_5_VLMoeTextAttention")
def _ernie(theirs: Any) -> Loaded:
    """Their list is (y, x, t)."""
    return Loaded(lambda: _multimodal(theirs, (22, 22, 20), "alternating", interleaved=True))


@AXIAL.loads("transformers", "DINOv3ViTAttention")
def _dinov3(theirs: Any) -> Loaded:
    """Positions are those of `centres`, whatever the picture's size."""
    D, base = theirs.head_dim, theirs.config.rope_theta
    return Loaded(lambda: AxialRotary(D, base=float(base)))


@AXIAL.loads("transformers", *_PATCHES)
def _patches(theirs: Any) -> Loaded:
    """Positions are (y, x) of patches; pictures and frames are packed documents."""
    D, base = theirs.head_dim, said_of(theirs)["rope_theta"]
    return Loaded(lambda: AxialRotary(D, base=float(base)))


def said_of(theirs: Any) -> dict[str, Any]:
    """What the config says of this layer's rotation: for all layers, or for each type of layers."""
    said: dict[str, Any] = setting(theirs, "rope_parameters", default={})
    kinds = getattr(theirs.config, "layer_types", None)
    if kinds is not None and getattr(theirs, "layer_idx", None) is not None:
        said = said.get(kinds[theirs.layer_idx], said)
    return said


def _options(theirs: Any, *, partly: bool) -> dict[str, Any]:
    """What both kinds of rotation are told."""
    said, share = said_of(theirs), 1.0
    if said.get("rope_type") != "proportional":  # whose pairs stand still beyond that part
        share = said.get("partial_rotary_factor") or 1.0
    if share != 1 and not partly:
        refuse(theirs, "partial_rotary_factor", "has no counterpart here", share, "1: all channels are rotated")
    scaling = scaling_of(theirs, said)
    return {"base": float(said["rope_theta"]), "scaling": scaling, "partial_rotary_factor": share}


def _rotary(theirs: Any, *, interleaved: bool = False, partly: bool = False) -> Rotary:
    D = setting(theirs, "head_dim", "head_size")
    return Rotary(D, interleaved=interleaved, **_options(theirs, partly=partly))


def _multimodal(
    theirs: Any,
    usual: tuple[int, int, int],
    order: Literal["chunks", "interleaved", "alternating"],
    *,
    interleaved: bool = False,
    partly: bool = False,
) -> MRope:
    """With the usual number of pairs for each axis where the config says nothing of it."""
    section = tuple(said_of(theirs).get("mrope_section") or usual)
    section = (section[2], section[0], section[1]) if order == "alternating" else section
    options = _options(theirs, partly=partly)
    return MRope(theirs.head_dim, mrope_section=section, order=order, interleaved=interleaved, **options)


def scaling_of(theirs: Any, said: dict[str, Any]) -> Scaling | None:
    """How the trained length is stretched."""
    kind, longest = said.get("rope_type", "default"), setting(theirs, "max_position_embeddings")
    trained = said.get("original_max_position_embeddings") or longest
    factor = said.get("factor") or 1.0
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(factor)
    if kind == "proportional":
        return Proportional(factor, said.get("partial_rotary_factor") or 1.0)
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
    refuse(
        theirs,
        "rope_type",
        "is unknown",
        repr(kind),
        "default, linear, proportional, dynamic, llama3, yarn or longrope",
    )

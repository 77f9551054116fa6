"""One small random module of every class that regard loads, and how to compare the two layers.

The tests and `tools/conversions.py` go through these. Where a library isn't installed its cases are missing.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import regard
from regard import masks
from regard.positions import centres, grid
from vision.naive_neighborhood import naive_neighborhood

M, H, G, D, T, S = 24, 4, 2, 6, 7, 9


@dataclass(frozen=True)
class Case:
    """Their module, in float64, and f(ours, theirs) -> the two outputs, which must be equal."""

    theirs: nn.Module
    outputs: Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]]
    fp32: bool = False
    """Whether theirs computes something (angles, a softmax, a norm) in float32 whatever its dtype."""
    exact: bool = True
    """Whether the weights can be had back."""


class Wide(TorchFunctionMode):
    """float64 wherever float32 is asked for: angles, norms and softmax without the rounding that theirs has there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(given: Any) -> Any:
            return torch.float64 if given is torch.float32 else given

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(given) for name, given in (kwargs or {}).items()})


def difference(made: Case, *, wide: bool) -> float:
    """The largest of the outputs, relative to 1 + the largest output.

    Args:
        wide: whether theirs computes all in float64, where it has parts in float32.
    """
    with torch.no_grad():
        ours, theirs = made.outputs(regard.convert_layer(made.theirs), made.theirs)
        if wide:
            with Wide():
                theirs = made.outputs(regard.convert_layer(made.theirs), made.theirs)[1]
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.01
    return float((ours - theirs).abs().max() / (1 + theirs.abs().max()))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(module: nn.Module, seed: int = 1) -> Any:
    """In float64, with random weights of which none is 0 or 1."""
    module = module.double().eval()
    with torch.no_grad():
        for n, p in enumerate(module.parameters()):
            p.copy_(0.4 * normal(100 * seed + n, *p.shape) + (0.5 if p.dim() == 1 else 0))
    return module


def keep(batch: int = 2, length: int = T) -> Tensor:
    """Padding on the right; the first sequence has none."""
    return torch.arange(length) < torch.tensor([length, length - 3])[:batch, None]


def added(allowed: Tensor) -> Tensor:
    """A mask as transformers adds it to scores."""
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)


# --- transformers --------------------------------------------------------------------------------------------

SETTINGS = {
    "hidden_size": M, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "intermediate_size": 16,
    "num_hidden_layers": 2, "vocab_size": 16, "max_position_embeddings": 64, "attn_implementation": "sdpa",
    "embedding_size": M, "attention_bias": True, "qkv_bias": True, "pad_token_id": 0,
}  # fmt: skip
TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
"""Heads of which the pairs can be dealt to three axes in more than one way."""
LATENT = {
    "num_key_value_heads": H, "q_lora_rank": 5, "kv_lora_rank": 8, "v_head_dim": 5, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": D,
}  # fmt: skip
EAGER = {"attn_implementation": "eager"}


def rope(share: float | None = None, **more: Any) -> dict[str, Any]:
    """Settings of rotation, of the first channels alone if there is a share."""
    part = {} if share is None else {"partial_rotary_factor": share}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, **part, **more}}


OWN: dict[str, dict[str, Any]] = {
    "Gemma2Attention": {**TYPES, **EAGER, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 5},
    "VaultGemmaAttention": {**TYPES, **EAGER, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 5},
    "Gemma3Attention": TYPES,
    "Gemma3nTextAttention": {**TYPES, "num_kv_shared_layers": 0},
    "Gemma4TextAttention": {
        **TYPES, "global_head_dim": D, "num_kv_shared_layers": 0, "attention_k_eq_v": False,
    },
    "GptOssAttention": {**TYPES, **EAGER, **rope()},
    "AfmoeAttention": TYPES,
    "Olmo3Attention": TYPES,
    "Cohere2Attention": {**TYPES, **rope()},
    "SmolLM3Attention": {**TYPES, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "Exaone4Attention": TYPES,
    "ExaoneMoeAttention": TYPES,
    "CwmAttention": TYPES,
    "DogeAttention": {**EAGER, "keep_window_size": 3},
    "Dots1Attention": TYPES,
    "Qwen3Attention": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    "MistralAttention": {"sliding_window": 3},
    "Phi3Attention": {"sliding_window": 4, **rope(2 / 3)},
    "Qwen3NextAttention": rope(1 / 3),
    "Qwen3_5Attention": {**WIDE, **rope(2 / 3, mrope_section=[2, 1, 1])},
    "Qwen3_5MoeAttention": {**WIDE, **rope(2 / 3, mrope_section=[2, 1, 1])},
    "GPTNeoXAttention": rope(1 / 3),
    "PhiAttention": {"qk_layernorm": True, **rope(2 / 3)},
    "StableLmAttention": {"qk_layernorm": True, "use_qkv_bias": True, **rope(2 / 3)},
    "PersimmonAttention": {"qk_layernorm": True, **rope(2 / 3)},
    "GlmAttention": rope(2 / 3),
    "Glm4Attention": rope(2 / 3),
    "Glm4MoeAttention": {"use_qk_norm": True, **rope(2 / 3)},
    "MiniMaxM2Attention": rope(2 / 3),
    "NemotronAttention": rope(2 / 3),
    "CohereAttention": {"use_qk_norm": True},
    "GraniteAttention": {"attention_multiplier": 0.3},
    "GraniteMoeAttention": {"attention_multiplier": 0.3},
    "Qwen2VLAttention": {**WIDE, **rope(mrope_section=[1, 2, 3])},
    "Qwen2_5_VLAttention": {**WIDE, **rope(mrope_section=[1, 2, 3])},
    "Qwen3VLTextAttention": {**WIDE, **rope(mrope_section=[3, 2, 1])},
    "Qwen3VLMoeTextAttention": {**WIDE, **rope(mrope_section=[3, 2, 1])},
    "Ernie4_5_VLMoeTextAttention": {**WIDE, "use_bias": True, **rope(mrope_section=[2, 2, 2])},
    "Glm4vTextAttention": {**WIDE, **rope(2 / 3, mrope_section=[1, 1, 2])},
    "Glm4vMoeTextAttention": {**WIDE, **rope(2 / 3, mrope_section=[1, 1, 2])},
}  # fmt: skip
CONFIGS = {
    "Gemma3Attention": "Gemma3TextConfig",
    "Qwen2VLAttention": "Qwen2VLTextConfig",
    "Qwen2_5_VLAttention": "Qwen2_5_VLTextConfig",
    "Qwen3_5Attention": "Qwen3_5TextConfig",
    "Qwen3_5GatedDeltaNet": "Qwen3_5TextConfig",
    "Qwen3_5MoeGatedDeltaNet": "Qwen3_5MoeTextConfig",
    "Qwen3_5MoeAttention": "Qwen3_5MoeTextConfig",
    "CLIPAttention": "CLIPTextConfig",
    "SiglipAttention": "SiglipVisionConfig",
    "Siglip2Attention": "Siglip2VisionConfig",
    "Emu3Attention": "Emu3TextConfig",
}


BOTH_WAYS = {
    *("BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention", "ElectraSelfAttention"),
    *("CamembertSelfAttention", "MBartAttention", "PegasusAttention", "MarianAttention", "M2M100Attention"),
    *("Wav2Vec2Attention", "HubertAttention", "SiglipAttention", "ViTAttention", "DeiTAttention", "Dinov2Attention"),
    *("ViTMAEAttention", "EuroBertAttention", "BertGenerationSelfAttention", "Data2VecTextSelfAttention"),
    *("ErnieSelfAttention", "RobertaPreLayerNormSelfAttention", "RoCBertSelfAttention", "XLMRobertaXLSelfAttention"),
    *("XmodSelfAttention", "ChineseCLIPTextSelfAttention", "ClapTextSelfAttention", "LayoutLMSelfAttention"),
    *("MarkupLMSelfAttention", "SplinterSelfAttention", "ASTAttention", "Dinov2WithRegistersAttention"),
    *("IJepaAttention", "ViTMSNAttention", "VivitAttention"),
    *("Siglip2Attention", "Data2VecAudioAttention", "SEWAttention", "UniSpeechAttention"),
    *("UniSpeechSatAttention", "BlenderbotAttention", "BlenderbotSmallAttention", "PLBartAttention"),
}
"""Those that are built here as their encoders build them."""


@lru_cache
def modules() -> dict[str, str]:
    """The module of transformers that defines each class of attention: folders are named in no one way."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, str] = {}
    for file in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^class (\w+(?:Attention|DeltaNet))\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, f"transformers.models.{file.parent.name}.{file.stem}")
    return found


def cls(name: str) -> type[nn.Module]:
    """The class of transformers, wherever it stands."""
    return getattr(importlib.import_module(modules()[name]), name)


def config_of(kind: type[nn.Module], **more: Any) -> Any:
    file = inspect.getmodule(kind)
    stem = re.sub(r"((Self|Cross|Delta)?Attention|GatedDeltaNet)$", "", kind.__name__)
    where = importlib.import_module(file.__name__.replace("modeling_", "configuration_"))
    return getattr(where, CONFIGS.get(kind.__name__, f"{stem}Config"))(
        **{**SETTINGS, **OWN.get(kind.__name__, {}), **more}
    )


def module_of(name: str, *, layer: int = 0, **more: Any) -> nn.Module:
    kind = cls(name)
    arguments = inspect.signature(kind).parameters
    config = config_of(kind, **more)
    if "embed_dim" in arguments:
        return kind(M, H, config=config, is_causal=name not in BOTH_WAYS)
    return kind(config, layer_idx=layer) if "layer_idx" in arguments else kind(config)


T5 = {
    *("T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention"),
    "Pop2PianoAttention",
}
DECODERS = {"MT5Attention", "LongT5Attention", "Pop2PianoAttention"}


def window_of(theirs: nn.Module) -> int:
    """As the config has it for this layer; T where there is none."""
    own = OWN.get(type(theirs).__name__, {})
    kinds = own.get("layer_types", [])
    whole = kinds and kinds[theirs.layer_idx] == "full_attention"
    return T if whole else own.get("sliding_window", T)


def rotated(theirs: nn.Module, x: Tensor, at: Tensor | None = None) -> dict[str, Any]:
    """What a model with rotary positions hands to its layers."""
    if "position_embeddings" not in inspect.signature(theirs.forward).parameters:
        return {}
    file = inspect.getmodule(type(theirs))
    stem = type(theirs).__name__.removesuffix("Attention")
    names = (f"{stem}RotaryEmbedding", f"{stem}TextRotaryEmbedding", f"{stem.removesuffix('Text')}RotaryEmbedding")
    embedding = next(getattr(file, name) for name in names if hasattr(file, name))(theirs.config)
    kind = {}
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        kind = {"layer_type": theirs.config.layer_types[theirs.layer_idx]}
    at = torch.arange(x.shape[1]).expand(len(x), -1) if at is None else at.movedim(-1, 0)
    return {"position_embeddings": embedding(x, at, **kind)}


def places() -> Tensor:
    """(1, T, 3): text, a picture of 2 x 2, and text one beyond its largest coordinate."""
    text = torch.arange(5)[:, None].expand(5, 3)
    picture = 2 + grid(1, 2, 2)[0]
    return torch.cat([text[:2], picture, text[4:]])[None]


def whole(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Sequences without padding, of which theirs knows nothing."""
    x = normal(2, 2, T, M)
    return ours(x), theirs(x)


def tokens(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Self-attention of padded sequences, as their model would mask them."""
    name = type(theirs).__name__
    x, real = normal(2, 2, T, M), keep()
    ages = torch.arange(T)[:, None] - torch.arange(T)
    seen = ages.abs() < window_of(theirs)
    if name not in BOTH_WAYS:
        seen &= ages >= 0
    allowed = seen & real[:, None, None]
    at = places().expand(2, -1, -1) if "mrope_section" in OWN.get(name, {}).get("rope_parameters", {}) else None
    given: dict[str, Any] = {"attention_mask": added(allowed), **rotated(theirs, x, at)}
    if "shared_kv_states" in inspect.signature(theirs.forward).parameters:
        given["shared_kv_states"] = {}
    seeing = allowed.any(-1)[:, 0] if hasattr(theirs, "attn_logit_softcapping") else slice(None)  # else theirs is NaN
    return ours(x, mask=masks.padding(real), positions=at)[seeing], theirs(x, **given)[0][seeing]


def doge(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Self-attention of padded sequences; a layer that takes no positions."""
    x, real = normal(2, 2, T, M), keep()
    allowed = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None, None]
    return ours(x, mask=masks.padding(real)), theirs(x, attention_mask=allowed, **rotated(theirs, x))[0]


def picture(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Two tokens of no place, then 2 x 3 patches."""
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

    x = normal(2, 2, 8, 16)
    turned = DINOv3ViTRopePositionEmbedding(theirs.config).eval()(torch.zeros(1, 3, 8, 12, dtype=torch.float64))
    return ours(x, positions=centres(2, 3, prefix=2)), theirs(x, position_embeddings=turned)[0]


def across(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x, context, real = normal(2, 2, T, M), normal(3, 2, S, M), keep(2, S)
    name = "key_value_states" if hasattr(theirs, "embed_dim") else "encoder_hidden_states"
    given = {name: context, "attention_mask": added(real[:, None, None].expand(2, 1, T, S))}
    return ours(x, context, mask=masks.padding(real)), theirs(x, **given)[0]


def bloom(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    file = inspect.getmodule(type(theirs))
    x, real = normal(2, 2, T, M), keep()
    allowed = torch.ones(T, T).tril().bool() & real[:, None, None]
    alibi = file.build_alibi_tensor(torch.ones(2, T), H, torch.float64)
    return ours(x, mask=masks.padding(real)), theirs(x, torch.zeros_like(x), alibi, added(allowed))[0]


def pictures(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Two of 2 x 3 and 2 x 2 patches, which are packed."""
    file = inspect.getmodule(type(theirs))
    embedding = next(kind for name, kind in vars(file).items() if name.endswith("VisionRotaryEmbedding"))
    x, at, borders = normal(2, 10, 16), torch.cat([grid(2, 3), grid(2, 2)], 1), torch.tensor([0, 6, 10])
    want = theirs(x, borders, position_embeddings=embedding(theirs.config)(x, at[0]))
    return ours(x[None], positions=at, mask=masks.packed(borders))[0], want


def mpt(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    file = inspect.getmodule(type(theirs))
    x, real = normal(2, 2, T, M), keep()
    hidden = ~(torch.ones(T, T).tril().bool() & real[:, None, None])
    alibi = file.build_mpt_alibi_tensor(H, T).double()
    return ours(x, mask=masks.padding(real)), theirs(x, alibi, attention_mask=hidden)[0]


def t5(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """As their stacks mask it: a decoder's layers are causal."""
    x, real = normal(2, 2, T, M), keep()
    allowed = real[:, None, None].expand(2, 1, T, T)
    allowed = allowed.tril() if theirs.is_causal else allowed
    named = "attention_mask" if "attention_mask" in inspect.signature(theirs.forward).parameters else "mask"
    return ours(x, mask=masks.padding(real)), theirs(x, **{named: added(allowed)})[0]


def nystrom(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x = normal(2, 2, 20, M)
    return ours(x), theirs(x)[0]


def yoso(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x = normal(2, 2, 11, M)
    return ours(x), theirs(x, torch.ones(2, 11))[0]


def reformer(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Both draw their rotations from one seed."""
    x = normal(2, 2, 12, M)
    torch.manual_seed(3)
    mine = ours(x)
    torch.manual_seed(3)
    return mine, theirs(x).hidden_states


def convbert(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x = normal(2, 2, 11, M)
    return ours(x), theirs(x)[0]


def longformer(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Two global tokens and two hidden ones; theirs are told by one mask, and it leaves hidden tokens at 0."""
    x, kinds = normal(2, 2, 12, M), torch.zeros(2, 12)
    kinds[0, [0, 7]], kinds[1, 10:] = 1, -1
    told = {"is_index_masked": kinds < 0, "is_index_global_attn": kinds > 0, "is_global_attn": True}
    want = theirs(x, attention_mask=1e4 * kinds.double(), **told)[0]
    return ours(x, global_at=kinds > 0, mask=masks.padding(kinds >= 0)), want


def delta_net(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Padded on the left, as for generation."""
    x, real = normal(2, 2, T, M), torch.arange(T) >= torch.tensor([[0], [3]])
    return ours(x, mask=real)[real], theirs(x, attention_mask=real)[real]


def florence(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x = normal(5, 2, 4, 5, M)
    want = theirs(x.flatten(1, 2) if hasattr(theirs, "groups") else x)
    return ours(x.movedim(-1, 1)).flatten(2).mT, want.reshape(2, 20, M)


def dinat(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Loops over its weights: its own forward needs natten, and hands heads and rows to it in the wrong order."""
    x = normal(5, 2, 7, 8, M)
    q, k, v = (f(x).unflatten(-1, (H, D)) for f in (theirs.query, theirs.key, theirs.value))
    options = [(one, one) for one in (theirs.kernel_size, 1, theirs.dilation, False)]
    out = naive_neighborhood(q, k, v, *options, bias=theirs.rpb)
    return ours(x.movedim(-1, 1)).movedim(1, -1), out.flatten(3)


def conditional(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    from regard.detection.places import sine_embedding

    x, memory, query_pos, pos = normal(1, 2, 5, M), normal(2, 2, 7, M), normal(3, 2, 5, M), normal(5, 2, 7, M)
    reference, real = uniform(4, 2, 5, 2), keep(2, 7)
    want = theirs(
        x,
        encoder_hidden_states=memory,
        query_sine_embed=sine_embedding(reference, M),
        encoder_position_embeddings=pos,
        query_position_embeddings=query_pos,
        attention_mask=added(real[:, None, None].expand(2, 1, 5, 7)),
    )[0]
    return ours(x, memory, reference, pos, query_pos=query_pos, mask=real), want


LEVELS = [(4, 7), (3, 2), (1, 3)]


def deformable(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    x, context, real = normal(2, 2, 5, M), normal(3, 2, 37, M), uniform(5, 2, 37) < 0.8
    reference = 0.2 + 0.6 * uniform(4, 2, 5, 1, 4)
    want = theirs(
        x,
        encoder_hidden_states=context,
        attention_mask=real,
        reference_points=reference.expand(2, 5, 1 if hasattr(theirs, "method") else 3, 4),
        spatial_shapes=torch.tensor(LEVELS),
        spatial_shapes_list=LEVELS,
        level_start_index=torch.tensor([0, 28, 34]),
    )[0]
    return ours(x, context, reference, LEVELS, mask=real), want


def recurrent(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
    """Recurrences, behind whose padding nothing follows; Griffin's knows places only."""
    x, real = normal(2, 2, T, M), keep()
    if "position_ids" in inspect.signature(theirs.forward).parameters:
        return ours(x), theirs(x, torch.arange(T).expand(2, T), None, use_cache=False)[0]
    return ours(x, mask=masks.padding(real)), theirs(x, attention_mask=real.long())


def recurrent_module(name: str) -> nn.Module:
    made = importlib.import_module("transformers")
    if name == "Mamba2Mixer":
        sizes = {"num_heads": H, "head_dim": 12, "n_groups": 2, "use_bias": False, "chunk_size": 4}
        config = made.Mamba2Config(hidden_size=M, state_size=5, **sizes, num_hidden_layers=1, vocab_size=16)
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Mixer
    elif name == "MambaMixer":
        config = made.MambaConfig(hidden_size=M, state_size=5, num_hidden_layers=1, vocab_size=16)
        from transformers.models.mamba.modeling_mamba import MambaMixer as Mixer
    else:
        config = made.RecurrentGemmaConfig(hidden_size=M, lru_width=20, num_attention_heads=H, num_hidden_layers=1)
        from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock as Mixer
    return Mixer(config, 0)


def state_module(name: str) -> nn.Module:
    """Recurrences that know no padding."""
    made = importlib.import_module("transformers")
    if name == "xLSTMLayer":
        sizes = {"num_heads": 2, "qk_dim_factor": 0.5, "v_dim_factor": 1.5}
        from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

        return xLSTMLayer(made.xLSTMConfig(hidden_size=M, num_hidden_layers=2, vocab_size=16, **sizes))
    config = made.RwkvConfig(hidden_size=M, attention_hidden_size=20, num_hidden_layers=3, vocab_size=16)
    return cls(name)(config, 1)


def deformable_module(name: str) -> nn.Module:
    kind = cls(name)
    stem = name.removesuffix("MultiscaleDeformableAttention")
    where = importlib.import_module(inspect.getmodule(kind).__name__.replace("modeling_", "configuration_"))
    levels = {"num_feature_levels": 3, "disable_custom_kernels": True}
    v2 = {"decoder_n_points": 2, "decoder_n_levels": 3, "decoder_offset_scale": 0.8, "decoder_attention_heads": H}
    config = getattr(where, f"{stem}Config")(d_model=M, **levels, **v2)
    return kind(config) if stem == "RTDetrV2" else kind(config, num_heads=H, n_points=2)


def of_transformers(name: str) -> Case:
    if name.endswith("DeformableAttention"):
        return Case(filled(deformable_module(name)), deformable)
    if name in ("MambaMixer", "Mamba2Mixer", "RecurrentGemmaRecurrentBlock"):
        return Case(filled(recurrent_module(name)), recurrent, fp32=True)
    if name in ("RwkvSelfAttention", "xLSTMLayer"):
        x = normal(2, 2, T, M)
        return Case(filled(state_module(name)), lambda ours, theirs: (ours(x), theirs(x)[0]), fp32=True)
    if name == "ConditionalDetrDecoderCrossAttention":
        from transformers import ConditionalDetrConfig

        config = ConditionalDetrConfig(d_model=M, decoder_attention_heads=H, attn_implementation="sdpa")
        return Case(filled(cls(name)(config, M, H)), conditional)
    if name == "MptAttention":
        from transformers import MptConfig

        return Case(filled(cls(name)(MptConfig(d_model=M, n_heads=H), 0)), mpt, fp32=True)
    if name.startswith("Florence2Vision"):
        from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

        kind = cls(name)
        config = Florence2VisionConfig(embed_dim=(M,), num_heads=(H,), num_groups=(H,), window_size=3, qkv_bias=True)
        config._attn_implementation = "sdpa"
        return Case(filled(kind(config, 0)), florence)
    if name == "NeighborhoodAttention":
        kind = cls(name)
        config = importlib.import_module("transformers").DinatConfig()
        return Case(filled(kind(config, M, H, 3, 2)), dinat)
    if name.endswith("VisionAttention"):
        kind = cls(name)
        stem = "Qwen2VLVision" if name == "VisionAttention" else name.removesuffix("Attention")
        where = importlib.import_module(kind.__module__.replace("modeling_", "configuration_"))
        width = {"embed_dim" if name == "VisionAttention" else "hidden_size": 16}
        config = getattr(where, f"{stem}Config")(**width, num_heads=2, attn_implementation="sdpa")
        return Case(filled(kind(config)), pictures, fp32=True)
    if name == "DINOv3ViTAttention":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 4}
        return Case(filled(module_of(name, **sizes)), picture, fp32=True)
    if name in ("DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention", "YoutuAttention"):
        return Case(filled(module_of(name, **LATENT)), tokens, fp32=True)
    if name == "DeepseekV32Attention":
        sizes = {"index_topk": 3, "index_n_heads": 8, "index_head_dim": 6}
        return Case(filled(module_of(name, **LATENT, **sizes)), tokens, fp32=True)
    if name == "SwiftFormerEfficientAdditiveAttention":
        return Case(filled(cls(name)(None, M)), whole)
    if name == "NystromformerSelfAttention":
        more = {"num_landmarks": 5, "segment_means_seq_len": 20, "conv_kernel_size": 7, "inv_coeff_init_option": False}
        return Case(filled(module_of(name, **more)), nystrom)
    if name == "YosoSelfAttention":
        return Case(filled(module_of(name, hash_code_len=5, conv_window=3)), yoso)

    if name == "LSHSelfAttention":
        config = importlib.import_module("transformers").ReformerConfig
        sizes = {"hidden_size": M, "num_attention_heads": H, "attention_head_size": D, "lsh_attn_chunk_length": 4}
        rest = {"num_hashes": 2, "lsh_attention_probs_dropout_prob": 0.0, "is_decoder": True}
        return Case(filled(cls(name)(config(**sizes, **rest))), reformer)
    if name == "LongformerSelfAttention":
        config = importlib.import_module("transformers").LongformerConfig
        made = config(hidden_size=M, num_attention_heads=H, attention_window=[4], attention_probs_dropout_prob=0.0)
        return Case(filled(cls(name)(made, 0)), longformer, fp32=True)
    if name.endswith("GatedDeltaNet"):
        sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 5, "value_head_dim": 3}
        return Case(filled(module_of(name, **{f"linear_{n}": size for n, size in sizes.items()})), delta_net, fp32=True)
    if name == "KimiLinearDeltaAttention":
        sizes = {"linear_num_heads": H, "linear_head_dim": D}
        return Case(filled(module_of(name, **sizes)), delta_net, fp32=True)
    if name == "ConvBertSelfAttention":
        return Case(filled(module_of(name, conv_kernel_size=7, head_ratio=2)), convbert)
    if name in T5:
        kind, causal = cls(name), name in DECODERS
        sizes = {"d_model": M, "num_heads": H, "d_kv": D, "relative_attention_num_buckets": 8}
        config = config_of(kind, **sizes, relative_attention_max_distance=6, is_decoder=causal)
        made = kind(config, has_relative_attention_bias=True, layer_idx=0, is_causal=causal)
        return Case(filled(made), t5, fp32=True)
    theirs = filled(module_of(name))
    if name == "BloomAttention":
        return Case(theirs, bloom, fp32=True)
    if name == "DogeAttention":
        return Case(theirs, doge, fp32=True)
    exact = name not in ("Gemma3Attention", "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")
    rotary = "position_embeddings" in inspect.signature(theirs.forward).parameters
    return Case(theirs, across if "Cross" in name else tokens, fp32=rotary or not exact, exact=exact)


# --- other libraries -----------------------------------------------------------------------------------------


def of_torch(name: str) -> Case:
    def outputs(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        x, context, real = normal(2, 2, T, M), normal(3, 2, S, 10), keep(2, S)
        return ours(x, context, mask=masks.padding(real)), theirs(x, context, context, key_padding_mask=~real)[0]

    return Case(filled(nn.MultiheadAttention(M, H, kdim=10, vdim=10, batch_first=True)), outputs)


EDGES = torch.randint(9, (2, 30), generator=torch.Generator().manual_seed(5))


def of_geometric(name: str) -> Case:
    from torch_geometric import nn as geometric

    if name == "GATv2Conv":

        def outputs(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
            x, features = normal(4, 9, M), normal(6, 30, 2)
            return ours(x, EDGES, features), theirs(x, EDGES, features)

        return Case(filled(geometric.GATv2Conv(M, D, H, edge_dim=2)), outputs)
    if name == "SuperGATConv":
        return Case(
            filled(geometric.SuperGATConv(M, D, H)),
            lambda ours, theirs: (ours(normal(4, 9, M), EDGES), theirs(normal(4, 9, M), EDGES)),
        )

    def network(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, M), nn.ReLU(), nn.Linear(M, M))

    def points(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        x, pos = normal(4, 9, M), normal(5, 9, 3)
        return ours(x, EDGES, pos), theirs(x, pos, EDGES)

    return Case(filled(geometric.PointTransformerConv(M, M, pos_nn=network(3), attn_nn=network(M))), points)


def of_timm(name: str) -> Case:
    from timm.layers import Attention, RmsNorm
    from timm.layers.bottleneck_attn import BottleneckAttn
    from timm.layers.halo_attn import HaloAttn
    from timm.models import davit

    def maps(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        x = normal(5, 2, M, 8, 8)
        return ours(x), theirs(x)

    if name == "HaloAttn":
        return Case(filled(HaloAttn(M, num_heads=H, block_size=4, halo_size=1, scale_pos_embed=True)), maps)
    if name == "BottleneckAttn":
        return Case(filled(BottleneckAttn(M, feat_size=(8, 8), num_heads=H, dim_head=5, scale_pos_embed=True)), maps)
    if name == "Attention":
        theirs = filled(Attention(M, H, qkv_bias=True, qk_norm=True, norm_layer=RmsNorm))
        return Case(theirs, lambda ours, theirs: (ours(normal(2, 2, T, M)), theirs(normal(2, 2, T, M))))
    if name == "WindowAttention":

        def window(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
            x = normal(5, 2, 3, 3, M)
            return ours(x.movedim(-1, 1)).movedim(1, -1).flatten(1, 2), theirs(x.flatten(1, 2))

        return Case(filled(davit.WindowAttention(M, (3, 3), H)), window)

    def channels(ours: Any, theirs: Any) -> tuple[Tensor, Tensor]:
        x = normal(5, 2, 12, M)
        return ours(x.mT).mT, theirs(x)

    return Case(filled(getattr(davit, name)(M, H)), channels)


LIBRARIES: dict[str, Callable[[str], Case]] = {
    "transformers": of_transformers,
    "torch.nn": of_torch,
    "torch_geometric.nn": of_geometric,
    "timm.layers": of_timm,
    "timm.models.davit": of_timm,
}


def names() -> list[str]:
    """All that regard says it loads of libraries that are installed."""
    return [name for name in regard.convertible() if find_spec(name.split(" ")[0].split(".")[0]) is not None]


def case(name: str) -> Case:
    library, kind = name.split(" ")
    return LIBRARIES[library](kind)

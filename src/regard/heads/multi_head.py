"""Multi-head scaled dot-product attention with softmax: the baseline.

    head_h = softmax(q_h k_g^T / sqrt(D)) v_g,   g = h // (H / G),   y = concat_h(head_h) W_o
    G = H: multi-head        G = 1: multi-query        G between: grouped-query

The pipeline itself is this mechanism, so the cards fill no slot but the number of key/value heads.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import divides, refuse, whole
from regard.weights import Loaded, Move, only, same, setting, shapes, shapes_of, stacked, transposed, woven

CARD = Card(
    "softmax",
    equation="y = softmax(q k^T / sqrt(D)) v",
    papers=(Paper("Attention Is All You Need", "Vaswani et al.", 2017, "1706.03762", "equation 1; section 3.2"),),
    traits=PLAIN,
    claim="Any key is one layer away from any query: "
    "tests/heads/test_multi_head.py::test_any_key_is_one_layer_away_from_any_query.",
    verified="third-party",
)

MQA = Card(
    "mqa",
    equation="head_h = softmax(q_h k^T / sqrt(D)) v",
    papers=(
        Paper(
            "Fast Transformer Decoding: One Write-Head is All You Need",
            "Shazeer",
            2019,
            "1911.02150",
            "not its own text, but the form in transformers' Llama",
        ),
    ),
    gist="Multi-query attention: all query heads share one key and value head; a cache H times smaller.",
    supports=CARD.supports - {"gqa"},
    traits=PLAIN,
    cost=Cost("2*B*H*T*S*D", "2*S*D"),
    claim="Little loss of quality for much faster decoding, at full size only. In small: the state is H times "
    "smaller: tests/heads/test_multi_head.py::test_the_cache_shrinks_by_the_heads_shared.",
    verified="third-party",
)

GQA = Card(
    "gqa",
    equation="head_h = softmax(q_h k_g^T / sqrt(D)) v_g,  g = h // (H / G)",
    papers=(
        Paper(
            "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
            "Ainslie et al.",
            2023,
            "2305.13245",
            "not its own text, but the form in transformers' Llama",
        ),
    ),
    gist="Grouped-query attention: query heads share keys and values in G groups.",
    traits=PLAIN,
    claim="Quality close to multi-head at a speed close to multi-query, at full size only. In small: the state is H / "
    "G times smaller: tests/heads/test_multi_head.py::test_the_cache_shrinks_by_the_heads_shared.",
    verified="third-party",
)


@CARD.fills()
def multi_head() -> dict[str, object]:
    """Every slot stays empty."""
    return {}


@MQA.fills("num_kv_heads")
def multi_query(num_heads: int, num_kv_heads: int) -> int:
    """1, whatever the number of query heads."""
    if num_kv_heads not in (1, num_heads):
        refuse("mqa", "num_kv_heads", "is not 1", num_kv_heads, "1; 'gqa' has other numbers")
    return 1


@GQA.fills("num_kv_heads")
def grouped_query(num_heads: int, num_kv_heads: int) -> int:
    """The number that was asked for; without one, the largest divisor of H up to H / 4.

    H itself counts as none asked for: groups of one head are plain multi-head attention.
    """
    whole("gqa", num_kv_heads=num_kv_heads)
    divides("gqa", num_kv_heads=num_kv_heads, num_heads=num_heads)
    if num_kv_heads < num_heads:
        return num_kv_heads
    return max(g for g in range(1, max(1, num_heads // 4) + 1) if num_heads % g == 0)


# --- pretrained layers ---------------------------------------------------------------------------------------


@CARD.loads(
    "transformers",
    *("LlamaAttention", "MistralAttention", "MixtralAttention", "MinistralAttention", "GemmaAttention"),
    *("Qwen2Attention", "Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "GraniteAttention"),
    *("ArceeAttention", "Starcoder2Attention", "OlmoAttention", "SeedOssAttention", "JambaAttention"),
    *("CohereAttention", "Cohere2Attention", "HeliumAttention", "Ernie4_5Attention", "Ernie4_5_MoeAttention"),
    *("Gemma2Attention", "Gemma3Attention", "Gemma3nTextAttention", "Gemma4TextAttention", "VaultGemmaAttention"),
    *("GptOssAttention", "Olmo2Attention", "Olmo3Attention", "OlmoeAttention", "FlexOlmoAttention"),
    *("ChameleonAttention", "StableLmAttention", "GlmAttention", "Glm4Attention", "Glm4MoeAttention"),
    *("Glm4vTextAttention", "Glm4vMoeTextAttention", "MiniMaxM2Attention", "NemotronAttention", "SmolLM3Attention"),
    *("Exaone4Attention", "ExaoneMoeAttention", "Dots1Attention", "CwmAttention", "GraniteMoeAttention"),
    *("Qwen2VLAttention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention", "Qwen3VLMoeTextAttention"),
    *("Ernie4_5_VLMoeTextAttention", "EuroBertAttention", "DINOv3ViTAttention", "AfmoeAttention", "ApertusAttention"),
    *("GraniteMoeSharedAttention", "Emu3Attention", "CsmAttention"),
    *("BartAttention", "MBartAttention", "PegasusAttention", "MarianAttention", "M2M100Attention", "WhisperAttention"),
    *("Wav2Vec2Attention", "HubertAttention", "SiglipAttention", "OPTAttention"),
    *("Data2VecAudioAttention", "SEWAttention", "UniSpeechAttention", "UniSpeechSatAttention", "Siglip2Attention"),
    *("BioGptAttention", "BlenderbotAttention", "BlenderbotSmallAttention", "PLBartAttention"),
    *("ViTAttention", "DeiTAttention", "Dinov2Attention", "Dinov2WithRegistersAttention", "ViTMAEAttention"),
    *("ViTMSNAttention", "VivitAttention", "IJepaAttention", "ASTAttention"),
)
def _separate(theirs: Any) -> Loaded:
    only(setting(theirs, "config"), {"clip_qkv": None})
    only(theirs, {"is_kv_shared_layer": False, "use_alternative_attention": False})  # Gemma 3n and 4
    moves = same(theirs, {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj"})
    return _loaded(theirs, [*moves, *same(theirs, {"o_proj": "out_proj"})])


@CARD.loads("transformers", "PhiAttention")
def _phi(theirs: Any) -> Loaded:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "dense"}
    return _loaded(theirs, same(theirs, names))


@CARD.loads("transformers", "CLIPAttention")
def _clip(theirs: Any) -> Loaded:
    """Its text model is causal, which only the model tells its layers."""
    moves = same(theirs, {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"})
    return _loaded(theirs, moves, causal=type(theirs.config).__name__ == "CLIPTextConfig")


@CARD.loads("transformers", "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")
def _without_queries(theirs: Any) -> Loaded:
    """The gate, whose rows stand between those of the queries, brings both."""
    return _loaded(theirs, same(theirs, {"k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj"}))


@CARD.loads(
    "transformers",
    *("BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention", "ElectraSelfAttention"),
    *("CamembertSelfAttention", "BertGenerationSelfAttention", "Data2VecTextSelfAttention", "ErnieSelfAttention"),
    *("RobertaPreLayerNormSelfAttention", "RoCBertSelfAttention", "XLMRobertaXLSelfAttention", "XmodSelfAttention"),
    *("ChineseCLIPTextSelfAttention", "ClapTextSelfAttention", "LayoutLMSelfAttention", "MarkupLMSelfAttention"),
    *("SplinterSelfAttention", "BertCrossAttention", "RobertaCrossAttention", "XLMRobertaCrossAttention"),
    *("CamembertCrossAttention", "ErnieCrossAttention"),
)
def _unmerged(theirs: Any) -> Loaded:
    return _loaded(theirs, same(theirs, {"q_proj": "query", "k_proj": "key", "v_proj": "value"}))


@CARD.loads(
    "transformers",
    *("T5Attention", "MT5Attention", "UMT5Attention", "LongT5Attention", "SwitchTransformersAttention"),
    "Pop2PianoAttention",
)
def _t5(theirs: Any) -> Loaded:
    """Their scale is 1. A layer without a table of positions comes without: where its model hands it the first layer's,
    give it that layer's `position`."""
    return _loaded(theirs, same(theirs, {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}))


@CARD.loads("transformers", "GPT2Attention")
def _conv1d(theirs: Any) -> Loaded:
    only(theirs, {"is_cross_attention": False})
    moves = transposed([*stacked(theirs, _QKV, "c_attn"), *same(theirs, {"o_proj": "c_proj"})])
    return _loaded(theirs, moves)


@CARD.loads("transformers", "Phi3Attention")
def _grouped(theirs: Any) -> Loaded:
    H, G, D = (setting(theirs, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    moves = stacked(theirs, _QKV, "qkv_proj", [H * D, G * D, G * D])
    return _loaded(theirs, [*moves, *same(theirs, {"o_proj": "o_proj"})])


@CARD.loads("transformers", "GPTNeoXAttention", "BloomAttention", "PersimmonAttention")
def _woven(theirs: Any) -> Loaded:
    moves = woven(theirs, _QKV, "query_key_value", setting(theirs, "num_heads", "num_attention_heads"))
    keywords = {"causal": True}  # Bloom's does not say so
    return _loaded(theirs, [*moves, *same(theirs, {"o_proj": "dense"})], **keywords)


@CARD.loads(
    "transformers",
    *("VisionAttention", "Qwen2_5_VLVisionAttention", "Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention"),
    *("Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention"),
)
def _qwen_vision(theirs: Any) -> Loaded:
    return _loaded(theirs, [*stacked(theirs, _QKV, "qkv"), *same(theirs, {"o_proj": "proj"})])


@CARD.loads("transformers", "MptAttention")
def _mpt(theirs: Any) -> Loaded:
    only(theirs, {"clip_qkv": None})
    moves = [*stacked(theirs, _QKV, "Wqkv"), *same(theirs, {"o_proj": "out_proj"})]
    return _loaded(theirs, moves, causal=True, scale=theirs.softmax_scale, dropout=theirs.attn_dropout_p)


@CARD.loads("timm.layers", "Attention")
def _timm(theirs: Any) -> Loaded:
    only(theirs, {"gate": None})
    if not isinstance(getattr(theirs, "norm", None), nn.Identity | None):
        refuse(theirs, "norm", "of the heads' outputs has no counterpart here", theirs.norm, "scale_norm=False")
    return _loaded(theirs, [*stacked(theirs, _QKV, "qkv"), *same(theirs, {"o_proj": "proj"})])


@CARD.loads("torch.nn", "MultiheadAttention")
def _torch(theirs: Any) -> Loaded:
    only(theirs, {"bias_k": None, "bias_v": None, "add_zero_attn": False})
    if theirs.kdim != theirs.vdim:
        refuse(theirs, "vdim", "is not kdim", theirs.vdim, f"{theirs.kdim}: keys and values come of one context")
    apart = {f"{n}_proj.weight": f"{n}_proj_weight" for n in "qkv"}  # where keys have another width than queries
    return _loaded(theirs, [*stacked(theirs, _QKV, "in_proj"), *same(theirs, {"o_proj": "out_proj", **apart})])


_QKV = ("q_proj", "k_proj", "v_proj")


def _loaded(theirs: Any, moves: Sequence[Move], **keywords: Any) -> Loaded:
    """Their sizes, which the projections tell, and settings."""
    sizes = shapes(moves, shapes_of(theirs))
    D = setting(theirs, "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
    rows, dim = sizes.get("q_proj.weight") or sizes["o_proj.weight"][::-1]
    key_rows, context_dim = sizes["k_proj.weight"]
    dropout = setting(theirs, "attention_dropout", "dropout", "attn_dropout", "attn_drop", default=0.0)
    keywords = {
        "dim": dim,
        "num_heads": rows // D,
        "num_kv_heads": key_rows // D,
        "head_dim": D,
        "context_dim": context_dim,
        "causal": bool(getattr(theirs, "is_causal", False)),
        "scale": getattr(theirs, "scaling", None),
        "dropout": getattr(dropout, "p", dropout),
        "bias": True,  # those that theirs lack, ours lose
        **keywords,
    }
    return Loaded(lambda: keywords, moves)

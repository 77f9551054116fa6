"""Pretrained layers of transformers that are no pipeline: what each becomes here."""

from typing import Any

from regard.checks import refuse
from regard.mixers.differential import CARD as DIFFERENTIAL
from regard.mixers.differential import DifferentialAttention
from regard.mixers.dsa import CARD as DSA
from regard.mixers.dsa import DeepseekSparseAttention
from regard.mixers.mla import CARD as MLA
from regard.mixers.mla import MultiHeadLatentAttention
from regard.positions.pretrained import said_of, scaling_of
from regard.weights import Loaded, same

_LATENT = (
    *("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"),
    *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"),
)


@MLA.loads("transformers", "DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention", "YoutuAttention")
def _deepseek(theirs: Any) -> Loaded:
    """V2 turns neighbours and does not say so."""
    config = theirs.config
    options = _latents(theirs) | {
        "interleaved": getattr(config, "rope_interleave", True),
        "causal": theirs.is_causal,
    }
    moves = same(theirs, {name: name for name in _LATENT})
    return Loaded(lambda: MultiHeadLatentAttention(theirs.hidden_size, theirs.num_heads, **options), moves)


@DSA.loads("transformers", "DeepseekV32Attention")
def _sparse_deepseek(theirs: Any) -> Loaded:
    indexer = theirs.indexer
    options = _latents(theirs) | {
        "num_index_heads": indexer.n_heads,
        "index_dim": indexer.head_dim,
        "topk": indexer.index_topk,
    }
    moves = same(theirs, {name: name for name in _LATENT} | {"selector": "indexer"})
    return Loaded(lambda: DeepseekSparseAttention(theirs.hidden_size, theirs.num_heads, **options), moves)


def _latents(theirs: Any) -> dict[str, Any]:
    said = said_of(theirs)
    return {
        "q_rank": theirs.q_lora_rank,
        "kv_rank": theirs.kv_lora_rank,
        "nope_dim": theirs.qk_nope_head_dim,
        "rope_dim": theirs.qk_rope_head_dim,
        "value_dim": theirs.v_head_dim,
        "base": float(said["rope_theta"]),
        "scaling": scaling_of(theirs, said),
        "scale": theirs.scaling,
        "eps": theirs.kv_a_layernorm.variance_epsilon,
        "bias": theirs.config.attention_bias,
        "dropout": theirs.attention_dropout,
    }


@DIFFERENTIAL.loads("transformers", "DiffLlamaAttention")
def _diffllama(theirs: Any) -> Loaded:
    config, said = theirs.config, said_of(theirs)
    if (kind := said.get("rope_type", "default")) != "default":
        refuse(theirs, "rope_type", "has no counterpart here", repr(kind), "'default': no stretched rotation")
    options = {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": theirs.head_dim,
        "causal": theirs.is_causal,
        "bias": config.attention_bias,
        "layer_index": theirs.layer_idx,
        "lambda_init": theirs.lambda_init,
        "pairing": "split",
        "norm_weight": False,
        "base": float(said["rope_theta"]),
        "eps": theirs.groupnorm.eps,
    }
    names = [f"{n}_proj" for n in "qkvo"] + [f"lambda_{n}{i}" for n in "qk" for i in (1, 2)]
    moves = same(theirs, {name: name for name in names})
    return Loaded(lambda: DifferentialAttention(config.hidden_size, config.num_attention_heads, **options), moves)

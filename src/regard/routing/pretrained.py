"""Pretrained layers of transformers that are no pipeline: what each becomes here."""

from typing import Any

from regard.checks import refuse
from regard.positions.pretrained import said_of
from regard.routing.dynamic_mask import CARD as DYNAMIC_MASK
from regard.routing.dynamic_mask import DynamicMaskAttention
from regard.weights import Loaded, same


@DYNAMIC_MASK.loads("transformers", "DogeAttention")
def _doge(theirs: Any) -> Loaded:
    config, said = theirs.config, said_of(theirs)
    if (kind := said.get("rope_type", "default")) != "default":
        refuse(theirs, "rope_type", "has no counterpart here", repr(kind), "'default': no stretched rotation")
    options: dict[str, Any] = {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": theirs.head_dim,
        "keep_window": theirs.keep_window_size,
        "base": float(said["rope_theta"]),
        "eps": theirs.q_norm.variance_epsilon,
        "bias": config.attention_bias,
        "dropout": theirs.attention_dropout,
    }
    names = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "dt_proj", "A")}
    names |= {"norm.q_weight": "q_norm.weight", "norm.k_weight": "k_norm.weight"}
    return Loaded(
        lambda: DynamicMaskAttention(config.hidden_size, config.num_attention_heads, **options), same(theirs, names)
    )

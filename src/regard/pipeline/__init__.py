"""The pipeline: exact attention whose stages are slots, as a function, as a layer, and token by token."""

from regard.pipeline.function import attention, plan
from regard.pipeline.head_mixer import HeadMixer, Projections
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.pipeline.shared_kv import KeyValues, SharedKV, step_with_kv, with_kv
from regard.pipeline.weighted import Weighted

__all__ = [
    "Attention",
    "HeadMixer",
    "KVCache",
    "KeyValues",
    "Projections",
    "SharedKV",
    "Weighted",
    "attention",
    "plan",
    "step_with_kv",
    "with_kv",
]

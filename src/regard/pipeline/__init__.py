"""The pipeline: exact attention whose stages are slots, as a function, as a layer, and token by token."""

from regard.pipeline.function import attention, plan
from regard.pipeline.head_mixer import HeadMixer, Projections
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.pipeline.weighted import Weighted

__all__ = ["Attention", "HeadMixer", "KVCache", "Projections", "Weighted", "attention", "plan"]

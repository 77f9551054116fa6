"""What streaming keeps of the past."""

from regard.pipeline.kv_cache import KVCache
from regard.rooms import opened

__all__ = ["KVCache"]
__getattr__, __dir__ = opened(__name__)

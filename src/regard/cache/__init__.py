"""What streaming keeps of the past."""

from regard.cache.kv import KVCache

__all__ = ["KVCache"]

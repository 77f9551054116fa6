"""What streaming keeps of the past."""

from regard.cache.prefix_tree import PrefixTree
from regard.pipeline.kv_cache import KVCache

__all__ = ["KVCache", "PrefixTree"]

"""What streaming keeps of the past."""

from regard.cache.kv import KVCache
from regard.cache.prefix_tree import PrefixTree

__all__ = ["KVCache", "PrefixTree"]

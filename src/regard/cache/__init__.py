"""What streaming keeps of the past."""

from regard.pipeline.kv_cache import KVCache
from regard.pipeline.page_pool import PagePool
from regard.pipeline.paged_cache import PagedKVCache
from regard.rooms import opened

__all__ = ["KVCache", "PagePool", "PagedKVCache"]
__getattr__, __dir__ = opened(__name__)

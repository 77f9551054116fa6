"""A cache of transformers in pages of a pool: `model.generate(..., past_key_values=PagedCache(model.config, 1024))`.

Sequences of a batch share the pages of what they have in common: beams of one prompt, and repeated prompts
(`batch_repeat_interleave`). Each layer's keys and values are copied together for a call, as `DynamicCache` does.
"""

from collections import Counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from regard.checks import refuse, whole
from regard.kernels.size import sized
from regard.pipeline.page_pool import PagePool
from regard.pipeline.paged_cache import PagedKVCache


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values, in pages of a pool of `pools` that holds such, or of a new one."""

    def __init__(self, pools: list[PagePool], window: int | None) -> None:
        self.pools, self.window = pools, window
        self.state: PagedKVCache | None = None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.state is not None

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.window is None

    @property
    def keys(self) -> Float[Tensor, "B G S D"] | None:  # type: ignore[override]
        return None if self.state is None else self.state.read("k")

    @property
    def values(self) -> Float[Tensor, "B G S V"] | None:  # type: ignore[override]
        return None if self.state is None else self.state.read("v")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        like = {"k": key_states, "v": value_states}
        first = self.pools[0]
        pool = next((p for p in self.pools if not p.buffers or p.holds(like)), None)
        if pool is None:
            self.pools.append(pool := PagePool(first.num_pages, page_size=first.page_size))
        limit = pool.num_pages * pool.page_size
        self.state = PagedKVCache.empty(pool, len(key_states), limit, self.window, like)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        assert self.state is not None
        held, self.state = self.state.append(k=key_states, v=value_states)
        return held["k"], held["v"]

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0 if self.state is None else self.state.kept
        return kept + query_length, self.get_seq_length() - kept

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window + 1

    def reset(self) -> None:
        self.state = None

    def offload(self) -> None:
        raise NotImplementedError("PagedCache: pages stay on their device")

    def prefetch(self) -> None:
        """Pages are where they are."""

    def reorder_cache(self, beam_idx: Int[Tensor, " B2"]) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " B2"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.reorder(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        whole("crop", -self.get_seq_length(), most=0, tokens_to_remove=tokens_to_remove)
        if self.state is not None:
            self.state = self.state.crop(self.state.length + tokens_to_remove)


class PagedCache(Cache):
    """For `past_key_values=` of a model and of its `generate`, with `regard.swap` or without.

    A forward pass for which there are too few pages raises ValueError before any layer has taken its tokens in: free
    some (drop sequences with `batch_select_indices`) and go on.

    Args:
        config: the model's; layers with a sliding window keep that, and give pages behind it back.
        num_pages: of the pool that all layers share. One token of every sequence and layer takes 1 / page_size of a
            page at most. Layers whose heads differ in number or width, or that lie on another device, have a pool of
            their own, of that size too.
        page_size: tokens in a page.

    Attributes:
        pools: the page pools; `sum(pool.nbytes for pool in cache.pools)` is `cache.nbytes`.

    Raises:
        ValueError: a layer keeps something else than keys and values.
    """

    def __init__(self, config: PreTrainedConfig, num_pages: int, *, page_size: int = 16) -> None:
        if not isinstance(config, PreTrainedConfig):
            wanted = "the model's config, as in PagedCache(model.config, 1024)"
            refuse(self, "config", "has the wrong type", type(config).__name__, wanted, error=TypeError)
        self.pools = [PagePool(num_pages, page_size=page_size)]
        theirs = DynamicCache(config=config).layers
        super().__init__(layers=[self._layer(n, layer) for n, layer in enumerate(theirs)])

    def _layer(self, n: int, theirs: Any) -> Any:
        if isinstance(theirs, DummyLayer):  # it reads another layer's
            return theirs
        if type(theirs) is DynamicLayer:
            return PagedLayer(self.pools, None)
        if type(theirs) is DynamicSlidingWindowLayer and theirs.sliding_window > 1:
            return PagedLayer(self.pools, theirs.sliding_window - 1)
        refuse(self, "config", f"has a layer {n} that keeps more than keys", type(theirs).__name__, "attention layers")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The layer's keys and values, the new ones behind the others."""
        paged = [layer for layer in self.layers if isinstance(layer, PagedLayer)]
        if self.layers[layer_idx] is paged[0]:
            self._need(paged, *key_states.shape[::2][:2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _need(self, paged: list[PagedLayer], B: int, t: int) -> None:
        """ValueError if the pools have too few pages for t tokens in all layers."""
        size, needed = self.pools[0].page_size, Counter[PagePool]()
        for layer in paged:
            if layer.state is not None:
                needed[layer.state.pool] += layer.state.needed(t)
            else:
                kept = t if layer.window is None else min(t, layer.window + size)
                needed[self.pools[0]] += B * -(-kept // size)
        for pool, pages in needed.items():
            pool.need(pages)

    @property
    def used_pages(self) -> int:
        return sum(pool.used_pages for pool in self.pools)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, each counted once however many sequences share it."""
        return sum(pool.nbytes for pool in self.pools)

    def __repr__(self) -> str:
        pages = sum(pool.num_pages for pool in self.pools)
        used = f"{self.used_pages} of {pages} pages of {self.pools[0].page_size} tokens in use"
        return f"PagedCache({len(self.layers)} layers, {self.get_seq_length()} tokens; {used}, {sized(self.nbytes)})"

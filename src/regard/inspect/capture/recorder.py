"""What of the watched layers is kept, and where."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regard.checks import refuse
from regard.inspect.layers import LayerTrace, chosen, part_of
from regard.inspect.store import Writer


class Recorder:
    """Keeps copies of the layers asked for, in memory or in a folder, in the order in which they ran."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        dtype: torch.dtype | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.names: Mapping[nn.Module, str] = {m: name or type(m).__name__ for name, m in model.named_modules()}
        self.model = type(model).__name__
        self.layers = None if layers is None else set(layers)
        self.heads = None if heads is None else list(heads)
        self.dtype, self.writer = dtype, writer
        self.found: list[LayerTrace] = []
        self.seen: list[int] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        self._shared: dict[int, tuple[Tensor, Tensor]] = {}

    def place(
        self, name: str, kind: Literal["self", "cross"], side: str = "", index: int | None = None
    ) -> dict[str, Any]:
        """The fields of a LayerTrace that say where it stands; to be called once for each call of the layer."""
        count = self._calls[side, kind]
        self._calls[side, kind] += 1
        index = count if index is None else index
        self.seen.append(index)
        return {"name": name, "index": index, "kind": kind, "side": side}

    def wants(self, index: int) -> bool:
        return self.layers is None or index in self.layers

    def keep(self, layer: LayerTrace) -> None:
        """Keep copies: what the model does to its own tensors later changes nothing here."""
        with torch.no_grad():
            layer = self._copied(layer if self.heads is None else _trimmed(layer, self.heads))
            self.found.append(layer if self.writer is None else self.writer.write(layer))

    def result(self) -> tuple[LayerTrace, ...]:
        """All that was kept; ValueError where something asked for never ran."""
        if not self.seen:
            wanted = (
                "a model of transformers that asks its AttentionInterface, regard's layers or "
                "torch.nn.MultiheadAttention, not inside torch.compile, nor inside torch's fused encoder layer: "
                "torch.backends.mha.set_fastpath_enabled(False)"
            )
            refuse("trace", "model", "ran no attention layer that is watched", self.model, wanted)
        if self.layers is not None and (missing := self.layers - set(self.seen)):
            refuse("trace", "layers", "has some that did not run", sorted(missing), f"some of {sorted(set(self.seen))}")
        return tuple(self.found)

    def _copied(self, layer: LayerTrace) -> LayerTrace:
        def copy(t: Tensor) -> Tensor:
            return t.detach().to(self.dtype or t.dtype, copy=True, memory_format=torch.contiguous_format)

        return replace(
            layer,
            q=copy(layer.q),
            k=copy(layer.k),
            v=copy(layer.v),
            mask=None if layer.mask is None else self._once(layer.mask, None),
            bias=None if layer.bias is None else self._once(layer.bias, self.dtype),
            sinks=None if layer.sinks is None else layer.sinks.detach().clone(),
        )

    def _once(self, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        """One copy of a tensor that many layers share."""
        if id(t) not in self._shared:  # the tensor is kept as well, so that no other can get its id
            self._shared[id(t)] = t, t.detach().to(dtype or t.dtype, copy=True)
        return self._shared[id(t)][1]


def _trimmed(layer: LayerTrace, heads: list[int]) -> LayerTrace:
    """Only these heads, each with a key head and a value head of its own."""
    if layer.logit_rule is not None or layer.weight_rule is not None:
        wrong = "cannot be kept alone, as the layer is more than a softmax of its own heads"
        refuse("trace", "heads", wrong, layer.name, "heads=None")
    H, G = layer.q.shape[1], layer.k.shape[1]
    h = chosen("trace", "heads", heads, H, layer.q.device)
    every = torch.arange(layer.q.shape[2], device=layer.q.device)
    group = h // (H // G)
    return replace(
        layer,
        q=layer.q.index_select(1, h),
        k=layer.k.index_select(1, group),
        v=layer.v.index_select(1, group),
        mask=None if layer.mask is None else part_of(layer.mask, h, every),
        bias=None if layer.bias is None else part_of(layer.bias, h, every),
        sinks=None if layer.sinks is None else layer.sinks[h],
        heads=tuple(h.tolist()),
    )

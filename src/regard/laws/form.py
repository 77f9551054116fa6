"""A mechanism as a function of queries, keys and values."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard import masks
from regard.masks import Mask
from regard.pipeline.function import attention
from regard.shapes import HeadShape
from regard.slots import IN_KERNELS

if TYPE_CHECKING:
    from regard.laws.subject import Subject


@dataclass
class Form:
    """`regard.attention` with a card's parts in its slots, or somebody's own function."""

    parts: dict[str, Any]
    shape: HeadShape
    subject: "Subject" = field(repr=False)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
        kernel: str | None = None,
    ) -> Tensor:
        if self.subject.function is not None:
            given = {"mask": mask, "bias": bias, "scale": scale, "kernel": kernel}
            asked = {key: value for key, value in given.items() if value is not None}
            return self.subject.function(q, k, v, causal=causal, **asked)
        return attention(q, k, v, **self.arguments(causal, mask, bias, scale, kernel))

    def arguments(
        self,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
        kernel: str | None = None,
    ) -> dict[str, Any]:
        """The options of `regard.attention` and `regard.plan`."""
        whole = masks.dense(mask) if isinstance(mask, Tensor) else mask
        for own in (self.parts.get("mask"), masks.causal() if causal else None):
            if own is not None:
                whole = own if whole is None else own & whole
        slots = {n: self.parts[n] for n in IN_KERNELS if n in self.parts}
        kernel = kernel or self.parts.get("kernel", "auto")
        return {**slots, "mask": whole, "bias": bias, "scale": scale, "kernel": kernel}

    @property
    def rotates(self) -> bool:
        return "position" in self.parts and self.parts["position"].changes("rotate")

    @property
    def reads_only_scores(self) -> bool:
        """Whether queries and keys count by their products alone."""
        position = self.parts.get("position")
        others = self.parts.keys() & {"score", "score_mix", "memory", "weight_mix"}
        return not others and (position is None or not (position.changes("bias") or position.changes("values")))

    def qkv(
        self,
        batch: int | None = None,
        length: int | None = None,
        keys: int | None = None,
        *,
        value_width: int | None = None,
        seed: int = 3,
    ) -> list[Tensor]:
        """Random queries, keys and values that want gradients."""
        generator = torch.Generator().manual_seed(seed)
        batch = self.subject.batch if batch is None else batch
        length = self.subject.length if length is None else length
        keys, s = length if keys is None else keys, self.shape
        self.subject.drawn.append((batch, max(length, keys)))
        sizes = (
            (batch, s.num_heads, length, s.head_dim),
            (batch, s.num_kv_heads, keys, s.head_dim),
            (batch, s.num_kv_heads, keys, value_width or s.head_dim),
        )
        return [torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes]

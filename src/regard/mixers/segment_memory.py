"""Segment-level recurrence: a layer also sees the last inputs of earlier segments, without gradient.

Dai, Yang, Yang, Carbonell, Le, Salakhutdinov 2019, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length
Context", https://arxiv.org/abs/1901.02860, section 3.2. Stacked, each layer reaches one memory further back.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import refuse, tokens, whole
from regard.masks import padding


class SegmentState(NamedTuple):
    """The last inputs of a layer."""

    x: Float[Tensor, "B n M"]
    held: Bool[Tensor, "B n"]
    """False for hidden tokens."""


class SegmentMemory(nn.Module):
    """A layer that takes a context, over [memory ; x]; the last `memory` rows of that are the next memory.

    Positions must be relative (`transformer_xl`, `rotary`, `alibi` and others): the last token of x stands where the
    last one of the context does. Absolute ones would count x and context from 0 each.

    Args:
        mixer: the layer, such as `regard.create("transformer_xl", ..., causal=True)`.
        memory: how many inputs are kept. 0 = every segment by itself.

    Shapes: x (B, T, M) -> (B, T, M).

    Raises:
        ValueError: a layer that takes no context, or one of another width than its tokens.
    """

    def __init__(self, mixer: nn.Module, *, memory: int) -> None:
        super().__init__()
        whole("SegmentMemory", 0, memory=memory)
        if not isinstance(mixer, nn.Module):
            refuse("SegmentMemory", "mixer", "has the wrong type", type(mixer).__name__, "a module", error=TypeError)
        supports: frozenset[str] = getattr(mixer, "supports", frozenset())
        if "cross" not in supports or "padding" not in supports:
            refuse("SegmentMemory", "mixer", "takes no context with a mask", type(mixer).__name__, "a layer that does")
        self.mixer, self.memory, self.dim = mixer, memory, int(mixer.dim)  # type: ignore[arg-type]
        if getattr(mixer, "context_dim", self.dim) != self.dim:
            got = mixer.context_dim
            refuse("SegmentMemory", "mixer", "has a context of another width than its tokens", got, str(self.dim))

    def forward(self, x: Float[Tensor, "B T M"], **given: Any) -> Float[Tensor, "B T M"]:
        """A first segment: what the layer gives for x alone, with its own arguments."""
        return self.mixer(x, **given)

    def init_state(
        self,
        batch_size: int,
        capacity: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SegmentState:
        """An empty memory.

        Args:
            capacity: taken for other layers' sake; any number of tokens may come.
            device, dtype: default those of the layer's parameters.
        """
        whole("init_state", 0, batch_size=batch_size)
        weight = next(self.mixer.parameters())
        x = torch.zeros(batch_size, 0, self.dim, device=device or weight.device, dtype=dtype or weight.dtype)
        return SegmentState(x, x[..., 0].bool())

    def step(
        self, x: Float[Tensor, "B T M"], state: SegmentState, *, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T M"], SegmentState]:
        """The next segment, and the memory behind it.

        Args:
            mask: True = a real token, of this segment.
        """
        tokens(self, "x", x, self.dim)
        if not isinstance(state, SegmentState):
            wanted = "the SegmentState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if len(state.x) != len(x):
            refuse(self, "state", "has another batch than x", len(state.x), f"{len(x)} sequences")
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        if keep.dtype != torch.bool or keep.shape != x.shape[:2]:
            got = f"{keep.dtype} {tuple(keep.shape)}"
            refuse(self, "mask", "can only hide tokens of this segment", got, f"bool {tuple(x.shape[:2])}")
        context = torch.cat([state.x.detach().to(x.dtype), x], 1)
        held = torch.cat([state.held, keep], 1)
        out = self.mixer(x, context, mask=padding(held))
        first = max(0, context.shape[1] - self.memory)
        return out, SegmentState(context[:, first:].detach(), held[:, first:])

    def extra_repr(self) -> str:
        return f"memory={self.memory}"

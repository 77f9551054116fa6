"""One attention layer of one forward pass, as a value: logits, weights and outputs of the heads and rows asked for.

    weights = exp(logits - lse)    logits = cap(scale q k^T) + bias    lse_i = log(sum_j exp(logits_ij) + exp(sink))

Nothing here is as large as heads x queries x keys until it is asked for.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import refuse
from regard.kernels.problem import combine, dots

Chosen = int | slice | Sequence[int] | Tensor | None
"""Which heads or rows: a number, a slice, a list of numbers; None for all. The axis stays even for one."""

Rule = Callable[["LayerTrace", Tensor, Tensor], Tensor]
"""The layer, its heads and its rows (as numbers) -> logits or weights (B, h, t, S)."""

ELEMENTS = 1 << 24
"""How many logits are held at once while a whole layer is summed up."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one attention layer did. Tensors are detached copies; B, H, T, S as everywhere in regard."""

    name: str
    """The module's path, e.g. "encoder.layer.0.attention.self"."""
    index: int
    """The layer's number as the model counts, or the order of calls of its side and kind."""
    kind: Literal["self", "cross"]
    side: str
    """Which stack of a model of several it belongs to: "encoder" or "decoder", "text" or "vision"; else ""."""
    q: Float[Tensor, "B H T D"]
    """Queries as the kernel got them: after rotation."""
    k: Float[Tensor, "B G S D"]
    """Keys, likewise. Query head h reads key head h // (H / G)."""
    v: Float[Tensor, "B G S V"]
    scale: float
    mask: Bool[Tensor, "#B #H T S"] | None = None
    """True = may attend; causality and padding are in it."""
    bias: Float[Tensor, "#B #H #T #S"] | None = None
    """Added to the scaled scores."""
    softcap: float | None = None
    """c of c tanh(score / c)."""
    sinks: Float[Tensor, " H"] | None = None
    """Logits of a key that holds nothing, one a head, which takes its share of every row."""
    heads: tuple[int, ...] = ()
    """The numbers that the stored heads have in the model, where not all are stored; else empty."""
    logit_rule: Rule | None = field(default=None, repr=False)
    """Where logits are more than the fields above say."""
    weight_rule: Rule | None = field(default=None, repr=False)
    """Where weights are no softmax of logits."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, T, S."""
        B, H, T = self.q.shape[:3]
        return B, H, T, self.k.shape[2]

    @property
    def has_logits(self) -> bool:
        """False for mechanisms whose weights were measured, as nothing was scored."""
        return self.weight_rule is None or self.logit_rule is not None

    def logits(self, *, heads: Chosen = None, rows: Chosen = None) -> Float[Tensor, "B h t S"]:
        """Scaled, capped and biased scores, at least fp32, -inf where masked.

        `heads` and `rows` count along the stored axes. ValueError where the mechanism has no logits.
        """
        if not self.has_logits:
            refuse("LayerTrace", "logits", "are not there, as its weights were measured", self.name, "weights()")
        with self._exactly():
            return self._logits(*self._chosen(heads, rows))

    def weights(self, *, heads: Chosen = None, rows: Chosen = None) -> Float[Tensor, "B h t S"]:
        """Attention weights, at least fp32, without dropout; a row that sees nothing is 0."""
        at = self._chosen(heads, rows)
        with self._exactly():
            if self.weight_rule is not None:
                return self.weight_rule(self, *at)
            lse = self.lse.index_select(1, at[0]).index_select(2, at[1])[..., None]
            # Any finite number does for a row that sees nothing, whose logits are all -inf.
            return self._logits(*at).sub_(lse.masked_fill(lse == -math.inf, 0.0)).exp_()

    def outputs(self, *, heads: Chosen = None) -> Float[Tensor, "B h T V"]:
        """Each head's weights times values, at least fp32: what goes into the output projection."""
        h, rows = self._chosen(heads, None)
        v = self._of_heads(self.v, h)
        with self._exactly():
            parts = [combine(self.weights(heads=h, rows=part), v) for part in self._parts(len(h), rows)]
        return torch.cat(parts, 2)

    @cached_property
    def lse(self) -> Float[Tensor, "B H T"]:
        """Log-sum-exp of each row of logits, the sink included; -inf where a row sees nothing."""
        h, rows = self._chosen(None, None)
        sums = torch.cat([self.logits(rows=part).logsumexp(-1) for part in self._parts(len(h), rows)], 2)
        return sums if self.sinks is None else torch.logaddexp(sums, self.sinks.to(sums)[:, None])

    def _exactly(self) -> torch.autocast:
        """No narrower than what is kept, whatever the caller's mode."""
        return torch.autocast(self.q.device.type, enabled=False)

    def _logits(self, heads: Tensor, rows: Tensor) -> Tensor:
        if self.logit_rule is not None:
            return self.logit_rule(self, heads, rows)
        q = _select(_select(self.q, 1, heads), 2, rows)
        scores = dots(q, self._of_heads(self.k, heads)).mul_(self.scale)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias is not None:
            scores = scores.add_(part_of(self.bias, heads, rows))
        if self.mask is not None:
            scores = scores.masked_fill_(~part_of(self.mask, heads, rows), -math.inf)
        return scores

    def _of_heads(self, z: Float[Tensor, "B G S D"], heads: Tensor) -> Float[Tensor, "B g S D"]:
        """The key heads (or value heads) of these query heads."""
        H = self.q.shape[1]
        return z if len(heads) == H and _in_order(heads) else z.index_select(1, heads // (H // z.shape[1]))

    def _chosen(self, heads: Chosen, rows: Chosen) -> tuple[Tensor, Tensor]:
        _, H, T, _ = self.shape
        h = chosen("LayerTrace", "heads", heads, H, self.q.device)
        if not len(h):
            refuse("LayerTrace", "heads", "is empty", repr(heads), "one head at least")
        return h, chosen("LayerTrace", "rows", rows, T, self.q.device)

    def _parts(self, heads: int, rows: Tensor) -> Iterator[Tensor]:
        """The rows in parts of which the logits take bounded memory; at least one."""
        B, _, T, S = self.shape
        return iter(rows.split(max(1, ELEMENTS // max(1, B * heads * S))) if T else (rows,))


def chosen(who: str, name: str, which: Chosen, size: int, device: torch.device | str = "cpu") -> Tensor:
    """`which` as numbers in 0..size - 1; negative ones count from the end."""
    if which is None:
        return torch.arange(size, device=device)
    if isinstance(which, slice):
        return torch.arange(size, device=device)[which]
    numbers = torch.as_tensor([which] if isinstance(which, int) else which, device=device).flatten()
    if numbers.numel() == 0:
        return numbers.long()
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        refuse(who, name, "has the wrong type", repr(which), "whole numbers, a slice or None", error=TypeError)
    if int(numbers.min()) < -size or int(numbers.max()) >= size:
        refuse(who, name, "is out of range", repr(which), f"numbers from {-size} to {size - 1}")
    return numbers.long() % size


def part_of(t: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
    """Heads and rows of a tensor (#B, #H, #T, #S)."""
    t = t if t.shape[1] == 1 else _select(t, 1, heads)
    return t if t.shape[2] == 1 else _select(t, 2, rows)


def _select(t: Tensor, dim: int, which: Tensor) -> Tensor:
    """`which` along `dim`, without a copy where that is all in order."""
    return t if len(which) == t.shape[dim] and _in_order(which) else t.index_select(dim, which)


def _in_order(which: Tensor) -> bool:
    return bool((which == torch.arange(len(which), device=which.device)).all())


class Measured:
    """A rule for weights that are measured when they are asked for, by a function of the layer's q, k and v."""

    def __init__(self, measure: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        self.measure, self.dtype = measure, dtype
        self._known: Tensor | None = None

    def __call__(self, layer: LayerTrace, heads: Tensor, rows: Tensor) -> Tensor:
        weights = self._known
        if weights is None:
            with torch.no_grad():
                weights = self.measure(*(z.to(self.dtype) for z in (layer.q, layer.k, layer.v)))
            weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
            if weights.numel() <= ELEMENTS:
                self._known = weights
        return part_of(weights, heads, rows).clone()

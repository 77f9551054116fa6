"""Cascade pruning: what is alive of tokens and heads, by all the attention that they have got so far.

The paper is that of `regard.mixers.spatten`, whose layers use it.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import checked, number, refuse, whole
from regard.normalizers.softmax import softmax
from regard.normalizers.value_pruning import SLACK


def largest(score: Float[Tensor, "B n"], alive: Bool[Tensor, "B n"], ratio: float) -> Bool[Tensor, "B n"]:
    """The floor(n (1 - ratio)) of the n alive ones with the largest scores, at least one; the earlier of equals."""
    number("largest", least=0, most=1, ratio=ratio)
    rank = score.detach().masked_fill(~alive, -math.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    count = (alive.sum(-1, keepdim=True).double() * (1 - ratio) + SLACK).floor().clamp(min=1)
    return alive & (rank < count)


class Cascade(NamedTuple):
    """What is alive, and what each token and head has gathered so far. A value: every step gives a new one."""

    token_scores: Float[Tensor, "B S"]
    head_scores: Float[Tensor, "B H"]
    tokens: Bool[Tensor, "B S"]
    heads: Bool[Tensor, "B H"]

    @classmethod
    def start(cls, tokens: Bool[Tensor, "B S"], num_heads: int, *, dtype: torch.dtype = torch.float32) -> "Cascade":
        """All heads and these tokens alive; scores, in at least fp32, are 0."""
        heads, dtype = tokens.new_ones(len(tokens), num_heads), torch.promote_types(dtype, torch.float32)
        return cls(torch.zeros_like(tokens, dtype=dtype), torch.zeros_like(heads, dtype=dtype), tokens, heads)

    def add_token_scores(self, weights: Float[Tensor, "B H t S"]) -> "Cascade":
        """Of attention weights that are 0 for what is pruned; any part of the queries at a time."""
        return self._replace(token_scores=self.token_scores + weights.detach().sum((1, 2)))

    def add_head_scores(self, out: Float[Tensor, "B H t D"]) -> "Cascade":
        """Of the heads' outputs before the output projection."""
        return self._replace(head_scores=self.head_scores + out.detach().abs().sum((2, 3)))

    def keep_tokens(self, ratio: float) -> "Cascade":
        """Prune this share of the alive tokens, those of the smallest scores."""
        return self._replace(tokens=largest(self.token_scores, self.tokens, ratio))

    def keep_heads(self, ratio: float) -> "Cascade":
        """The same of heads."""
        return self._replace(heads=largest(self.head_scores, self.heads, ratio))


def schedule(layers: int, target: float, *, unpruned: int | None = None) -> list[float]:
    """The share that is alive in each layer: 1 in the first, then linearly to `target` in the last."""
    whole("schedule", layers=layers)
    number("schedule", above=0, most=1, target=target)
    first = max(3, math.ceil(0.15 * layers)) if unpruned is None else unpruned
    whole("schedule", unpruned=first)
    first = min(layers, first)
    return [1 - (1 - target) * max(0, n + 1 - first) / max(1, layers - first) for n in range(layers)]


@checked()
def progressive(
    q: Float[Tensor, "... T D"], k: Float[Tensor, "... S D"], *, bits: tuple[int, int] = (8, 4), threshold: float = 0.1
) -> tuple[Float[Tensor, "... T S"], Bool[Tensor, "... T"]]:
    """Softmax weights by the high bits of q and k, and by all bits in rows without any weight of `threshold`.

    Returns the weights, and which rows asked for the low bits. No gradient reaches q or k through a rounding.

    Args:
        bits: how many high and low bits integers have, sign included; one scale for each whole tensor.
    """
    whole("progressive", high=bits[0], low=bits[1])
    number("progressive", least=0, threshold=threshold)
    low, most = 2 ** bits[1], 2 ** (sum(bits) - 1) - 1
    tiny = torch.finfo(q.dtype).tiny
    unit = [z.abs().amax().clamp(min=tiny) / most if z.numel() else z.new_ones(()) for z in (q, k)]
    whole_ = [torch.round(z / u) for z, u in zip((q, k), unit, strict=True)]
    fine = [z * u for z, u in zip(whole_, unit, strict=True)]
    coarse = [torch.floor(z / low) * low * u for z, u in zip(whole_, unit, strict=True)]
    first, second = (softmax(a @ b.mT / math.sqrt(q.shape[-1])) for a, b in (coarse, fine))
    again = first.amax(-1) < threshold if k.shape[-2] else first.new_zeros(first.shape[:-1], dtype=torch.bool)
    return torch.where(again[..., None], second, first), again


@checked()
def cache_keep(
    scores: Float[Tensor, "B H t S"], *, start: int = 4, recent: int = 128, important: int, coming: int
) -> Bool[Tensor, "B H S"]:
    """The published rule for a cache: which keys each head keeps before `coming` tokens are added.

    The first `start`, the last `recent - coming`, and of those between the `important` with the largest sums of raw
    scores over the last pass's queries. The authors' code sums over the batch, too.
    """
    whole("cache_keep", 0, start=start, recent=recent, important=important, coming=coming)
    S = scores.shape[-1]
    if coming > recent or start + recent - coming > S:
        refuse("cache_keep", "recent", "does not fit", f"{recent}, start {start}, coming {coming}, S = {S}",
               "coming <= recent, and start + recent - coming <= S")  # fmt: skip
    places = torch.arange(S, device=scores.device)
    between = (places >= start) & (places < S - recent + coming)
    rank = scores.detach().sum(2).masked_fill(~between, -math.inf).argsort(dim=-1, descending=True, stable=True)
    return ~between | (rank.argsort(dim=-1) < min(important, max(0, S - recent + coming - start)))

"""A feed-forward net that stands for cross-attention: source and target tokens in one row."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost
from regard.checks import fits, refuse
from regard.masks import Mask, padding
from regard.mixers._flat import PAPER, SIZES, FlatLayer, Size, flat
from regard.pipeline.tokens import key_padding, quarantine, spoil

CARD = Card(
    "flat_cross_feed_forward",
    equation="""f = [c_1; ...; c_S; 0; ...; x_1; ...; x_T; 0; ...]    2 W numbers, W = max_length M, hidden tokens 0
[y_1; ...] = W2 LN(leaky(W1 LN(f) + b1)) + b2         LN over the whole row; leaky: 0.01 below 0""",
    papers=(PAPER,),
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("3*B*max_length*M*hidden", ""),
    claim="Every target token is made of the whole source and of all target tokens, later ones too, and knows them by "
    "their places: tests/mixers/test_flat_feed_forward.py::test_a_cross_net_reads_places_and_later_targets.",
    differs=("A net for each head is ours here; the authors' code has those in the encoder alone.",),
    verified="third-party",
    example={"max_length": 24, "hidden": 20},
    tries={"max_length": 28, "hidden": 12, "per_head": True},
    defaults={**SIZES, "per_head": "code, as in ALR", "project": "ours, for a net that stands for a whole layer"},
)


@CARD.module
class FlatCrossFeedForward(FlatLayer):
    """One net for a whole pair of sentences, of at most `max_length` tokens each.

    Args:
        dim, num_heads: M and H; heads only count with per_head.
        max_length: tokens of either row.
        hidden, per_head, project: as in `FlatFeedForward`; sizes are shares of 2 W.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M), T and S <= max_length.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        max_length: int = 50,
        hidden: Size | int | None = None,
        per_head: bool = False,
        project: bool = False,
    ) -> None:
        how: dict[str, Any] = {"hidden": hidden, "per_head": per_head, "project": project}
        super().__init__(dim, num_heads, max_length=max_length, rows=2, outputs=max_length, **how)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"],
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
        query_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix both. `mask` hides tokens of the context, `query_mask` those of x, which give 0 (before a projection)."""
        self._fits("x", x)
        self._fits("context", context)
        if len(context) != len(x):
            refuse(self, "context", "has another batch than x", len(context), f"{len(x)} sequences")
        keep = key_padding(self, mask, context)
        if query_mask is not None:
            fits(self, "B T", {"B": len(x), "T": x.shape[1]}, query_mask=query_mask)
            if query_mask.dtype != torch.bool:
                refuse(self, "query_mask", "has the wrong dtype", query_mask.dtype, "torch.bool", error=TypeError)
        (x, bad), (context, bad_source) = quarantine(x), quarantine(context)
        bad = bad if bad is None or query_mask is None else bad & query_mask
        row = torch.cat([flat(context, keep, self.max_length), flat(x, query_mask, self.max_length)], 1)
        y = self._out(self._rows(row, x.shape[1]), query_mask)
        y = spoil(y, None, bad_source, None if keep is None else padding(keep))
        return spoil(y, bad, bad, None)  # target tokens see each other

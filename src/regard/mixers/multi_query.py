"""Stacks of window-query attention with long and short windows, mixed, and the recommender of the next item.

The paper, and what was read of it, stand on the card of `regard.mixers.window_query`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import checked, number, refuse, whole
from regard.masks import Mask
from regard.mixers.window_query import EPS, WindowQueryAttention
from regard.pipeline.tokens import key_padding


class WindowBlock(nn.Module):
    """Window-query attention, a norm, and a network as wide as the tokens beside it; hidden tokens give 0."""

    def __init__(self, dim: int, num_heads: int = 1, *, window: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = WindowQueryAttention(dim, num_heads, window=window, dropout=dropout)
        self.norm, self.first, self.second = nn.LayerNorm(dim, eps=EPS), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B T M"]:
        h = self.norm(self.attend(x, mask=keep))
        h = h + self.dropout(self.second(self.dropout(self.first(h).relu())))
        return h if keep is None else h.masked_fill(~keep[..., None], 0)


class WindowStack(nn.Module):
    """Blocks with the same window, and a norm."""

    def __init__(self, dim: int, num_heads: int, num_blocks: int, *, window: int, dropout: float = 0.0) -> None:
        super().__init__()
        whole(self, num_blocks=num_blocks)
        made = (WindowBlock(dim, num_heads, window=window, dropout=dropout) for _ in range(num_blocks))
        self.blocks, self.norm = nn.ModuleList(made), nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B T M"]:
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


class MultiQueryEncoder(nn.Module):
    """A stack of short windows and one of long ones, each with its own parameters: (B, T, M) -> (B, T, M).

    Args:
        windows: of the first stack and of the second.
        mix: how much the first counts, from 0 to 1.
        num_blocks: of each stack.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        windows: Sequence[int] = (1, 3),
        mix: float = 0.5,
        num_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(windows) != 2:
            refuse(self, "windows", "has the wrong length", windows, "a short and a long one")
        number(self, least=0, most=1, mix=mix)
        self.mix, self.dim = mix, dim
        self.short, self.long = (WindowStack(dim, num_heads, num_blocks, window=w, dropout=dropout) for w in windows)

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens; the norm's bias stands in their places."""
        keep = key_padding(self, mask, x)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        return self.mix * self.short(x, keep) + (1 - self.mix) * self.long(x, keep)


class NextItem(nn.Module):
    """Items seen so far, padded at the front by the number `num_items`, to scores of the next.

    (B, T) -> (B, T, num_items + 1); the last class is the padding's, whose embedding is 0.

    Args:
        max_length: most items; the last one always stands at the last position.
        encoder: what `MultiQueryEncoder` takes.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        num_heads: int = 1,
        *,
        max_length: int,
        windows: Sequence[int] = (1, 3),
        mix: float = 0.5,
        num_blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, num_items=num_items, max_length=max_length)
        self.num_items, self.dim = num_items, dim
        self.items, self.positions = (nn.Parameter(torch.empty(n, dim)) for n in (num_items, max_length))
        self.encoder = MultiQueryEncoder(
            dim, num_heads, windows=windows, mix=mix, num_blocks=num_blocks, dropout=dropout
        )
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.items, std=0.01)
        nn.init.normal_(self.positions, std=0.01)

    def embed(self, items: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T M"], Bool[Tensor, "B T"]]:
        """What the encoder reads, and which items are real."""
        if items.shape[1] > len(self.positions):
            refuse(self, "items", "are too many", items.shape[1], f"at most {len(self.positions)}")
        keep = items != self.num_items
        x = F.pad(self.items, (0, 0, 0, 1))[items] * self.dim**0.5
        x = x + self.positions[len(self.positions) - items.shape[1] :]
        return self.dropout(x).masked_fill(~keep[..., None], 0), keep

    @checked()
    def forward(self, items: Int[Tensor, "B T"]) -> Float[Tensor, "B T N"]:
        x, keep = self.embed(items)
        return self.encoder(x, mask=keep) @ F.pad(self.items, (0, 0, 0, 1)).mT

    def loss(self, items: Int[Tensor, "B T"], target: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Cross-entropy of the next items, a mean over those that are real."""
        return F.cross_entropy(self(items).flatten(0, 1), target.flatten().long(), ignore_index=self.num_items)

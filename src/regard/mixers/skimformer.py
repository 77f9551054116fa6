"""Skimformer: an encoder of text whose layers all use the weights that were made once, of the layout.

The paper, and what was read of it, stand on the card of `regard.mixers.skim`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import checked, number, whole
from regard.masks import padding
from regard.mixers.skim import EPS, Kind, Layout, skim_weights, start
from regard.pipeline.layer import Attention
from regard.pipeline.weighted import Weighted
from regard.shapes import head_shape


class PostNorm(nn.Module):
    """A layer as BERT's around any mixer: LN(mixed + z), then LN(MLP + z), with dropout before each sum."""

    def __init__(self, dim: int, mixer: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mixer, self.dropout = mixer, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def attended(self, z: Float[Tensor, "B T M"], mix: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T M"]:
        """The first half."""
        return self.norm1(F.dropout(mix(z), self.dropout, self.training) + z)

    def forward(self, z: Float[Tensor, "B T M"], mix: Callable[[Tensor], Tensor]) -> Float[Tensor, "B T M"]:
        z = self.attended(z, mix)
        return self.norm2(F.dropout(self.mlp(z), self.dropout, self.training) + z)


class SkimWeights(nn.Module):
    """Boxes to the weights of a whole model: (B, T, 4) -> (B, H, T, T).

    Args:
        num_heads, head_dim: H and D.
        dim: L, of the layout.
        layout, max_position: as of `regard.mixers.SkimAttention`.
        contextual: how many layers of a BERT encoder the layout goes through first; the paper's have 2, or none.
        context_heads: of each of those.
        dropout: of the layout, within those layers, and of the weights: once for all layers that use them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        layout: Kind = "boxes",
        max_position: int = 1024,
        contextual: int = 0,
        context_heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, head_dim=head_dim)
        whole(self, 0, contextual=contextual)
        number(self, least=0, most=1, dropout=dropout)
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout
        self.layout = Layout(dim, layout, max_position)
        self.context = nn.ModuleList(
            PostNorm(dim, Attention(dim, context_heads, bias=True, dropout=dropout), 4 * dim, dropout)
            for _ in range(contextual)
        )
        self.q_proj, self.k_proj = nn.Linear(dim, num_heads * head_dim), nn.Linear(dim, num_heads * head_dim)
        start(self)

    def forward(
        self, boxes: Int[Tensor, "B T 4"] | Int[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B H T T"]:
        """A; hidden words have weight 0, and change no other's layout either. A "sequence" takes places (B, T)."""
        z = F.dropout(self.layout(boxes), self.dropout, self.training)
        mask = None if keep is None else padding(keep)
        for layer in self.context:
            z = layer(z, lambda x, mixer=layer.mixer: mixer(x, mask=mask))
        q, k = (p(z).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return F.dropout(skim_weights(q, k, keep), self.dropout, self.training).to(z.dtype)


class Skimformer(nn.Module):
    """The paper's encoder; defaults are those of its code. Text has no positions: all that is known of them is in A.

    Args:
        num_words, num_types: of the vocabulary, and kinds of segments.
        dim, num_heads, depth: M, H and how many layers.
        hidden: of their MLPs; default 4 M.
        layout_dim: L; default M.
        head_dim: D of the layout's queries and keys; default M / H, which values have in any case.
        layout, max_position, contextual, context_heads: as of `SkimWeights`.
        dropout: everywhere.
    """

    def __init__(
        self,
        num_words: int,
        *,
        num_types: int = 2,
        dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        hidden: int | None = None,
        layout_dim: int | None = None,
        head_dim: int | None = None,
        layout: Kind = "boxes",
        max_position: int = 1024,
        contextual: int = 0,
        context_heads: int = 12,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        whole(self, num_words=num_words, num_types=num_types, dim=dim, depth=depth)
        width = head_shape(dim, num_heads, None, None, who="Skimformer").head_dim
        self.dropout = dropout
        self.words, self.types = nn.Embedding(num_words, dim), nn.Embedding(num_types, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.skim = SkimWeights(
            dim if layout_dim is None else layout_dim,
            num_heads,
            width if head_dim is None else head_dim,
            layout=layout,
            max_position=max_position,
            contextual=contextual,
            context_heads=context_heads,
            dropout=dropout,
        )
        hidden = 4 * dim if hidden is None else hidden
        layers = (PostNorm(dim, Weighted(dim, num_heads, bias=True), hidden, dropout) for _ in range(depth))
        self.layers = nn.ModuleList(layers)
        start(self)

    @checked()
    def forward(
        self,
        words: Int[Tensor, "B T"],
        boxes: Int[Tensor, "B T 4"] | Int[Tensor, "B T"],
        keep: Bool[Tensor, "B T"] | None = None,
        types: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """States of the words; `keep` is True at real ones, `types` are 0 where they aren't given."""
        z = self.words(words) + self.types(torch.zeros_like(words) if types is None else types)
        z = F.dropout(self.norm(z), self.dropout, self.training)
        weights = self.skim(boxes, keep)
        for layer in self.layers:
            z = layer(z, lambda x, mixer=layer.mixer: mixer(x, weights))
        return z

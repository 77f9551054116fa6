"""The Object Relation Transformer's encoder: features of detected regions and their boxes, for a decoder of words.

The paper, and what was read of it, stand on the card of `regard.positions.box_relation`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, number, whole
from regard.masks import padding
from regard.pipeline.layer import Attention
from regard.positions.box_relation import BoxRelation


class DeviationNorm(nn.Module):
    """a (x - mean) / (std + eps) + b, with the unbiased deviation: the authors' norm, which is not torch's."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


class RegionLayer(nn.Module):
    """x + drop(attention(LN x)), then x + drop(MLP(LN x))."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        position = BoxRelation(num_heads)
        self.attention = Attention(dim, num_heads, bias=True, dropout=dropout, position=position)
        self.norm1, self.norm2, self.dropout = DeviationNorm(dim), DeviationNorm(dim), dropout
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))

    def forward(
        self, x: Float[Tensor, "B N M"], boxes: Float[Tensor, "B N 4"], keep: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N M"]:
        mixed = self.attention(self.norm1(x), positions=boxes, mask=None if keep is None else padding(keep))
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class RegionEncoder(nn.Module):
    """Regions to states: (B, N, C), boxes (B, N, 4) -> (B, N, M). Nothing tells their order.

    Args:
        features: C, of a region as the detector gives it.
        dim, num_heads, depth, hidden: M, H, how many layers, and the width of their MLPs.
        dropout: of weights, outputs and within the MLPs; of the embedding it is `embed_dropout`.
    """

    def __init__(
        self,
        features: int = 2048,
        *,
        dim: int = 512,
        num_heads: int = 8,
        depth: int = 6,
        hidden: int = 2048,
        dropout: float = 0.1,
        embed_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        whole(self, features=features, dim=dim, depth=depth, hidden=hidden)
        number(self, least=0, most=1, dropout=dropout, embed_dropout=embed_dropout)
        self.features = features
        self.embed = nn.Sequential(nn.Linear(features, dim), nn.ReLU(), nn.Dropout(embed_dropout))
        self.layers = nn.ModuleList(RegionLayer(dim, num_heads, hidden, dropout) for _ in range(depth))
        self.norm = DeviationNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform matrices within the layers, biases as torch starts them."""
        for part in self.layers.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)

    @checked(C="features")
    def forward(
        self, regions: Float[Tensor, "B N C"], boxes: Float[Tensor, "B N 4"], keep: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N M"]:
        """States; `keep` is True at real regions."""
        x = self.embed(regions)
        for layer in self.layers:
            x = layer(x, boxes, keep)
        return self.norm(x)

"""PATNet's last stage: some channels are convolved, the others attend, biased by distance.

And the block that joins the kinds.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, choice, divides, flag, number, refuse, whole
from regard.pipeline.layer import Attention
from regard.positions.axial import grid
from regard.stages import Made, Position, Rows, Tokens
from regard.vision._shared import MapNorm
from regard.vision.maps import to_map, to_tokens
from regard.vision.partial import PAPERS, PartialChannelAttention, PartialSpatialAttention, convolved, start

CARD = Card(
    "partial_self",
    equation="""[x1 | x2] = split(x, c, C - c),  c = C // divide        y = [K * x1 ; attention(LN(x2))]     K of 3 x 3
softmax(q k^T / sqrt(D) + R) v,   R_h[i, j] = table_h[b(round(sqrt(dy^2 + dx^2)))],   table = 0 at the start
b(d) = d for d <= L / 2, else min(L, round(L / 2 (1 + ln(2 d / L) / ln 8)))             (L is max_distance)""",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile", "dropout"},
    cost=Cost("9*B*Y*X*(M/divide)**2 + 2*B*(Y*X)**2*(M - M/divide)", ""),
    claim="Far pixels reach the channels that are not convolved, by how far they are: "
    "tests/vision/test_partial_self.py::test_only_distance_tells_places_apart.",
    differs=(
        "Tables have no rows of negative distances, which the code has and never reads.",
        "Without dropout by default; the code has 0.1, of the weights and the output.",
        "Queries, keys and values have a projection each, which the code stacks.",
    ),
    verified="third-party",
    example={"divide": 2, "max_distance": 8},
    defaults={"divide": "code", "max_distance": "code"},
)


def distance_bucket(
    distance: Int[Tensor, "*n"], *, alpha: float = 20, beta: int = 40, gamma: float = 160
) -> Int[Tensor, "*n"]:
    """Which row of a table a rounded distance has: its own up to alpha, then logarithmic, beta from gamma on."""
    wide = torch.float32 if distance.device.type == "mps" else torch.float64
    ratio = distance.clamp(min=1).to(wide) / alpha
    far = alpha + ratio.log() / math.log(gamma / alpha) * (beta - alpha)
    return torch.where(distance <= alpha, distance, far.round().clamp(max=beta).long())


class EuclideanBias(Position):
    """Adds a trained number to each score, by how far apart its two tokens stand on a grid.

    Layers are called with `positions=regard.positions.grid(Y, X)`; other coordinates, of any two axes, will do, too.

    Args:
        num_heads: H; each has a table.
        alpha, beta, gamma: as for `distance_bucket`; beta + 1 rows.
    """

    axes = 2

    def __init__(self, num_heads: int, *, alpha: float = 20, beta: int = 40, gamma: float = 160) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, beta=beta)
        number(self, above=0, most=beta, alpha=alpha)
        number(self, above=alpha, gamma=gamma)
        self.num_heads, self.alpha, self.beta, self.gamma = num_heads, alpha, beta, gamma
        self.table = nn.Parameter(torch.empty(num_heads, beta + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)

    def start_neutral(self) -> bool:
        """All numbers 0, which is plain attention."""
        self.reset_parameters()
        return True

    def prepare(self, tokens: Tokens) -> Made:
        if tokens.coordinates is None or tokens.context is not tokens.x:
            refuse(self, "positions", "are no coordinates", "none", "positions=(1 or B, T, 2) of tokens on one grid")
        return Made(whole=tokens.coordinates)

    def bias(self, rows: Rows) -> Float[Tensor, "#B H t s"]:
        at = rows.made.whole
        apart = (at[:, rows.i, None] - at[:, None, rows.j]).to(torch.promote_types(rows.q.dtype, torch.float32))
        distance = apart.square().sum(-1).sqrt().round().long()
        index = distance_bucket(distance, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        return F.embedding(index, self.table.T).movedim(-1, 1).to(rows.q.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}"


@CARD.module
class PartialSelfAttention(nn.Module):
    """PAT_sf: the first c channels through a convolution, the others through attention among all pixels.

    Args:
        dim: C.
        num_heads: H, of C - c channels; 4 in the released models.
        dropout: of the weights and of the output.
        divide: C / c.
        max_distance: L; the bias tells distances up to L / 2 apart, and none from 4 L on.
    """

    def __init__(
        self, dim: int, num_heads: int, dropout: float = 0.0, *, divide: int = 4, max_distance: int = 40
    ) -> None:
        super().__init__()
        c = convolved(self, dim, divide)
        whole(self, num_heads=num_heads, max_distance=max_distance)
        divides(self, num_heads=num_heads, rest=dim - c)
        number(self, least=0, most=1, dropout=dropout)
        self.dim, self.divide, self.kept, self.dropout = dim, divide, c, dropout
        self.conv = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim - c, eps=1e-6)
        bias = EuclideanBias(num_heads, alpha=max_distance / 2, beta=max_distance, gamma=4 * max_distance)
        # torch's fused kernel takes another way where the bias wants no gradient, which moves the last bits.
        self.attention = Attention(dim - c, num_heads, dropout=dropout, position=bias, kernel="chunked")
        self.attention.o_proj = nn.Linear(dim - c, dim - c)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start(self)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        near, rest = x.split([self.kept, self.dim - self.kept], 1)
        sizes = x.shape[2:]
        mixed = self.attention(self.norm(to_tokens(rest)), positions=grid(*sizes, device=x.device))
        mixed = F.dropout(mixed, self.dropout, self.training)
        return torch.cat([self.conv(near), to_map(mixed, sizes)], 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, divide={self.divide}"


class PartialAttentionBlock(nn.Module):
    """PATNet's block: x + MLP(PAT_ch(x)), or h + MLP(h) with h = x + PAT_sf(x).

    MLP(z) = PAT_sp(W2 relu(BN(W1 z))), of which PAT_sp can be left out.

    Args:
        dim: C.
        kind: "channel" in the first three stages, "self" in the last.
        num_heads, dropout: of "self".
        mlp_ratio: width of the MLP over C.
        spatial: whether it ends with PAT_sp; only one of the released models has it.
        divide: C / c of either kind.
        layer_scale: where given, the MLP's result is multiplied channel by channel by numbers that start there.
        drop_path: with which probability an image goes without its MLP in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        kind: Literal["channel", "self"] = "channel",
        num_heads: int = 4,
        dropout: float = 0.0,
        mlp_ratio: float = 2.0,
        spatial: bool = True,
        divide: int = 4,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        choice(self, ("channel", "self"), kind=kind)
        flag(self, spatial=spatial)
        number(self, above=0, mlp_ratio=mlp_ratio)
        number(self, least=0, below=1, drop_path=drop_path)
        self.dim, self.kind, self.drop_path = dim, kind, drop_path
        self.mixer: nn.Module
        if kind == "channel":
            self.mixer = PartialChannelAttention(dim, divide=divide)
        else:
            self.mixer = PartialSelfAttention(dim, num_heads, dropout, divide=divide)
        hidden = int(mlp_ratio * dim)
        whole(self, hidden=hidden)
        last = PartialSpatialAttention(dim) if spatial else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            MapNorm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, 1, bias=False),
            last,
        )
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((dim, 1, 1), float(layer_scale)))
        start(self)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        mixed = self.mixer(x)
        if self.kind == "self":
            x = mixed = x + mixed
        z = self.mlp(mixed)
        z = z if self.scale is None else self.scale * z
        if self.drop_path and self.training:  # kept ones weigh more, so that the mean stays
            z = z * F.dropout(z.new_ones(len(z), 1, 1, 1), self.drop_path)
        return x + z

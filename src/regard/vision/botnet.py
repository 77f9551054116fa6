"""Bottleneck Transformers: attention on a map, by content and by rows and columns apart.

The position term of a query is one number for each row of keys plus one for each column: appended to the query, and
the keys' rows and columns, one-hot, to the keys, it is part of a dot product, so that any kernel of plain attention
runs it and no map of all pairs is formed.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, flag, refuse, whole
from regard.pipeline.function import attention
from regard.shapes import head_shape
from regard.vision._shared import no_empty_map
from regard.weights import Loaded, same, stacked

CARD = Card(
    "botnet",
    equation="""z = s <q_yx, k_uw> + s' (<q_yx, R_y[u - y]> + <q_yx, R_x[w - x]>)        out_yx = softmax_uw(z) v_uw
s = 1 / sqrt(D);  s' = s, or 1;  R_y and R_x hold one vector for each difference, shared by heads
absolute:  <q_yx, E_y[u] + E_x[w]> in place of the bracket;  stride 2: the output's means over cells of 2 x 2""",
    papers=(
        Paper(
            "Bottleneck Transformers for Visual Recognition",
            "Srinivas, Lin, Parmar, Shlens, Abbeel, Vaswani",
            2021,
            "2101.11605",
            "abstract; timm's and lucidrains' code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*(Y*X*(2*M + H*(Y + X)) + M*(Y + X))", ""),
    claim="Attention by how many rows and columns apart pixels are, beside content; without its tables it is plain "
    "attention, and without content its weights depend on that alone: "
    "tests/vision/test_botnet.py::test_place_counts_by_rows_and_columns_apart.",
    differs=(
        "Whether the position term is scaled as the other is an option, `scale_positions`: it is by default, as in "
        "lucidrains' code, and is not by timm's default.",
        "Tables are of the largest map, so that smaller ones may come; the codes take maps of one size.",
        "Queries, keys and values have a projection each, which timm stacks.",
        "A block that makes the map smaller has a pointwise convolution of stride 2 beside it, as ResNet; lucidrains' "
        "is 3 x 3 and has an activation.",
    ),
    verified="third-party",
    example={"size": (8, 8)},
    tries={"size": (9, 8)},
    defaults={
        "size": "ours, the last stage of an image of 224 x 224 without its stride",
        "positions": "code, timm",
        "scale_positions": "code, lucidrains",
        "bias": "code, timm",
    },
)

Positions = Literal["relative", "absolute"]
Tables = tuple[Float[Tensor, "rows D"], Float[Tensor, "columns D"]]
"""Vectors of the differences 1 - Y .. Y - 1 of rows and 1 - X .. X - 1 of columns, or of the rows and columns."""


@checked()
def bottleneck_attention(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X V"],
    tables: Tables,
    *,
    positions: Positions = "relative",
    scale_positions: bool = True,
) -> Float[Tensor, "B H Y X V"]:
    """Attention among all pixels of a map, with position terms; the tables are of this map.

    `scale_positions` divides these terms by sqrt(D) too.
    """
    who = "bottleneck_attention"
    choice(who, get_args(Positions), positions=positions)
    (Y, X, D), relative = q.shape[2:], positions == "relative"
    for name, table, n in zip(("rows", "columns"), tables, (Y, X), strict=True):
        if table.shape != ((2 * n - 1 if relative else n), D):
            refuse(who, f"the table of {name}", "is not of this map", tuple(table.shape), f"one for {n} {name} of {D}")
    scale = D**-0.5
    rows, columns = (t.to(q.dtype) * (scale if scale_positions else 1.0) for t in tables)
    if relative:
        at_y, at_x = (_differences(n, q.device) for n in (Y, X))
        by_row = torch.einsum("bhyxd,yud->bhyxu", q, rows[at_y])
        by_column = torch.einsum("bhyxd,xwd->bhyxw", q, columns[at_x])
    else:
        by_row, by_column = q @ rows.T, q @ columns.T
    row, column = (torch.eye(n, dtype=k.dtype, device=k.device) for n in (Y, X))
    placed = torch.cat([row[:, None].expand(Y, X, Y), column.expand(Y, X, X)], -1)
    queries = torch.cat([q * scale, by_row, by_column], -1)
    keys = torch.cat([k, placed.expand(*k.shape[:2], Y, X, Y + X)], -1)
    out = attention(*(z.flatten(2, 3) for z in (queries, keys, v)), scale=1.0)
    return out.unflatten(2, (Y, X))


def _differences(size: int, device: torch.device) -> Tensor:
    """Which row of a table the difference of each query (first axis) and key has."""
    at = torch.arange(size, device=device)
    return at - at[:, None] + size - 1


@CARD.module(closed=("stride", "out_dim"))  # both give another shape
class BottleneckAttention(nn.Module):
    """`bottleneck_attention` with 1x1 projections. There is no output projection, as the block around it has one.

    Args:
        dim, num_heads: M and H.
        head_dim: D, of queries and keys; default out_dim / num_heads.
        size: the largest Y and X.
        out_dim: H V, channels of the output; default dim.
        stride: 2 makes the output half as high and wide.
        positions, scale_positions: as for `bottleneck_attention`.
        bias: of the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        size: tuple[int, int] = (14, 14),
        out_dim: int | None = None,
        stride: Literal[1, 2] = 1,
        positions: Positions = "relative",
        scale_positions: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        whole(self, dim=dim, out_dim=out_dim)
        for n in size:
            whole(self, size=n)
        choice(self, (1, 2), stride=stride)
        choice(self, get_args(Positions), positions=positions)
        flag(self, scale_positions=scale_positions, bias=bias)
        D = head_shape(out_dim, num_heads, None, head_dim, who=type(self).__name__).head_dim
        divides(self, num_heads=num_heads, out_dim=out_dim)
        self.dim, self.num_heads, self.head_dim, self.out_dim = dim, num_heads, D, out_dim
        self.size, self.stride = tuple(size), stride
        self.positions, self.scale_positions = positions, scale_positions
        self.q_proj = nn.Conv2d(dim, num_heads * D, 1, bias=bias)
        self.k_proj = nn.Conv2d(dim, num_heads * D, 1, bias=bias)
        self.v_proj = nn.Conv2d(dim, out_dim, 1, bias=bias)
        rows, columns = (2 * n - 1 if positions == "relative" else n for n in size)
        self.height_table = nn.Parameter(torch.empty(rows, D))
        self.width_table = nn.Parameter(torch.empty(columns, D))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As timm: truncated normals of variance 1 / fan in, and 1 / D for the tables."""
        for conv in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.trunc_normal_(conv.weight, std=self.dim**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for table in (self.height_table, self.width_table):
            nn.init.trunc_normal_(table, std=self.head_dim**-0.5)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B C y x"]:
        Y, X = x.shape[2:]
        if self.size[0] < Y or self.size[1] < X:
            refuse(self, "x", "is larger than its tables", (Y, X), f"a map of at most {self.size}")
        no_empty_map(self, x, self.stride)
        tables = (self.height_table, self.width_table)
        if self.positions == "relative":
            here = tuple(t[most - n : most + n - 1] for t, most, n in zip(tables, self.size, (Y, X), strict=True))
        else:
            here = tuple(t[:n] for t, n in zip(tables, (Y, X), strict=True))
        q, k, v = (
            f(x).unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = bottleneck_attention(
            q,
            k,
            v,
            here,  # type: ignore[arg-type]
            positions=self.positions,  # type: ignore[arg-type]
            scale_positions=self.scale_positions,
        )
        out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return out if self.stride == 1 else F.avg_pool2d(out, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, size={self.size}, out_dim={self.out_dim}, stride={self.stride}"


@CARD.loads("timm.layers", "BottleneckAttn")
def _timm(theirs: Any) -> Loaded:
    """Its map has one size, and its scale is told by whether positions have it, too."""
    heads, D, V = theirs.num_heads, theirs.dim_head_qk, theirs.dim_head_v
    size = (theirs.pos_embed.height, theirs.pos_embed.width)
    options = {"scale_positions": theirs.scale_pos_embed, "bias": theirs.qkv.bias is not None}
    stride: Literal[1, 2] = 1 if isinstance(theirs.pool, nn.Identity) else 2

    def build() -> BottleneckAttention:
        return BottleneckAttention(
            theirs.qkv.in_channels, heads, head_dim=D, size=size, out_dim=heads * V, stride=stride, **options
        )

    joint = stacked(theirs, ("q_proj", "k_proj", "v_proj"), "qkv", (heads * D, heads * D, heads * V))
    tables = {"height_table": "pos_embed.height_rel", "width_table": "pos_embed.width_rel"}
    return Loaded(build, [*same(theirs, tables), *joint])

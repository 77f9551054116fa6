"""HaloNet: blocks of queries attend to their block and a halo around it, by content and position."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.pipeline.function import attention
from regard.shapes import head_shape
from regard.weights import Loaded, only, same, woven

CARD = Card(
    "halo",
    equation="""z = <q_ij, k_uw> / sqrt(D) + <q_ij, R_y[u - i]> + <q_ij, R_x[w - j]>        y_ij = softmax_uw(z) v_uw
query (i, j) of a block of b x b meets the keys (u, w), 0 <= u, w < W = b + 2h, of the slab that the block and a
halo of h on every side make up; R_y and R_x hold one vector for each of the 2W - 1 differences, shared by heads""",
    papers=(
        Paper(
            "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
            "Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens",
            2021,
            "2103.12731",
            "abstract; timm's and lucidrains' code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*M*(block + 2*halo)*(block + 2*halo + 1)", ""),
    claim="The reach grows with the halo at no parameters; with halo 0 it is attention in blocks: "
    "tests/vision/test_halo.py::test_without_a_halo_blocks_are_alone_and_the_halo_widens_the_view_at_no_parameters.",
    differs=(
        "Whether keys beyond the border count is an option, `padding`: as zeros, so that their score is the position "
        "term alone, as timm has it and by default, or not at all.",
    ),
    verified="third-party",
    example={"block": 4, "halo": 1},
    defaults={
        "block": "code, timm",
        "halo": "code, timm",
        "padding": "code, timm",
        "scale_positions": "code, timm",
        "bias": "code, timm",
    },
)

Tables = tuple[Float[Tensor, "offsets D"], Float[Tensor, "offsets D"]]
"""R_y and R_x: vectors of the differences -(W - 1) .. W - 1."""


@checked()
def halo_attention(
    q: Float[Tensor, "B H y x D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X V"],
    *,
    block: int,
    halo: int,
    tables: Tables | None = None,
    padding: Literal["zeros", "masked"] = "zeros",
    distances: Literal["pixels", "steps"] = "pixels",
    scale_positions: bool = False,
) -> Float[Tensor, "B H y x V"]:
    """Attention of each block of queries to its own keys and those within `halo` of it.

    q may be coarser than k by a whole stride that divides `block`. `distances` tells how a strided query counts: in
    pixels of the map, or, as timm does, by its number within the block. `scale_positions` divides the position terms by
    sqrt(D) too.
    """
    B, H, Y, X, D = k.shape
    stride = Y // q.shape[2]
    W, b = block + 2 * halo, block // stride
    down, across = Y // block, X // block

    def slabs(z: Tensor) -> Float[Tensor, "blocks H keys d"]:
        padded = F.pad(z, (0, 0, halo, halo, halo, halo))
        views = padded.unfold(2, W, block).unfold(3, W, block)
        return views.permute(0, 2, 3, 1, 5, 6, 4).reshape(B * down * across, H, W * W, views.shape[4])

    tiles = q.reshape(B, H, down, b, across, b, D).permute(0, 2, 4, 1, 3, 5, 6).reshape(B * down * across, H, b, b, D)
    bias = None if tables is None else _position_terms(tiles, tables, W, stride if distances == "pixels" else 1)
    if bias is not None and scale_positions:
        bias = bias * D**-0.5
    mask = None
    if padding == "masked" and halo:
        seen = _inside(Y, block, halo, k.device)[:, None, :, None] & _inside(X, block, halo, k.device)[None, :, None]
        mask = seen.expand(B, -1, -1, -1, -1).reshape(B * down * across, 1, 1, W * W).expand(-1, -1, b * b, -1)
    out = attention(tiles.flatten(2, 3), slabs(k), slabs(v), mask=mask, bias=bias)
    V = out.shape[-1]
    return out.view(B, down, across, H, b, b, V).permute(0, 3, 1, 4, 2, 5, 6).reshape(B, H, down * b, across * b, V)


def _position_terms(
    q: Float[Tensor, "blocks H b b D"], tables: Tables, W: int, step: int
) -> Float[Tensor, "blocks H queries keys"]:
    i, u = torch.arange(q.shape[2], device=q.device) * step, torch.arange(W, device=q.device)
    at = u - i[:, None] + W - 1
    vertical = torch.einsum("nhijd,iud->nhiju", q, tables[0][at])
    horizontal = torch.einsum("nhijd,jwd->nhijw", q, tables[1][at])
    return (vertical[..., None] + horizontal[..., None, :]).flatten(4).flatten(2, 3)


def _inside(size: int, block: int, halo: int, device: torch.device) -> Bool[Tensor, "blocks W"]:
    """Which places of each block's slab lie on the map."""
    starts = torch.arange(0, size, block, device=device)[:, None] - halo
    at = starts + torch.arange(block + 2 * halo, device=device)
    return (at >= 0) & (at < size)


@CARD.module(closed=("stride", "distances"))  # a stride makes the output coarser, and distances matter then alone
class HaloAttention(nn.Module):
    """`halo_attention` with 1x1 projections. There is no output projection, as the bottleneck around it has one.

    Args:
        dim: M. Values are dim / num_heads wide.
        num_heads: H.
        head_dim: D, width of queries and keys; default dim / num_heads.
        block: b, which must divide the map's height and width.
        halo: h. The defaults of both are timm's.
        stride: s, which divides the block; the output is Y / s by X / s.
        padding, distances, scale_positions: as for `halo_attention`.
        bias: whether the projections have one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        padding: Literal["zeros", "masked"] = "zeros",
        distances: Literal["pixels", "steps"] = "pixels",
        scale_positions: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        whole(self, block=block, stride=stride)
        whole(self, 0, halo=halo)
        divides(self, stride=stride, block=block)
        choice(self, ("zeros", "masked"), padding=padding)
        choice(self, ("pixels", "steps"), distances=distances)
        D = head_shape(dim, num_heads, None, head_dim, who=type(self).__name__).head_dim
        divides(self, num_heads=num_heads, dim=dim)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, D
        self.block, self.halo, self.stride = block, halo, stride
        self.padding, self.distances, self.scale_positions = padding, distances, scale_positions
        self.q_proj = nn.Conv2d(dim, num_heads * D, 1, bias=bias)
        self.k_proj = nn.Conv2d(dim, num_heads * D, 1, bias=bias)
        self.v_proj = nn.Conv2d(dim, dim, 1, bias=bias)
        offsets = 2 * (block + 2 * halo) - 1
        self.height_table = nn.Parameter(torch.empty(offsets, D))
        self.width_table = nn.Parameter(torch.empty(offsets, D))
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
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M y x"]:
        divides(self, block=self.block, Y=x.shape[2])
        divides(self, block=self.block, X=x.shape[3])
        if self.halo > (most := max(*x.shape[2:], self.block)):
            refuse(self, "halo", "reaches beyond the whole map", self.halo, f"at most {most} for this one")
        coarse = x if self.stride == 1 else x[..., :: self.stride, :: self.stride]
        projected = (self.q_proj(coarse), self.k_proj(x), self.v_proj(x))
        q, k, v = (z.unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2) for z in projected)
        out = halo_attention(
            q,
            k,
            v,
            block=self.block,
            halo=self.halo,
            tables=(self.height_table, self.width_table),
            padding=self.padding,  # type: ignore[arg-type]
            distances=self.distances,  # type: ignore[arg-type]
            scale_positions=self.scale_positions,
        )
        return out.permute(0, 1, 4, 2, 3).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, block={self.block}, halo={self.halo}, stride={self.stride}"


@CARD.loads("timm.layers", "HaloAttn")
def _timm(theirs: Any) -> Loaded:
    """Its position terms are in steps of a strided query."""
    dim, rows = theirs.q.in_channels, (theirs.dim_head_qk, theirs.dim_head_v)
    only(theirs, {"dim_out_v": dim})
    if not isinstance(theirs.pool, nn.Identity):
        refuse(theirs, "pool", "has no counterpart here", theirs.pool, "queries with a stride, or none")
    options = {"block": theirs.block_size, "halo": theirs.halo_size, "stride": theirs.block_stride}
    options |= {"scale_positions": theirs.scale_pos_embed, "bias": theirs.q.bias is not None}

    def build() -> HaloAttention:
        return HaloAttention(dim, theirs.num_heads, head_dim=theirs.dim_head_qk, distances="steps", **options)

    both = woven(theirs, ("k_proj", "v_proj"), "kv", theirs.num_heads, rows)
    tables = {"height_table": "pos_embed.height_rel", "width_table": "pos_embed.width_rel"}
    return Loaded(build, [*same(theirs, {"q_proj": "q", **tables}), *both])

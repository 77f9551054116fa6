"""Bi-level routing: each region of a map attends to the few regions whose mean features fit it best.

The choice is one for all heads, and may leave a region's own tokens out; a hard one has no gradient. As in the authors'
code x is padded with zeros (at the bottom and right, to a multiple of the regions), so that padded places hold the
projections' biases and take part as keys. The chosen regions are gathered, and one batched attention runs over all
regions: K Y X / S^2 keys a token for S x S regions, where K regions are chosen.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.pipeline.function import attention
from regard.shapes import head_shape

CARD = Card(
    "biformer",
    equation="""q, k, v = x Wq, x Wk, x Wv;   qbar_r, kbar_r = means of q, k over region r (all heads together)
I_r = the K largest of qbar_r . kbar_s over s;   keys of r's tokens = all tokens of the regions in I_r
out = (softmax(q k^T / sqrt(Q)) v + depthwise(v)) Wo          Q: the width of all heads together, not of one
soft: k and v of s are multiplied by softmax over I_r of (qbar_r Wr . kbar_s Wr) / sqrt(Q)  (Wr: route_proj)
pool: the keys and values of a region are pool_to^2 means or maxima of them""",
    papers=(
        Paper(
            "BiFormer: Vision Transformer with Bi-Level Routing Attention",
            "Zhu et al.",
            2023,
            "2303.08810",
            "abstract; the authors' code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    traits={"routed"},
    cost=Cost(
        "B*M*(regions**2*ceil(Y/regions)*ceil(X/regions)*(2*topk*ceil(Y/regions)*ceil(X/regions) + kernel**2)"
        " + regions**4)",
        "",
    ),
    claim="Sparsity that depends on the query with dense products alone: a query reads 16 of 196 keys of a 14 x 14 "
    "map in 7 x 7 regions, 4 of them chosen: tests/routing/test_biformer.py::test_a_query_reads_16_of_196_tokens.",
    differs=(
        "With soft routing the weights have a gradient, as the authors' comment says and their diff_routing does; "
        "their soft_routing alone detaches them.",
        "Pooling to a number of keys, not by a ratio, which is the same where it divides; no weighting of hard "
        "choices, which the authors left open.",
        "The rewrite of the authors' code that pads after the projections is not built: it differs only where the map "
        "is no multiple of the regions.",
    ),
    verified="third-party",
    example={"regions": 3, "topk": 2, "kernel": 3},
    tries={
        "route_proj": {"route_proj": True, "routing": "soft"},
        "pool_to": {"pool": "mean", "pool_to": 1},
        "pool": {"pool": "mean", "pool_to": 1},
    },
    defaults={
        "regions": "code",
        "topk": "code",
        "kernel": "code, the classification models",
        "qk_dim": "code, the classification models",
        "routing": "code",
        "route_proj": "code",
        "pool": "code, the classification models",
        "pool_to": "code",
        "project": "code",
        "bias": "code",
    },
)

Routing = Literal["hard", "soft"]
Pool = Literal["mean", "max"]


def region_affinity(
    q: Float[Tensor, "B H R n D"], k: Float[Tensor, "B H R n D"], proj: nn.Module | None = None
) -> Float[Tensor, "B R R"]:
    """How well each region's mean query fits each region's mean key, over all heads together; `proj` maps both."""
    wide = torch.promote_types(q.dtype, torch.float32)
    mean_q, mean_k = (z.to(wide).mean(3).transpose(1, 2).flatten(2) for z in (q, k))
    if proj is not None:
        mean_q, mean_k = proj(mean_q.to(q.dtype)), proj(mean_k.to(k.dtype))
    return mean_q @ mean_k.mT


def route_regions(
    q: Float[Tensor, "B H R n D"], k: Float[Tensor, "B H R n D"], *, topk: int
) -> Int[Tensor, "B R topk"]:
    """The regions whose mean keys fit each region's mean query best, over all heads together."""
    return region_affinity(q.detach(), k.detach()).topk(topk, sorted=False).indices


@checked()
def region_attention(
    q: Float[Tensor, "B H R n D"],
    k: Float[Tensor, "B H R m D"],
    v: Float[Tensor, "B H R m V"],
    regions: Int[Tensor, "B R topk"],
    *,
    weights: Float[Tensor, "B R topk"] | None = None,
    counts: Float[Tensor, " m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H R n V"]:
    """Every token attends to all keys of its region's chosen ones, times `weights`; each counts `counts` times."""
    B, R = q.shape[0], q.shape[2]
    bias = None if counts is None else counts.log().repeat(regions.shape[2])[None, None, None]
    row = torch.arange(B, device=q.device)[:, None, None]

    def gathered(z: Tensor) -> Tensor:
        """(B R, H, topk m, width): what each region has chosen."""
        chosen = z.transpose(1, 2)[row, regions]  # (B, R, topk, H, m, width)
        if weights is not None:
            chosen = chosen * weights[..., None, None, None].to(z.dtype)
        return chosen.transpose(2, 3).flatten(3, 4).flatten(0, 1)

    out = attention(q.transpose(1, 2).flatten(0, 1), gathered(k), gathered(v), bias=bias, scale=scale)
    return out.unflatten(0, (B, R)).transpose(1, 2)


@CARD.module
class BiLevelRouting(nn.Module):
    """Bi-level routing attention over feature maps (B, dim, Y, X).

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads.
        regions: S; the map is cut into S x S regions of equal size, 7 x 7 in the released models.
        topk: K, how many regions each region attends to; at most S^2. The released models have 1, 4 and 16 by stage.
        kernel: width of the depthwise convolution over the values, odd; 0 leaves it out. 5 in the released models.
        bias: whether the projections have one.
        qk_dim: Q, the width of all queries or keys together, a multiple of num_heads; default dim.
        routing: "hard": regions are chosen, no more. "soft": the chosen ones' keys and values are multiplied by their
            shares, so that the choice learns.
        route_proj: whether the means go through a linear map of their own; for soft routing, else it can't learn.
        pool: how a region's keys and values are pooled: "mean" or "max"; None: not.
        pool_to: into how many, a side.
        project: whether an output projection follows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        regions: int = 7,
        topk: int = 4,
        kernel: int = 5,
        bias: bool = True,
        qk_dim: int | None = None,
        routing: Routing = "hard",
        route_proj: bool = False,
        pool: Pool | None = None,
        pool_to: int = 4,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = head_shape(dim, num_heads, who="BiLevelRouting").head_dim
        qk_dim = dim if qk_dim is None else qk_dim
        whole(self, regions=regions, qk_dim=qk_dim, pool_to=pool_to)
        divides(self, num_heads=num_heads, qk_dim=qk_dim)
        choice(self, get_args(Routing), routing=routing)
        choice(self, (None, *get_args(Pool)), pool=pool)
        if route_proj and routing == "hard":
            refuse(
                self, "route_proj", "has nothing to learn from", True, 'routing="soft"; a hard choice has no gradient'
            )
        whole(self, most=regions**2, topk=topk)
        whole(self, 0, kernel=kernel)
        if kernel and kernel % 2 == 0:
            refuse(self, "kernel", "is even", kernel, "an odd width, or 0")
        self.dim, self.num_heads, self.regions, self.topk, self.kernel = dim, num_heads, regions, topk, kernel
        self.qk_dim, self.routing, self.pool, self.pool_to = qk_dim, routing, pool, pool_to
        self.q_proj, self.k_proj = (nn.Linear(dim, qk_dim, bias=bias) for _ in "qk")
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias) if project else nn.Identity()
        self.local = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None
        self.route_proj = nn.Linear(qk_dim, qk_dim) if route_proj else None

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, regions={self.regions}, topk={self.topk}"

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        """Any Y and X: the map is padded with zeros to a multiple of the regions, and the result cut back."""
        Y, X = x.shape[2:]
        (tall, wide), grid = self._regions(Y, X)
        x = F.pad(x, (0, grid[1] * wide - X, 0, grid[0] * tall - Y)).permute(0, 2, 3, 1)
        v_map = self.v_proj(x)
        q, k, v = (self._cut(z, grid) for z in (self.q_proj(x), self.k_proj(x), v_map))
        scale, weights = 1 / math.sqrt(self.qk_dim), None
        if self.routing == "hard":
            regions = route_regions(q, k, topk=self.topk)
        else:
            kept = (scale * region_affinity(q, k, self.route_proj)).topk(self.topk)
            regions, weights = kept.indices, kept.values.softmax(-1)
        counts = None
        if self.pool is not None:
            (k, v), counts = (self._pooled(z, (tall, wide)) for z in (k, v)), self._counts(k, (tall, wide))
        y = self._join(region_attention(q, k, v, regions, weights=weights, counts=counts, scale=scale), grid, tall)
        if self.local is not None:
            y = y + self.local(v_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.o_proj(y)[:, :Y, :X].permute(0, 3, 1, 2).contiguous()

    def _regions(self, Y: int, X: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a region, and how many are laid out: of those beyond the map, which are all the same, as
        many as the choice and the convolution could tell from S x S."""
        S, near = self.regions, self.kernel // 2
        tall, wide = max(1, -(-Y // S)), max(1, -(-X // S))
        across = min(S, -(-X // wide) + max(near, -(-self.topk // S)))
        down = min(S, -(-Y // tall) + max(near, -(-self.topk // max(1, across))))
        return (tall, wide), (down, across)

    def _cut(self, z: Float[Tensor, "B Y X M"], grid: tuple[int, int]) -> Float[Tensor, "B H R n D"]:
        """Regions row by row, the tokens of each row by row, heads apart."""
        z = z.unflatten(3, (self.num_heads, -1)).unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1))
        return z.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3)  # from (B, S, y, S, x, H, D)

    def _pooled(self, z: Float[Tensor, "B H R n D"], sides: tuple[int, int]) -> Float[Tensor, "B H R m D"]:
        """Fewer keys or values of each region, which has these sides."""
        pool = F.adaptive_avg_pool2d if self.pool == "mean" else F.adaptive_max_pool2d
        # Beyond 2 n - 1 cells of n tokens, each a token or two neighbours, they only repeat.
        cells = pool(
            z.flatten(0, 2).mT.unflatten(-1, sides),
            (min(self.pool_to, 2 * sides[0] - 1), min(self.pool_to, 2 * sides[1] - 1)),
        )
        return cells.flatten(2).mT.unflatten(0, z.shape[:3])

    def _counts(self, z: Tensor, sides: tuple[int, int]) -> Float[Tensor, " m"] | None:
        """How often each of these cells stands among pool_to^2; None where all stand once."""
        P, each = self.pool_to, []
        for n in sides:
            # Cells of token m alone, and whether one holds m and m + 1.
            joined = [c for m in range(n) for c in ((m + 1) * P // n + -m * P // n, int((m + 1) * P % n > 0))][:-1]
            each.append(z.new_tensor(joined if 2 * n - 1 < P else [1] * P))
        return None if 2 * min(sides) - 1 >= P else (each[0][:, None] * each[1]).flatten()

    def _join(self, z: Float[Tensor, "B H R n D"], grid: tuple[int, int], y: int) -> Float[Tensor, "B Y X M"]:
        """Back to the map; regions are `y` tokens high."""
        z = z.unflatten(3, (y, -1)).unflatten(2, grid)  # (B, H, S, S, y, x, D)
        return z.permute(0, 2, 4, 3, 5, 1, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)

"""Agent attention on feature maps: agents are blocks' mean queries, biases know rows and columns."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, refuse, whole
from regard.linear.agent import PAPER, TABLE, agent_attention
from regard.pipeline.head_mixer import HeadMixer

CARD = Card(
    "agent_grid",
    equation="""va = softmax_S(s a k^T + B1) v,   o = softmax_n(s q a^T + B2) va,   out = o + conv(v),   s = 1 / sqrt(D)
B1, B2 of agent a at place (i, j): a 7 x 7 table stretched to the map + a number for row i + one for column j
conv: depthwise, 3 x 3;   a: adaptive average pooling of the map of queries to sqrt(n) x sqrt(n)""",
    papers=(PAPER,),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("4*B*H*Y*X*num_agents*D + 9*B*Y*X*H*D", ""),
    claim="Linear in the number of places: tests/linear/test_agent_grid.py::test_cost_is_linear_in_places.",
    differs=("Maps need not be square.", "No dropout of the two attention maps."),
    verified="third-party",
    example={"size": (8, 8), "num_agents": 9},
    defaults={"size": "ours", "bias": "ours, the authors' code has one", "num_agents": "code"},
)


@CARD.module
class GridAgentAttention(HeadMixer):
    """Mixes the places of a feature map of fixed size, (B, M, Y, X) -> the same.

    Args:
        dim, num_heads, head_dim, bias: as of `HeadMixer`.
        size: Y and X; the default is this library's.
        num_agents: n, a square number; 49 in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: tuple[int, int] = (14, 14),
        head_dim: int | None = None,
        bias: bool = False,
        num_agents: int = 49,
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, bias=bias)
        whole(self, num_agents=num_agents)
        if math.isqrt(num_agents) ** 2 != num_agents:
            refuse(self, "num_agents", "is no square number", num_agents, "1, 4, 9, 16 and so on")
        if len(size) != 2:
            refuse(self, "size", "is no pair", size, "(height, width)")
        for side in size:
            whole(self, size=side)
        self.num_agents, self.size = num_agents, tuple(size)
        self.height, self.width = Y, X = self.size
        H, n = num_heads, num_agents
        channels = H * self.head_dim
        self.key_table = nn.Parameter(torch.empty(H, n, TABLE, TABLE))
        self.key_rows = nn.Parameter(torch.empty(H, n, Y, 1))
        self.key_columns = nn.Parameter(torch.empty(H, n, 1, X))
        self.query_table = nn.Parameter(torch.empty(H, n, TABLE, TABLE))
        self.query_rows = nn.Parameter(torch.empty(H, n, Y, 1))
        self.query_columns = nn.Parameter(torch.empty(H, n, 1, X))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters(recurse=False):
            nn.init.trunc_normal_(table, std=0.02)

    @checked(M="dim", Y="height", X="width")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:  # type: ignore[override]
        return super().forward(x.flatten(2).mT).mT.unflatten(2, self.size)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        Y, X = self.size
        p = math.isqrt(self.num_agents)
        maps = (z.mT.unflatten(-1, (Y, X)).flatten(1, 2) for z in (q, v))
        pooled, local = F.adaptive_avg_pool2d(next(maps), p), self.conv(next(maps))
        agents, local = (z.flatten(2).unflatten(1, (self.num_heads, -1)).mT for z in (pooled, local))
        bias = (
            F.interpolate(table, self.size, mode="bilinear") + rows + columns
            for table, rows, columns in (
                (self.key_table, self.key_rows, self.key_columns),
                (self.query_table, self.query_rows, self.query_columns),
            )
        )
        key_bias, query_bias = (z.flatten(2)[None] for z in bias)
        return agent_attention(q, agents, k, v, key_bias=key_bias, query_bias=query_bias.mT) + local

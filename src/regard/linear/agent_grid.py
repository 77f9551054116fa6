"""Agent attention on feature maps, the paper's own form: agents are blocks' mean queries, biases know rows and columns.

    va = softmax_S(s a k^T + B1) v,   o = softmax_n(s q a^T + B2) va,   out = o + conv(v)          (`agent.py`)
    B1, B2 of agent a at place (i, j): a 7 x 7 table stretched to the map + a number for row i + one for column j
    conv: depthwise, 3 x 3;  a: adaptive average pooling of the map of queries to sqrt(n) x sqrt(n)

Han et al. 2023, "Agent Attention: On the Integration of Softmax and Linear Attention",
https://arxiv.org/abs/2312.08874: abstract read, the authors' released code (agent_swin.py) followed.
Differs from the paper: maps need not be square; no dropout of the two attention maps.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.linear.agent import TABLE, agent_attention
from regard.pipeline.head_mixer import HeadMixer
from regard.shapes import HeadShape


class GridAgentAttention(HeadMixer):
    """Mixes the places of a feature map of fixed size, (B, M, Y, X) -> the same.

    Args:
        dim, num_heads, head_dim, bias: as of `HeadMixer`.
        size: Y and X.
        num_agents: n, a square number.
    """

    supports = frozenset({"bidirectional", "compile"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: tuple[int, int],
        head_dim: int | None = None,
        bias: bool = False,
        num_agents: int = 49,
    ) -> None:
        if num_agents < 1 or math.isqrt(num_agents) ** 2 != num_agents:
            raise ValueError(f"agent_grid: num_agents must be a square number (got {num_agents})")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"agent_grid: size must be (height, width), both at least 1 (got {size})")
        super().__init__(dim, num_heads, head_dim=head_dim, bias=bias)
        self.num_agents, self.size = num_agents, tuple(size)
        (Y, X), H, n = self.size, num_heads, num_agents
        width = H * self.head_dim
        self.key_table = nn.Parameter(torch.empty(H, n, TABLE, TABLE))
        self.key_rows = nn.Parameter(torch.empty(H, n, Y, 1))
        self.key_columns = nn.Parameter(torch.empty(H, n, 1, X))
        self.query_table = nn.Parameter(torch.empty(H, n, TABLE, TABLE))
        self.query_rows = nn.Parameter(torch.empty(H, n, Y, 1))
        self.query_columns = nn.Parameter(torch.empty(H, n, 1, X))
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in self.parameters(recurse=False):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:  # type: ignore[override]
        if x.dim() != 4 or x.shape[1:] != (self.dim, *self.size):
            expected = ", ".join(str(n) for n in (self.dim, *self.size))
            raise ValueError(f"{self._who}: x has shape {tuple(x.shape)}; expected (batch, {expected})")
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


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    size: tuple[int, int] = (14, 14),
    num_agents: int = 49,
    bias: bool = False,
) -> GridAgentAttention:
    if causal:
        raise ValueError("agent_grid: places of a map have no order (got causal=True)")
    if shape.num_kv_heads != shape.num_heads:
        raise ValueError(f"agent_grid: every head has its own keys (got {shape.num_kv_heads} key heads)")
    return GridAgentAttention(
        shape.dim,
        shape.num_heads,
        size=size,
        head_dim=shape.head_dim,
        bias=bias,
        num_agents=num_agents,
    )


CARD = register(
    Card(
        name="agent_grid",
        family="linear",
        gist="Agent attention on feature maps: agents are pooled from blocks of the map.",
        equation="out = softmax_n(q a^T + B2) softmax_S(a k^T + B1) v + conv(v)",
        paper=Paper(
            "Agent Attention: On the Integration of Softmax and Linear Attention",
            "Han et al.",
            2023,
            "2312.08874",
            "abstract; the authors' code",
        ),
        build=_build,
        protocol="FeatureMixer",
        supports=GridAgentAttention.supports,
        cost=Cost("4*B*H*Y*X*num_agents*D + 9*B*Y*X*H*D", ""),
        claim="Linear in the number of places; the authors' numbers: tests/linear/test_agent_grid.py.",
        differs=("Maps need not be square.", "No dropout of the two attention maps."),
        verified="third-party",
        example={"size": (8, 8), "num_agents": 9},
    )
)

"""Agent attention: a few agents, pooled from the queries, read all keys; all queries read the agents."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, whole
from regard.kernels.check import check_inputs
from regard.linear._shared import repeat_heads
from regard.normalizers.softmax import softmax
from regard.pipeline.head_mixer import HeadMixer

PAPER = Paper(
    "Agent Attention: On the Integration of Softmax and Linear Attention",
    "Han et al.",
    2023,
    "2312.08874",
    "abstract; the authors' code (agent_swin.py)",
)

CARD = Card(
    "agent",
    equation="""va = softmax_S(s a k^T + B1) v      the n agents gather,      s = 1 / sqrt(D)
o  = softmax_n(s q a^T + B2) va     and give out,             out = o + conv(v)
a: adaptive average pooling of q to n cells;   conv: depthwise, 3 wide;   B1, B2: learned, per head""",
    papers=(PAPER,),
    supports={"bidirectional", "padding", "packed", "gqa", "compile"},
    traits={"shift_invariant", "head_independent"},
    cost=Cost("B*T*num_agents*(5*M + 14*H) + 3*B*T*M", ""),
    claim="Linear in length, and a generalised linear attention, whose weights have the rank of the agents: "
    "tests/linear/test_agent.py::test_no_square_matrix, "
    "tests/linear/test_agent.py::test_weights_have_the_rank_of_the_agents.",
    differs=(
        "On a sequence pooling, bias tables and convolution have one axis, and each bias is one table of 7 entries "
        "stretched over the real tokens; 'agent_grid' is the paper's form.",
        "No dropout of the two attention maps.",
    ),
    verified="reconstructed",
    example={"num_agents": 5},
    defaults={"bias": "ours, the authors' code has one", "num_agents": "code"},
)

TABLE = 7
"""Entries of a bias table along each axis, as in the authors' code."""


@checked()
def agent_attention(
    q: Float[Tensor, "B H T D"],
    agents: Float[Tensor, "B H n D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    key_bias: Float[Tensor, "#B H n S"] | None = None,
    query_bias: Float[Tensor, "#B H T n"] | None = None,
    keep: Bool[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Two softmax attentions, through the agents. `keep` is True at real keys."""
    check_inputs(q, k, v)
    wide = torch.promote_types(v.dtype, torch.float32)
    query, agent = q.to(wide), agents.to(wide)
    key, value = (repeat_heads(z.to(wide), q.shape[1]) for z in (k, v))
    if keep is not None:
        key, value = (z.masked_fill(~keep[:, None, :, None], 0) for z in (key, value))
    scale = 1 / math.sqrt(q.shape[3])
    gather, give = scale * agent @ key.mT, scale * query @ agent.mT
    gather = gather if key_bias is None else gather + key_bias
    give = give if query_bias is None else give + query_bias
    # Under autocast products come out in half precision; the weights are normalised in the wide dtype all the same.
    gathered = softmax(gather.to(wide), None if keep is None else keep[:, None, None]) @ value
    return (give.to(wide).softmax(-1) @ gathered).to(v.dtype)


def pooling(
    rank: Int[Tensor, "B T"], count: Int[Tensor, "B 1"], cells: int, keep: Bool[Tensor, "B T"] | None = None
) -> Bool[Tensor, "B n T"]:
    """Adaptive pooling: of N tokens, cell i holds those of rank floor(i N / n) .. ceil((i + 1) N / n) - 1."""
    i, token, N = torch.arange(cells, device=rank.device)[:, None], rank[:, None], count[:, None]
    inside = (token >= i * N // cells) & (token < -(-(i + 1) * N // cells))
    return inside if keep is None else inside & keep[:, None]


def stretching(
    rank: Int[Tensor, "B T"], count: Int[Tensor, "B 1"], entries: int, dtype: torch.dtype
) -> Float[Tensor, "B n T"]:
    """The matrix of linear interpolation from n entries to N tokens: centres on centres, constant beyond the ends."""
    at = ((rank.to(dtype) + 0.5) * entries / count.clamp(min=1) - 0.5).clamp(0, entries - 1)
    return (1 - (at[:, None] - torch.arange(entries, device=rank.device)[:, None]).abs()).clamp(min=0)


@CARD.module
class AgentAttention(HeadMixer):
    """Bidirectional self-attention of a sequence, linear in its length.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        num_agents: n; 49 in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        num_agents: int = 49,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias)
        whole(self, num_agents=num_agents)
        self.num_agents = num_agents
        width = num_heads * self.head_dim
        self.key_table = nn.Parameter(torch.empty(num_heads, num_agents, TABLE))
        self.query_table = nn.Parameter(torch.empty(num_heads, num_agents, TABLE))
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.key_table, self.query_table):
            nn.init.trunc_normal_(table, std=0.02)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G T D"],
        v: Float[Tensor, "B G T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        if q.shape[2] == 0:
            return q
        wide = torch.promote_types(q.dtype, torch.float32)
        real = q.new_ones(1, q.shape[2], dtype=torch.bool) if keep is None else keep
        rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        cells = pooling(rank, count, self.num_agents, keep).to(wide)
        cells = cells / cells.sum(-1, keepdim=True).clamp(min=1)
        stretch = stretching(rank, count, TABLE, wide)[:, None]
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        if keep is not None:
            q, v = (z.masked_fill(~keep[:, None, :, None], 0) for z in (q, v))
        out = agent_attention(
            q,
            cells[:, None] @ q.to(wide),
            k,
            v,
            key_bias=self.key_table.to(wide) @ stretch,
            query_bias=(self.query_table.to(wide) @ stretch).mT,
            keep=keep,
        )
        local = self.conv(v.mT.flatten(1, 2)).unflatten(1, (self.num_heads, -1)).mT
        return out + local

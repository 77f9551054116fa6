"""DCMHA: heads exchange scores and weights, by low-rank maps and gates that each token makes."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, refuse, tokens, whole
from regard.stages import Mix, Rows

CARD = Card(
    "dcmha",
    equation="""Compose(S)[h,t,s] = S[h,t,s] (1 + g_q[t,h] + g_k[s,h])
    + sum_i w2_q[t,i,h] sum_m w1_q[t,i,m] S[m,t,s] + sum_i w2_k[s,i,h] sum_m w1_k[s,i,m] S[m,t,s]
for each side c of q (tokens of the queries) and k (tokens of the keys):
    [w1_c ; w2_c] = gelu(x dw1_c) qkw_c,   w1_c <- w1_c / rms over heads,   g_c = tanh(x dd_c)
sides = "queries" leaves out the terms with k, "keys" those with q;   with groups all this is of a group of heads alone
y = Compose_post(softmax(Compose_pre(q k^T / sqrt(D)))) v""",
    papers=(
        Paper(
            "Improving Transformers with Dynamically Composable Multi-Head Attention",
            "Xiao, Meng, Li, Yuan",
            2024,
            "2405.08553",
            "abstract; the authors' PyTorch and JAX code",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D + 16*B*H*T*S*rank + 8*B*(T+S)*H*(M + 2*rank*H)", "S*(2*G*D + M)"),
    claim="Matches models of 1.7 to 2 times the compute, at full size only. In small: heads are composed anew for "
    "every pair, by the query and by the key in ways of their own: "
    "tests/heads/test_dcmha.py::test_query_and_key_sides_differ.",
    differs=(
        "No static base projection; it is off in the authors' PyTorch code as well.",
        'Tokens behind keys stay in the cache with sides="queries", too, where nothing reads them.',
        "The part before and the part after the softmax own their weights separately instead of sharing tensors with "
        "four slices.",
    ),
    verified="third-party",
    tries={"hidden": 5, "groups": 3},
    defaults={"rank": "code", "hidden": "code", "sides": "paper", "groups": "code"},
)


Sides = Literal["both", "queries", "keys"]

OfTokens = tuple[Tensor, Tensor, Tensor]
"""What one side's tokens contribute, as `dynamic_weights` makes it."""


def dynamic_weights(
    x: Float[Tensor, "B N M"],
    dw1: Float[Tensor, "M GK"],
    qkw: Float[Tensor, "K 2I H"],
    dd: Float[Tensor, "M H"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B N I G h"], Float[Tensor, "B N I G h"], Float[Tensor, "B G h N"]]:
    """What one token contributes: the two factors of a low-rank map between a group's h heads, and a gate per head."""
    hidden = F.gelu(x @ dw1).unflatten(-1, (-1, len(qkw)))  # (B, N, G, K)
    groups = hidden.shape[2]
    w1, w2 = torch.einsum("bngk,kigh->bnigh", hidden, qkw.unflatten(-1, (groups, -1))).chunk(2, dim=2)
    w1 = w1 * torch.rsqrt(w1.square().mean(-1, keepdim=True) + eps)
    return w1, w2, torch.tanh(x @ dd).transpose(1, 2).unflatten(1, (groups, -1))


def compose(z: Float[Tensor, "B H t s"], of_queries: OfTokens | None, of_keys: OfTokens | None) -> Tensor:
    """Add the low-rank maps and gates of both sides, or of one; every branch reads the same z."""
    groups = next(side for side in (of_queries, of_keys) if side is not None)[2].shape[1]
    z = z.unflatten(1, (groups, -1))
    gate, maps = torch.ones_like(z[:1, :1, :1]), torch.zeros_like(z)
    if of_queries is not None:
        w1, w2, g = of_queries
        gate = gate + g[..., None]
        maps = maps + torch.einsum("btigh,bgits->bghts", w2, torch.einsum("btigm,bgmts->bgits", w1, z))
    if of_keys is not None:
        w1, w2, g = of_keys
        gate = gate + g[..., None, :]
        maps = maps + torch.einsum("bsigh,bgits->bghts", w2, torch.einsum("bsigm,bgmts->bgits", w1, z))
    return (z * gate + maps).flatten(1, 2)


class ComposeHeads(Mix):
    """One Compose, for scores or for weights. Slice 0 of each parameter belongs to queries, 1 to keys (if both count).

    Args:
        rank: of each token's map between heads.
        hidden: width of the layer that makes the maps, of each group; default 4 H / groups.
        sides: whose tokens compose: those of "both", of the "queries" alone, the cheaper form, or of the "keys" alone.
        groups: how many groups the heads fall into; only heads of one group exchange anything.
    """

    needs = frozenset({"tokens"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 2,
        hidden: int | None = None,
        sides: Sides = "both",
        groups: int = 1,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, rank=rank, groups=groups)
        divides(self, groups=groups, num_heads=num_heads)
        choice(self, get_args(Sides), sides=sides)
        hidden = 4 * num_heads // groups if hidden is None else hidden
        whole(self, hidden=hidden)
        self.dim, self.num_heads, self.sides, self.groups = dim, num_heads, sides, groups
        n = 2 if sides == "both" else 1
        self.dw1 = nn.Parameter(torch.empty(dim, n, groups * hidden))
        self.qkw = nn.Parameter(torch.empty(n, hidden, 2 * rank, num_heads))
        self.dd = nn.Parameter(torch.empty(dim, n, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' start, a group's as that of all heads: small enough that composing is near the identity."""
        hidden, heads = self.qkw.shape[1], self.num_heads // self.groups
        nn.init.normal_(self.dw1, std=math.sqrt(2 / (self.dim + hidden)))
        nn.init.normal_(self.qkw, std=0.02 / (math.sqrt(hidden) * (heads + self.qkw.shape[2] // 2)))
        nn.init.normal_(self.dd, std=0.05 * math.sqrt(2 / (heads + self.dim)))

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        if rows.x is None or rows.context is None:
            refuse(self, "rows", "holds no tokens", None, "those behind queries and keys, which regard.Attention knows")
        tokens(self, "rows.x", rows.x, self.dim)
        tokens(self, "rows.context", rows.context, self.dim)
        context, hidden = rows.context, None
        if rows.allowed is not None:  # what stands where no head may look must not reach the rest, not even as 0 * NaN
            hidden = ~rows.allowed.any(1, keepdim=True)
            context = context.masked_fill(hidden.all(2).squeeze(1)[..., None], 0)
            z = z.masked_fill(hidden, 0)
        dw1, qkw, dd = (p.to(z.dtype) for p in (self.dw1, self.qkw, self.dd))
        of_queries = of_keys = None
        if self.sides != "keys":
            of_queries = dynamic_weights(rows.x.to(z.dtype), dw1[:, 0], qkw[0], dd[:, 0])
        if self.sides != "queries":
            of_keys = dynamic_weights(context.to(z.dtype), dw1[:, -1], qkw[-1], dd[:, -1])
        mixed = compose(z, of_queries, of_keys)
        return mixed if hidden is None else mixed.masked_fill(hidden, 0)


@CARD.fills()
def dcmha(
    dim: int, num_heads: int, *, rank: int = 2, hidden: int | None = None, sides: Sides = "both", groups: int = 1
) -> dict[str, Mix]:
    """One Compose before the softmax and one after it.

    Args:
        rank, hidden, sides, groups: as of `ComposeHeads`, with the authors' defaults.
    """
    return {
        slot: ComposeHeads(dim, num_heads, rank=rank, hidden=hidden, sides=sides, groups=groups)
        for slot in ("score_mix", "weight_mix")
    }

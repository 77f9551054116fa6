"""DCMHA: heads exchange scores and weights, by low-rank maps and gates that each token makes."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import refuse, tokens, whole
from regard.stages import Mix, Rows

CARD = Card(
    "dcmha",
    equation="""Compose(S)[h,t,s] = S[h,t,s] (1 + g_q[t,h] + g_k[s,h])
    + sum_i w2_q[t,i,h] sum_m w1_q[t,i,m] S[m,t,s] + sum_i w2_k[s,i,h] sum_m w1_k[s,i,m] S[m,t,s]
for each side c of q (tokens of the queries) and k (tokens of the keys):
    [w1_c ; w2_c] = gelu(x dw1_c) qkw_c,   w1_c <- w1_c / rms over heads,   g_c = tanh(x dd_c)
y = Compose_post(softmax(Compose_pre(q k^T / sqrt(D)))) v""",
    papers=(
        Paper(
            "Improving Transformers with Dynamically Composable Multi-Head Attention",
            "Xiao, Meng, Li, Yuan",
            2024,
            "2405.08553",
            "abstract; the authors' PyTorch code",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D + 16*B*H*T*S*rank + 8*B*(T+S)*H*(M + 2*rank*H)", "S*(2*G*D + M)"),
    claim="Matches models of 1.7 to 2 times the compute, at full size only. In small: heads are composed anew for "
    "every pair, by the query and by the key in ways of their own: "
    "tests/heads/test_dcmha.py::test_query_and_key_sides_differ.",
    differs=(
        "No static base projection; it is off in the authors' PyTorch code as well.",
        "The part before and the part after the softmax own their weights separately instead of sharing tensors with "
        "four slices.",
    ),
    verified="reconstructed",
    tries={"hidden": 5},
    defaults={"rank": "code", "hidden": "code"},
)


def dynamic_weights(
    x: Float[Tensor, "B N M"],
    dw1: Float[Tensor, "M K"],
    qkw: Float[Tensor, "K 2I H"],
    dd: Float[Tensor, "M H"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B N I H"], Float[Tensor, "B N I H"], Float[Tensor, "B H N"]]:
    """What one token contributes: the two factors of a low-rank H x H map, and a gate per head."""
    w1, w2 = torch.einsum("bnk,kih->bnih", F.gelu(x @ dw1), qkw).chunk(2, dim=2)
    w1 = w1 * torch.rsqrt(w1.square().mean(-1, keepdim=True) + eps)
    return w1, w2, torch.tanh(x @ dd).transpose(1, 2)


def compose(z: Float[Tensor, "B H t s"], of_queries: tuple, of_keys: tuple) -> Float[Tensor, "B H t s"]:
    """Add both low-rank maps and both gates; every branch reads the same z."""
    (q1, q2, q_gate), (k1, k2, k_gate) = of_queries, of_keys
    by_query = torch.einsum("bith,bits->bhts", q2.transpose(1, 2), torch.einsum("btim,bmts->bits", q1, z))
    by_key = torch.einsum("bish,bits->bhts", k2.transpose(1, 2), torch.einsum("bsim,bmts->bits", k1, z))
    return z * (1 + q_gate[..., None] + k_gate[..., None, :]) + by_query + by_key


class ComposeHeads(Mix):
    """One Compose, for scores or for weights. Slice 0 of each parameter belongs to queries, 1 to keys.

    Args:
        rank: of each token's map between heads.
        hidden: width of the layer that makes the maps; default 4 H.
    """

    needs = frozenset({"tokens"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 2,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * num_heads if hidden is None else hidden
        whole(self, dim=dim, num_heads=num_heads, rank=rank, hidden=hidden)
        self.dim, self.num_heads = dim, num_heads
        self.dw1 = nn.Parameter(torch.empty(dim, 2, hidden))
        self.qkw = nn.Parameter(torch.empty(2, hidden, 2 * rank, num_heads))
        self.dd = nn.Parameter(torch.empty(dim, 2, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' start: small enough that composing is near the identity."""
        hidden, heads = self.qkw.shape[1], self.num_heads
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
        of_queries = dynamic_weights(rows.x.to(z.dtype), dw1[:, 0], qkw[0], dd[:, 0])
        of_keys = dynamic_weights(context.to(z.dtype), dw1[:, 1], qkw[1], dd[:, 1])
        mixed = compose(z, of_queries, of_keys)
        return mixed if hidden is None else mixed.masked_fill(hidden, 0)


@CARD.fills()
def dcmha(dim: int, num_heads: int, *, rank: int = 2, hidden: int | None = None) -> dict[str, Mix]:
    """One Compose before the softmax and one after it.

    Args:
        rank, hidden: as of `ComposeHeads`, with the authors' defaults.
    """
    slots = ("score_mix", "weight_mix")
    return {slot: ComposeHeads(dim, num_heads, rank=rank, hidden=hidden) for slot in slots}

"""Attention whose rank is free of its heads: each reads r features and hands on whole tokens.

Values are the keys' tokens themselves; V and O of a head are one M x M map, however small r is.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, whole
from regard.kernels.check import check_inputs
from regard.linear._shared import RecurrentMixer, widened
from regard.masks import Mask, causal, padding
from regard.pipeline.function import attention

PAPER = Paper(
    "On the Benefits of Rank in Attention Layers",
    "Amsel, Yehudai, Bruna",
    2024,
    "2407.16153",
    "abstract; summaries of the paper; the authors' code (task, models, theory_experiments)",
)

CARD = Card(
    "free_rank",
    equation="""s_ij^h = (Q_h y_i) . (K_h x_j) / sqrt(r),   A^h = softmax_j s^h, or 1 at the greatest, else 0 (hard)
out_i = sum_h sum_j A_ij^h VO_h^T x_j,   Q_h and K_h (r, M), VO_h (M, M),   H r may be more than M""",
    papers=(PAPER,),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "streaming", "compile"},
    traits={"position_free"},
    cost=Cost("B*H*T*S*(rank + M)", "S*(H*rank + M + 1)"),
    claim="One head of full rank names the nearest of any number of points, without error: "
    "tests/cross/test_free_rank.py::test_one_full_head_finds_the_nearest_of_any_number.",
    differs=(
        "Causal and streaming forms, masks and packed documents are ours; the paper's layer sees all keys.",
        "The widened encoder of the paper's experiments on depth is left out; `regard compare --task nearest_point` "
        "trains mechanisms in the library's own host.",
        "Hard attention forms all T x S scores, and of equal ones takes the first key.",
    ),
    verified="third-party",
    example={"rank": 3},
    tries={"rank": 2},
    tasks=("nearest_point",),
    defaults={"rank": "ours, full", "hard": "code, of its trained layers"},
)


class FreeRankState(NamedTuple):
    """The past: keys, tokens, and which are real."""

    k: Float[Tensor, "B H S r"]
    x: Float[Tensor, "B S M"]
    held: Bool[Tensor, "B S"]


@checked()
def low_rank_attention(
    queries: Float[Tensor, "B T M"],
    keys: Float[Tensor, "B S M"],
    Q: Float[Tensor, "H r M"],
    K: Float[Tensor, "H r M"],
    VO: Float[Tensor, "H M M"],
    *,
    hard: bool = False,
    mask: Mask | None = None,
) -> Float[Tensor, "B T M"]:
    """Attention with matrices for each head; `hard` has no gradient to Q, K and queries."""
    q, k = (torch.einsum("btm,hrm->bhtr", x, P) for x, P in ((queries, Q), (keys, K)))
    v = keys[:, None].expand(-1, len(Q), -1, -1)
    found = hard_attention(q, k, v, mask) if hard else attention(q, k, v, mask=mask)
    return torch.einsum("bhtd,hde->bte", found, VO)


def hard_attention(
    q: Float[Tensor, "B H T r"], k: Float[Tensor, "B H S r"], v: Float[Tensor, "B H S M"], mask: Mask | None = None
) -> Float[Tensor, "B H T M"]:
    """The value of the key with the greatest score, of equal ones the first; 0 for rows that see none."""
    check_inputs(q, k, v)
    B, H, T, _ = q.shape
    S = k.shape[2]
    if not S:
        return v.new_zeros(B, H, T, v.shape[-1])
    scores, sees = q @ k.mT, None
    if mask is not None:
        sees = mask.to(q.device).dense(T, S)
        scores = scores.masked_fill(~sees, -torch.inf)
    found = v.gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, v.shape[-1]))
    return found if sees is None else found.masked_fill(~sees.any(-1, keepdim=True), 0)


@CARD.module
class FreeRankAttention(RecurrentMixer):
    """`low_rank_attention` as a layer; Q, K and VO are its q_proj, k_proj and o_proj, heads side by side.

    Args:
        dim, num_heads, causal: as in `regard.Attention`.
        rank: r, of each head's scores, whatever the number of heads; default dim.
        hard: a query reads the one key with the greatest score. Queries and keys don't learn then.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M).
    """

    def __init__(
        self, dim: int, num_heads: int, *, rank: int | None = None, hard: bool = False, causal: bool = False
    ) -> None:
        whole(self, dim=dim, num_heads=num_heads)
        rank = dim if rank is None else rank
        whole(self, rank=rank)
        flag(self, hard=hard)
        super().__init__(dim, num_heads, head_dim=rank, causal=causal)
        self.rank, self.hard = rank, hard
        del self.v_proj
        self.o_proj = nn.Linear(num_heads * dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors': Glorot uniform, by the sizes of one head for Q and K, of all for VO."""
        bound = (6 / (self.rank + self.dim)) ** 0.5
        for proj in (self.q_proj, self.k_proj):
            nn.init.uniform_(proj.weight, -bound, bound)
        nn.init.xavier_uniform_(self.o_proj.weight)

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S M"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj(x), self.k_proj(source)))
        return q, k, source.to(q.dtype)[:, None].expand(-1, self.num_heads, -1, -1)

    def run(
        self,
        q: Float[Tensor, "B H T r"],
        k: Float[Tensor, "B H S r"],
        v: Float[Tensor, "B H S M"],
        keep: Bool[Tensor, "B S"] | None,
        state: FreeRankState | None,
    ) -> tuple[Float[Tensor, "B H T M"], FreeRankState]:
        sees: Mask | None = causal() if self.causal else None
        plain = keep is None and state is None
        keep = k.new_ones(len(k), k.shape[2], dtype=torch.bool) if keep is None else keep
        x = v[:, 0]
        if state is not None:
            (q,) = widened(q)
            k, x = torch.cat([state.k, k.to(state.k.dtype)], 2), torch.cat([state.x, x.to(state.x.dtype)], 1)
            keep = torch.cat([state.held, keep], 1)
            q, k, v = q.to(k.dtype), k, x[:, None].expand(-1, self.num_heads, -1, -1)
        if not plain:
            sees = padding(keep) if sees is None else padding(keep) & sees
        out = hard_attention(q, k, v, sees) if self.hard else attention(q, k, v, mask=sees)
        return out, FreeRankState(k, x, keep)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> FreeRankState:
        k = torch.zeros(batch_size, self.num_heads, 0, self.rank, device=device, dtype=dtype)
        x = torch.zeros(batch_size, 0, self.dim, device=device, dtype=dtype)
        return FreeRankState(k, x, x[..., 0].bool())

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, rank={self.rank}, hard={self.hard}, causal={self.causal}"

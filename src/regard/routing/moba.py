"""MoBA: each query attends to its own block and to the past blocks whose mean key fits it best.

Blocks are absolute and only whole past ones compete, so a token streams to exactly what the full pass gives. The own
block is always taken and counts among the K; the choice has no gradient.

Each query chooses alone, so the layout has blocks of 1 query x P keys. The block-sparse kernel works on 128 queries at
a time and visits the union of their blocks: what neighbours agree on is what it saves. `regard.routing.kept` reports
both the pairs kept and the blocks visited. Scoring costs T S / P dot products.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import whole
from regard.kernels.blocks import among, in_blocks
from regard.kernels.problem import dots
from regard.masks import Mask, causal
from regard.masks.selection import Chosen
from regard.routing._shared import hides_keys_only, real_keys
from regard.stages import Selector
from regard.tracing import exporting

CARD = Card(
    "moba",
    equation="""block i = keys i P .. (i + 1) P - 1,   own block c(t) = floor(t / P),   P = block
kbar_i = mean of k_j over block i
s[t, i] = q_t . kbar_i  for i < c(t),   +inf for i = c(t),   -inf for i > c(t)
A_t = the K largest of s[t, :],   K = topk
out_t = softmax over { j <= t : floor(j / P) in A_t } of q_t . k_j / sqrt(D)""",
    papers=(
        Paper(
            "MoBA: Mixture of Block Attention for Long-Context LLMs",
            "Lu et al.",
            2025,
            "2502.13189",
            "section 2.2, eqs. 2-6; the authors' code",
        ),
    ),
    supports={"causal", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*T*D*(S/block + min(S, (2*topk - 1)*block))", "2*S*G*D"),
    claim="A query reads its own block and the most similar others, few where neighbours agree, and keeps most of the "
    "attention: tests/routing/test_moba.py::test_the_own_block_counts_among_the_chosen, "
    "tests/routing/test_moba.py::test_runs_on_the_block_sparse_kernel_and_says_what_it_keeps.",
    differs=(
        "S need not be a multiple of P: the last block may be short, as in the authors' code.",
        "Keys that a mask hides from a query count in no mean, and a block of hidden keys alone is never chosen. Where "
        "the mask hides more than the future and padding, means differ from query to query, and scoring costs as much "
        "as plain attention's scores.",
        "Decoding is routed like the full pass; the released code decodes with full attention.",
    ),
    verified="third-party",
    example={"block": 3, "topk": 2},
    tasks=("mqar(block=8)",),
    defaults={"block": "paper, at 8K tokens", "topk": "paper, at 8K tokens"},
)


PAIRS = 2**24
"""Scores formed together where the mask makes means differ from query to query."""


def moba(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    block: int = 512,
    topk: int = 3,
    mask: Mask | None = None,
) -> Mask:
    """The pairs that MoBA keeps: causal, the own block and the best topk - 1 past ones of every query."""
    T, S = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return causal()
    if not exporting():  # one block of all keys, however long it is said to be; kernels like multiples of 32
        block = min(block, -(-S // 32) * 32)
    scores = block_scores(q, k, block=block, mask=mask)
    own = torch.arange(S - T, S, device=q.device)[:, None].div(block, rounding_mode="floor")
    column = torch.arange(scores.shape[3], device=q.device)
    scores = scores.masked_fill(column > own, -math.inf).masked_fill(column == own, math.inf)
    # Not `>`: a block that holds NaN is taken, so that the NaN stays to be seen.
    tiles = among(scores, topk) & (scores != -math.inf)
    kept = Chosen(tiles, T, S, (1, block))
    return kept if mask is not None and mask.is_causal else causal() & kept


def block_scores(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], *, block: int, mask: Mask | None = None
) -> Float[Tensor, "B H T n"]:
    """q_t . (mean of the keys of block i that the query may see), in at least fp32; -inf where it may see none."""
    T, S = q.shape[2], k.shape[2]
    if hides_keys_only(mask):
        keys, real = k.to(torch.promote_types(k.dtype, torch.float32)), real_keys(mask, S, k.device)
        if real is None:
            real = torch.ones(1, 1, S, dtype=torch.bool, device=k.device)
        total = in_blocks(keys.masked_fill(~real[..., None], 0.0), block, 2).sum(3)
        count = in_blocks(real, block, 2).sum(3)
        means = total / count.clamp(min=1)[..., None]
        return dots(q, means).masked_fill(count[:, :, None] == 0, -math.inf)
    assert mask is not None
    i, j = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    scores = []
    at, step = torch.arange(T, device=q.device), max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * S))
    for rows in [at] if exporting() else at.split(step):
        allowed = mask.at(i[rows], j)
        pairs = dots(q[:, :, rows], k).masked_fill(~allowed, 0.0)
        total, count = (in_blocks(z, block, 3).sum(4) for z in (pairs, allowed))
        scores.append((total / count.clamp(min=1)).masked_fill(count == 0, -math.inf))
    return torch.cat(scores, 2)


@CARD.fills("selector")
class MoBA(Selector):
    """Blocks of `block` keys, of which each query sees `topk`, its own among them. No parameters.

    Args:
        block: P; the paper's 512 is for 8192 tokens, and it has 2048 for 32768.
        topk: K, 3 in both.
    """

    def __init__(self, *, block: int = 512, topk: int = 3) -> None:
        super().__init__()
        whole(self, block=block, topk=topk)
        self.block, self.topk = block, topk

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        return moba(q, k, block=self.block, topk=self.topk, mask=mask)

    def extra_repr(self) -> str:
        return f"block={self.block}, topk={self.topk}"

"""Rank against heads: how near random heads of each rank come to naming the nearest point.

Heads are hard and random; how much each says is fitted to half of the points, and the error is that on the other half.
No training by gradients is needed, so that ranks and numbers of heads are compared in seconds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost
from regard.checks import checked, flag, number, refuse, whole
from regard.cross.free_rank import PAPER, hard_attention
from regard.cross.nearest import frames, nearest

CARD = Card(
    "rank_sweep",
    equation="""f_h(y) = the x_j with the greatest (Q_h y) . (K_h x_j),   Q_h, K_h (r, M) random orthonormal rows
y^ = sum_h a_h f_h(y),   a = argmin sum |y^ - nearest(y)|^2 + ridge N |a|^2 over N queries
error = mean over other queries of |y^ - nearest(y)|^2, which is 1 for the answer 0""",
    papers=(PAPER,),
    protocol="Analysis",
    supports=set(),
    cost=Cost("H*B*T*S*M + H**2*B*T*M", ""),
    claim="Rank-one heads come near the target only slowly, the more slowly the higher the dimension, where one head "
    "of full rank has no error: tests/inspect/analyses/test_rank_sweep.py::test_rank_can_not_be_made_up_for_by_heads.",
    differs=(
        "Heads' weights are fitted to the points that are given, whatever their number; the authors solve for them "
        "from expectations for two points, as `regard.cross.nearest.best_say` does in the plane. The expectation in "
        "higher dimensions, a series of Gegenbauer polynomials, is left out.",
        "Their trained sweeps over ranks, of a thousand epochs, are not repeated.",
    ),
    verified="reconstructed",
)


@CARD.function
@checked()
def rank_sweep(
    queries: Float[Tensor, "B T M"],
    keys: Float[Tensor, "B S M"],
    *,
    ranks: Sequence[int],
    heads: Sequence[int],
    tied: bool = False,
    ridge: float = 1e-3,
    seed: int = 0,
) -> Float[Tensor, "R N"]:
    """The error for each rank (rows) and number of heads (columns).

    Args:
        queries, keys: points, on the unit sphere where errors should be shares of the trivial answer's;
            `regard.cross.nearest.draw` makes some. The first half of the batch is fitted to.
        ranks: r, each at most M.
        heads: H; fewer are the first of more.
        tied: K_h = Q_h, as in a vote of majority; else both are drawn.
        ridge: what keeps weights small.
        seed: of the heads.

    Raises:
        ValueError: fewer than two sets of points, a rank above M, nothing to sweep.
    """
    B, _, M = queries.shape
    if B < 2:
        refuse("rank_sweep", "queries", "have no half to be fitted to", f"a batch of {B}", "2 sets of points or more")
    for name, numbers in (("ranks", ranks), ("heads", heads)):
        if not len(numbers):
            refuse("rank_sweep", name, "are empty", numbers, "one number at least")
    for rank in ranks:
        whole("rank_sweep", most=M, ranks=rank)
    for count in heads:
        whole("rank_sweep", heads=count)
    flag("rank_sweep", tied=tied)
    number("rank_sweep", above=0, ridge=ridge)
    generator = torch.Generator().manual_seed(seed)
    target = nearest(queries, keys)
    return torch.stack([_errors(queries, keys, target, r, heads, tied, ridge, generator) for r in ranks])


def _errors(
    queries: Tensor,
    keys: Tensor,
    target: Tensor,
    rank: int,
    heads: Sequence[int],
    tied: bool,
    ridge: float,
    generator: torch.Generator,
) -> Float[Tensor, " N"]:
    most = max(heads)
    Q = frames(most, rank, queries.shape[-1], generator=generator).to(queries)
    K = Q if tied else frames(most, rank, queries.shape[-1], generator=generator).to(queries)
    picked = torch.stack([_pick(queries, keys, q, k) for q, k in zip(Q, K, strict=True)])
    half = len(queries) // 2
    fit, test = picked[:, :half].flatten(1), picked[:, half:]
    overlap, success = fit @ fit.mT, fit @ target[:half].flatten()
    penalty = ridge * half * queries.shape[1] * torch.eye(most).to(overlap)
    errors = []
    for count in heads:
        say = torch.linalg.solve((overlap + penalty)[:count, :count], success[:count])
        answer = torch.einsum("h,hbtm->btm", say, test[:count])
        errors.append((answer - target[half:]).square().sum(-1).mean())
    return torch.stack(errors)


def _pick(
    queries: Float[Tensor, "B T M"], keys: Float[Tensor, "B S M"], q: Float[Tensor, "r M"], k: Float[Tensor, "r M"]
) -> Float[Tensor, "B T M"]:
    return hard_attention((queries @ q.mT)[:, None], (keys @ k.mT)[:, None], keys[:, None])[:, 0]

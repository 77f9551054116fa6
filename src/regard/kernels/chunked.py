"""Memory-efficient attention: exact, in memory linear in T, by chunks with a running softmax."""

from torch import Tensor

from regard.cards import PLAIN, Card, Paper
from regard.kernels import cost as costs
from regard.kernels import sdpa
from regard.kernels.online import KEYS, QUERIES, online, reads
from regard.kernels.problem import (
    Problem,
    attend,
    by_rows,
    chunk_rows,
    key_range,
    softmaxed,
    uncapped,
    without_pairs,
)
from regard.tracing import exporting

CARD = Card(
    "memory_efficient",
    equation="""for each query chunk:    m, n, d = -inf, 0, 0                  (maximum, numerator, denominator)
    for each key chunk:  s = q k^T + bias;   m' = max(m, max_j s);   c = exp(m - m')
                         n = c n + exp(s - m') v;   d = c d + sum_j exp(s - m');   m = m'
    out = n / d""",
    papers=(
        Paper(
            "Self-attention Does Not Need O(n^2) Memory",
            "Rabe, Staats",
            2021,
            "2112.05682",
            "sections 2-4, figure 1",
        ),
    ),
    traits=PLAIN,
    claim="Never holds more than a tile of the score matrix: "
    "tests/kernels/test_chunked.py::test_no_more_than_a_tile_of_scores_at_once.",
    differs=(
        "Backward recomputes each tile from the kept log-sum-exp instead of checkpointing the forward.",
        "Key chunks that no query of a chunk may see are skipped.",
        "Stages that need whole rows (entmax, CoPE, convolutions over scores) or see the weights run too, checkpointed "
        "by query chunks and without key chunks.",
    ),
)

TILE_BYTES = 16 * 2**20
"""Scores formed at once stay within this: in or near the cache, far below a T x S array."""


def why_not(p: Problem) -> list[str]:
    """It runs every stage."""
    return []


def run(p: Problem) -> Tensor:
    """(B, H, T, V)."""
    B, H, _, T, S = p.shape
    if exporting():  # chunks would tie the graph to one length: torch's fused kernel has some of its own
        return attend(p, slice(0, T), slice(0, S)) if sdpa.why_not(p) else sdpa.run(p)
    if T == 0 or S == 0:
        return attend(p, slice(0, T), slice(0, S))
    if _tiles_alone(p) and p.readable and (read := reads(p)) is not None:
        return online(p, *_tile(p), read)
    return by_rows(p, lambda rows: attend(p, rows, key_range(p, rows)), TILE_BYTES // (4 * B * H * S))


def cost(p: Problem) -> costs.Cost:
    """The tiles, or the chunks of query rows, that the mask's bounds leave, and several passes over their scores."""
    B, H, _, T, S = p.shape
    if _tiles_alone(p):
        rows, keys = _tile(p)
        pairs = costs.reached(p, rows, keys)
        tile = 40 if p.position_bias is None and p.bias is None else 65
        calls = 30 + tile * pairs / (rows * keys) + 60 * -(-T // rows)
    else:
        rows = chunk_rows(T, TILE_BYTES // max(1, 4 * B * H * S))
        pairs = costs.reached(p, rows)
        calls = 55.0 * -(-T // rows)
    traffic = B * H * pairs * costs.passed(p)
    return costs.Cost(
        costs.products(p, pairs), traffic, calls, "scores formed a chunk at a time", costs.checked(p), "unfused"
    )


def _tile(p: Problem) -> tuple[int, int]:
    """Queries and keys of a tile."""
    B, H, _, _, S = p.shape
    keys = max(1, min(S, KEYS))
    return max(16, min(TILE_BYTES // max(1, 4 * B * H * keys), QUERIES)), keys


def _tiles_alone(p: Problem) -> bool:
    """Whether any tile can be computed by itself: softmax, scaled by rows at most, of scores with terms, a cap, and
    what is done to single pairs."""
    bias = p.position_bias
    reads = bias is not None and (bias.sees == "rows" or bool(bias.needs) or bias.prepares())
    plain = softmaxed(uncapped(without_pairs(p)))
    only_adds = all(stage is bias for stage in plain.stages) and p.position_values is None
    return only_adds and not reads and p.dropout == 0


@CARD.fills("kernel")
def memory_efficient() -> str:
    """This file's name among the kernels; every slot stays empty."""
    return "chunked"

"""FlexPrefill: each head keeps what holds a share gamma, in a pattern told from its last queries.

Where pooled queries and keys foretell how the last queries attend (by the Jensen-Shannon distance), a head keeps the
best blocks of the pooled map; else it keeps vertical lines (blocks of keys that all see) and slashes (distances in
blocks at which all look). Training-free: put it into a layer that was trained with full attention, for prefill.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, whole
from regard.kernels.blocks import in_blocks
from regard.kernels.problem import dots
from regard.masks import Mask, causal
from regard.masks.selection import Chosen
from regard.routing._shared import block_means, ends, hides_keys_only, real_keys, softmax
from regard.stages import Selector
from regard.tracing import exporting

TOGETHER = "the last queries choose for all, and a block of queries together: later queries can change the choice"

CARD = Card(
    "flex_prefill",
    equation="""n blocks of b = block tokens;   P = softmax of the last b queries, causal
v_s = mean over the rows of P;   u_d = 1/b sum of P over the pairs at distance d
budgets: of v and u, how many of the largest stay within gamma, + 1, in blocks: floor(. / b) + 1, in [min, max]
est = softmax_J of mean(q_last) . mean(k_J) / sqrt(D);   V_J = sum of v over block J
query-aware  iff  sqrt(JS(est, V)) < tau
kept always: the best blocks of V, for all later rows; the best sums of b distances of u, as diagonals of blocks;
  block 0 and the diagonal among them;   query-aware heads: of both no more than min, and besides
  of A[I, J] = softmax_(J <= I) of mean(q_I) . mean(k_J) / sqrt(D) the largest, while their sum is <= gamma n""",
    papers=(
        Paper(
            "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
            "Lai et al.",
            2025,
            "2502.20766",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "dropout", "compile"},
    lacks={"streaming": "it is for prefill: a later query would choose anew for all before it"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*D*(T*S + block*S + T*S/block**2)", ""),
    claim="A head of a sink and near keys is told from one that looks for topics, and each keeps about gamma of its "
    "attention at a density well below 1: tests/routing/test_flex_prefill.py::test_tells_heads_apart.",
    differs=(
        "Budgets count tokens by `block`, where the code has the number 128, which is its block.",
        "Query-aware heads keep what stays just below gamma of the pooled map, as the code does, so that gamma is "
        "reached about, never surely.",
        "Where T < S, the queries are the last of the keys' tokens, and their blocks stand on key blocks.",
        "The last queries, and n, are those of each row's real tokens; keys that padding hides do not count, nor do "
        "their own queries. The code takes one row.",
        "A block without any weight leaves the distance a number, where the code's is NaN.",
    ),
    verified="third-party",
    example={"block": 2, "gamma": 0.6, "tau": 0.4},
    tries={"min_budget": {"min_budget": 4, "block": 1}},
    exceptions={"L4": TOGETHER, "L6": TOGETHER},
    defaults={"gamma": "code, its experiments", **dict.fromkeys(("tau", "block", "min_budget", "max_budget"), "code")},
)


class Found(NamedTuple):
    """What each head keeps, and as what it was taken."""

    tiles: Bool[Tensor, "B H nq nk"]
    """Causal blocks; query block I stands on key block I + nk - nq."""
    aware: Bool[Tensor, "B H"]
    distance: Float[Tensor, "B H"]
    """The root of the Jensen-Shannon divergence, natural logarithm."""


def flex_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    gamma: float = 0.95,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int | None = None,
    max_budget: int | None = None,
    unit: int | None = None,
    real: Bool[Tensor, "#B 1 S"] | None = None,
) -> Found:
    """The blocks that FlexPrefill keeps of the last T of S tokens.

    Args:
        min_budget, max_budget: as of `FlexPrefill`.
        unit: tokens that make a block of the budgets; None: `block`.
        real: True = a real key; None = all are.
    """
    (_, _, T, D), S = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if gamma == 1:
        gamma = 2.0  # all is kept, also where shares that are rounded add up to more than 1
    key = torch.ones(1, 1, S, dtype=torch.bool, device=q.device) if real is None else real
    query = key[:, :, S - T :]
    q, k = q.to(wide).masked_fill(~query[..., None], 0.0), k.to(wide).masked_fill(~key[..., None], 0.0)
    end = ends(key)  # (B, 1): where the row's tokens end
    n = (end + block - 1) // block
    low = 1 if min_budget is None else -(-min_budget // block)
    high = n if max_budget is None else n.clamp(max=-(-max_budget // block))

    # The last queries: how they attend, and their mean.
    rows = min(block, T)
    at = end[..., None] - rows + torch.arange(rows, device=q.device)
    place = (at - (S - T)).clamp(min=0)
    counts = (at >= S - T) & query.expand(place.shape[0], -1, -1).gather(2, place)
    last = q.gather(2, place[..., None].expand(q.shape[0], q.shape[1], -1, D)).masked_fill(~counts[..., None], 0.0)
    many = counts.sum(2).clamp(min=1)
    token = torch.arange(S, device=q.device)
    P = softmax(dots(last, k) / math.sqrt(D), key[:, :, None] & (token <= at[..., None]) & counts[..., None])
    P = P / many[..., None, None]
    vertical, slash = P.sum(2), _slashes(P)

    inside = token < end[..., None]
    budgets = [
        torch.minimum(
            _enough(line, inside, gamma).div(unit or block, rounding_mode="floor").add(1).clamp(min=low), high
        )
        for line in (vertical, slash)
    ]
    column = torch.arange(in_blocks(token, block, 0).shape[0], device=q.device)
    V, Sl = (in_blocks(line, block, 2).sum(3) for line in (vertical, slash))

    # Whether means foretell how they attend.
    means, some = block_means(k, key, block)
    here = some & (column < n[..., None])
    est = softmax(dots(last.sum(2, keepdim=True) / many[..., None, None], means)[:, :, 0] / math.sqrt(D), here)
    middle = ((est + V) / 2).clamp(min=torch.finfo(wide).tiny)
    JS = (torch.xlogy(est, est / middle) + torch.xlogy(V, V / middle)).sum(2) / 2
    distance = JS.clamp(min=0).sqrt()
    dense = end <= max(2 * block, low * block)
    aware = (distance < tau) & ~dense
    dense = dense | distance.isnan()  # where nothing is known, all is kept, so that the NaN stays to be seen
    budgets = [torch.where(aware, low, budget) for budget in budgets]

    front = (S - T) % block
    means_q, asked = block_means(F.pad(q, (0, 0, front, 0)), F.pad(query, (front, 0)), block)
    own = torch.arange(means_q.shape[2], device=q.device)[:, None] + (S - T - front) // block
    past = (column <= own) & (own < n[..., None, None])
    # Vertical lines, and chunks of the slash vector, of which the last is the diagonal.
    lines = _best(V.masked_fill(column == 0, math.inf).masked_fill(column >= n[..., None], -math.inf), budgets[0])
    final = n[..., None] - 1
    chunks = _best(Sl.masked_fill(column == final, math.inf).masked_fill(column > final, -math.inf), budgets[1])
    chunk = (final[..., None] - (own - column)).clamp(0, column.shape[0] - 1)
    chunk = chunk.expand(*chunks.shape[:2], -1, -1)
    tiles = lines[:, :, None] | chunks.gather(2, chunk.flatten(2)).view(chunk.shape)
    # The pooled map of query-aware heads, cut once for all of its rows.
    seen = past & some[:, :, None] & asked[..., None]
    A = softmax(dots(means_q, means) / math.sqrt(D), seen).flatten(2)
    order = A.argsort(stable=True, dim=2, descending=True)
    within = A.gather(2, order).cumsum(2) <= gamma * seen.any(3).sum(2, keepdim=True)
    pooled = torch.zeros_like(within).scatter(2, order, within).view(tiles.shape) & seen
    return Found((tiles | pooled & aware[..., None, None] | dense[..., None, None]) & past, aware, distance)


def flex_prefill(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    gamma: float = 0.95,
    tau: float = 0.1,
    block: int = 128,
    min_budget: int | None = None,
    max_budget: int | None = None,
    mask: Mask | None = None,
) -> Mask:
    """The pairs that FlexPrefill keeps: causal; the options are those of `FlexPrefill`.

    Raises:
        ValueError: if the mask is more than causality and padding, or there are more queries than keys.
    """
    if not hides_keys_only(mask):
        refuse("flex_prefill", "mask", "hides more than keys", repr(mask), "causality and padding alone")
    T, S = q.shape[2], k.shape[2]
    if T > S:
        refuse("flex_prefill", "q", "has more tokens than k", T, f"at most {S}, the last of the keys' own")
    least = max(2, 0 if min_budget is None else -(-min_budget // block)) * block
    if q.numel() == 0 or k.numel() == 0 or (not exporting() and least >= S):  # so few see all
        return causal()
    real = real_keys(mask, S, k.device)
    found = flex_blocks(
        q, k, gamma=gamma, tau=tau, block=block, min_budget=min_budget, max_budget=max_budget, real=real
    )
    kept = Chosen(found.tiles, T + (S - T) % block, S, (block, block))
    return kept if mask is not None and mask.is_causal else causal() & kept


def _slashes(P: Float[Tensor, "B H r S"]) -> Float[Tensor, "B H S"]:
    """Sums along diagonals: [S' - 1 - d] holds those at distance d, S' being where the last row stands, plus 1."""
    rows, S = P.shape[2:]
    skewed = F.pad(P.flip(2), (0, rows)).flatten(2)[..., : rows * (S + rows - 1)]  # each row one further to the right
    return skewed.unflatten(2, (rows, S + rows - 1)).sum(2)[..., :S]


def _enough(line: Float[Tensor, "B H S"], inside: Bool[Tensor, "b 1 S"], gamma: float) -> Int[Tensor, "B H"]:
    """How many of the largest numbers stay within gamma together, and one more."""
    return ((line.sort(descending=True).values.cumsum(2) <= gamma) & inside).sum(2) + 1


def _best(z: Float[Tensor, "B H n"], count: Int[Tensor, "B H"]) -> Bool[Tensor, "B H n"]:
    """Which are among the `count` largest; the first among equals."""
    order = z.argsort(stable=True, dim=2, descending=True)
    taken = torch.arange(z.shape[2], device=z.device) < count[..., None]
    return torch.zeros_like(z, dtype=torch.bool).scatter(2, order, taken.expand(z.shape)) & (z != -math.inf)


@CARD.fills("selector")
class FlexPrefill(Selector):
    """Lines and diagonals of blocks, or the best of a pooled map: each head as its last queries tell. No parameters.

    Args:
        gamma: the share of attention to keep, of the last queries' or of the pooled map.
        tau: how near the pooled estimate must come for a head to be query-aware; 0: none is.
        block: b, queries and keys in a block; up to 2 b tokens see all.
        min_budget, max_budget: tokens that vertical lines, and slashes, keep at least and at most. The authors' runs
            have a least of 1024, and up to so many tokens see all. None: one block, and all.
    """

    streams = False

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        tau: float = 0.1,
        block: int = 128,
        min_budget: int | None = None,
        max_budget: int | None = None,
    ) -> None:
        super().__init__()
        number(self, above=0, most=1, gamma=gamma)
        number(self, least=0, tau=tau)
        given = {"min_budget": min_budget, "max_budget": max_budget}
        whole(self, block=block, **{name: value for name, value in given.items() if value is not None})
        if min_budget is not None and max_budget is not None and max_budget < min_budget:
            refuse(self, "max_budget", "is below min_budget", max_budget, f"at least {min_budget}")
        self.options: dict[str, Any] = {"gamma": gamma, "tau": tau, "block": block, **given}

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        return flex_prefill(q, k, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

"""XAttention: sums along antidiagonals of the scores judge blocks; the fewest that suffice stay.

Every query and every key enters once per s x s tile, for 1/s of the price of the scores. Training-free: put it into a
layer that was trained with full attention, for prefill. A block of queries chooses together, so that it does not
stream; but no value of a later query of the block reaches an earlier one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import divides, number, refuse, whole
from regard.kernels.blocks import in_blocks
from regard.kernels.problem import dots
from regard.masks import Mask, full
from regard.masks.selection import Chosen
from regard.routing._shared import hides_keys_only, real_keys
from regard.stages import Selector
from regard.tracing import exporting

TOGETHER = "a block of queries chooses its keys together, so later queries of the block can change the choice"

CARD = Card(
    "xattention",
    equation="""L[m, n] = sum_u q[m s + s-1-u] . k[n s + u] / (sqrt(D) s),   groups of s = stride queries
    and s keys, u = 0 .. s-1
A = softmax over n of L;   R[I, J] = sum of A over the groups of query block I and key block J
kept: key block 0, the diagonal block, then by falling R until their sum is at least tau = threshold of row I's""",
    papers=(
        Paper(
            "XAttention: Block Sparse Attention with Antidiagonal Scoring",
            "Xu et al.",
            2025,
            "2503.16428",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "dropout", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*T*S*D*(1/stride + 2)", ""),
    claim="Keeps most of the attention in few blocks, without training: every block that holds a strong key is kept "
    "at under half of the density: tests/routing/test_xattention.py::test_finds_strong_keys_at_low_density.",
    differs=(
        "Query blocks stand on key blocks also where T and S differ by no multiple of the block.",
        "The rule above also holds for the first chunk of queries, where the code keeps one rank more, and for every "
        "batch row by itself.",
        "Without causality no block is forced, where the code always keeps key block 0.",
        "Keys that padding hides do not count, nor do their own queries.",
    ),
    verified="third-party",
    example={"block": 4, "stride": 2, "threshold": 0.6},
    exceptions={"L4": TOGETHER, "L6": TOGETHER},
    defaults={"block": "code", "stride": "code", "threshold": "ours, within the authors' 0.8 to 0.95"},
)


PAIRS = 2**24
"""Pairs of groups scored together."""


class Judged(NamedTuple):
    """Query block I stands on key block I + offset; the first `front` of its places hold no query."""

    mass: Float[Tensor, "B H nq nk"]
    front: int
    offset: int


def antidiagonal_mass(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    block: int,
    stride: int,
    causal: bool,
    real: Bool[Tensor, "#B #G S"] | None = None,
) -> Judged:
    """R: the attention that each block of queries is estimated to spend on each block of keys.

    A row sums to the number of query groups in it that count. `real`, True = a real key; where queries and keys are
    the same tokens (they are taken to be when causal, or as many), its queries count only where their keys are real.
    """
    (_, _, T, D), S = q.shape, k.shape[2]
    front = (S - T) % block if causal else 0
    offset = (S - T - front) // block if causal else 0
    q, k = q.to(torch.promote_types(q.dtype, torch.float32)), k.to(torch.promote_types(k.dtype, torch.float32))
    query = torch.ones(1, 1, T, dtype=torch.bool, device=q.device)
    key = torch.ones(1, 1, S, dtype=torch.bool, device=q.device) if real is None else real
    if real is not None and (causal or T == S):
        query = F.pad(real[..., max(0, S - T) :], (max(0, T - S), 0), value=True)
    q, k = q.masked_fill(~query[..., None], 0.0), k.masked_fill(~key[..., None], 0.0)
    per = block // stride

    def grouped(z: Tensor) -> Tensor:
        return in_blocks(z, block, 2).unflatten(3, (per, stride)).flatten(2, 3)

    query, key = grouped(F.pad(query, (front, 0))).any(3), grouped(key).any(3)
    # One dot product of width stride * D per pair of groups: the queries of a group are turned round.
    turned, groups = grouped(F.pad(q, (0, 0, front, 0))).flip(3).flatten(3), grouped(k).flatten(3)
    column = torch.arange(groups.shape[2], device=q.device)
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * groups.shape[2] * per)) * per
    masses, at = [], torch.arange(turned.shape[2], device=q.device)
    for rows in [at] if exporting() else at.split(step):
        allowed = key[:, :, None]
        if causal:
            allowed = allowed & (column <= rows[:, None] + offset * per)
        logits = dots(turned[:, :, rows], groups) / (math.sqrt(D) * stride)
        counts = allowed.any(-1, keepdim=True) & query[:, :, rows, None]
        weights = logits.masked_fill(~allowed & counts, -math.inf).softmax(-1).masked_fill(~(allowed & counts), 0.0)
        masses.append(weights.unflatten(3, (-1, per)).sum(4).unflatten(2, (-1, per)).sum(3))
    return Judged(torch.cat(masses, 2), front, offset)


def xattention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    block: int = 128,
    stride: int = 16,
    threshold: float | tuple[float, ...] = 0.9,
    mask: Mask | None = None,
) -> Mask:
    """The blocks that XAttention keeps; `threshold` is tau, for all heads or for each."""
    if not hides_keys_only(mask):
        refuse("xattention", "mask", "hides more than keys", repr(mask), "causality and padding alone")
    T, S, causal = q.shape[2], k.shape[2], mask is not None and mask.is_causal
    if q.numel() == 0 or k.numel() == 0 or (not exporting() and block >= S):  # a single block of keys stays
        return full()
    R, front, offset = antidiagonal_mass(
        q, k, block=block, stride=stride, causal=causal, real=real_keys(mask, S, k.device)
    )
    column = torch.arange(R.shape[3], device=R.device)
    past = forced = torch.zeros(R.shape[2:], dtype=torch.bool, device=R.device)
    if causal:
        own = torch.arange(R.shape[2], device=R.device)[:, None] + offset
        past, forced = column <= own, (column == 0) | (column == own)
    tau = torch.as_tensor(threshold, dtype=R.dtype, device=R.device).reshape(-1, 1, 1)
    order = R.masked_fill(forced, math.inf).argsort(stable=True, dim=3, descending=True)
    ranked = R.gather(3, order)
    # A block is kept if the better ones have not reached tau yet. Where no query counts, nothing is known: all are.
    enough = (ranked.cumsum(3) - ranked >= tau * R.sum(3, keepdim=True)) & (R.sum(3, keepdim=True) > 0)
    tiles = forced | ~torch.zeros_like(enough).scatter(3, order, enough)
    return Chosen(tiles & past if causal else tiles, T + front, S, (block, block))


@CARD.fills("selector")
class XAttention(Selector):
    """Keeps the fewest blocks that hold `threshold` of the estimated attention. No parameters.

    Args:
        num_heads: H, where it is known, which a threshold for each head must fit.
        block: queries and keys in a block; 128 in the authors' code.
        stride: s, dividing the block; scoring costs 1 / s of the scores. The authors use 8 or 16.
        threshold: tau; one number for each head, or one for all. The authors use 0.8 to 0.95.
    """

    streams = False

    def __init__(
        self,
        *,
        num_heads: int | None = None,
        block: int = 128,
        stride: int = 16,
        threshold: float | tuple[float, ...] = 0.9,
    ) -> None:
        super().__init__()
        whole(self, block=block, stride=stride)
        divides(self, stride=stride, block=block)
        each = threshold if isinstance(threshold, tuple) else (threshold,)
        for tau in each:
            number(self, above=0, threshold=tau)
        if isinstance(threshold, tuple) and num_heads not in (None, len(each)):
            refuse(self, "threshold", "fits another number of heads", f"{len(each)} entries", f"1, or {num_heads}")
        self.block, self.stride, self.threshold = block, stride, threshold

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        return xattention(q, k, block=self.block, stride=self.stride, threshold=self.threshold, mask=mask)

    def extra_repr(self) -> str:
        return f"block={self.block}, stride={self.stride}, threshold={self.threshold}"

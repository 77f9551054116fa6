"""AnchorAttention: a run of queries takes single keys whose pooled scores come near the largest.

The largest score over the first block and the run's own past stands for that over all keys: the anchor. Whatever is
below it by more than theta has hardly any weight; no sorting is needed to tell. What a run takes are stripes, one key
wide. Training-free: put it into a layer that was trained with full attention, for prefill.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, whole
from regard.kernels.blocks import in_blocks
from regard.kernels.problem import dots
from regard.masks import Mask, causal
from regard.masks.selection import Chosen
from regard.routing._shared import hides_keys_only, real_keys
from regard.stages import Selector
from regard.tracing import exporting

TOGETHER = "a run of queries takes its keys together, so later queries of the run can change the choice"

CARD = Card(
    "anchor_stripes",
    equation="""b = block,   runs of P = b step queries
R_t = { j <= t : j < init b, or j in the run of t or in one of the local - 1 runs before it }
a_t = max over R_t of q_t . k_j / sqrt(D)
key j between the two parts is taken by a run  iff  for any block B of its queries
  mean_B(q) . k_j / sqrt(D) + theta >= mean_B(a)
out_t = softmax over R_t and the keys taken by the run of t""",
    papers=(
        Paper(
            "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
            "Zhang et al.",
            2025,
            "EMNLP 2025",
            "the authors' code",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "dropout", "compile"},
    lacks={"streaming": "a run of queries takes its keys together"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*T*D*(S + min(S, block*(init + step*local)) + S/block)", ""),
    claim="Of a head that looks at single keys, stripes keep as much attention as blocks of 128 x 128 do in far more "
    "pairs: tests/routing/test_anchor_stripes.py::test_stripes_keep_single_keys.",
    differs=(
        "Every key counts once. The released kernels take the first run, not the first block, for the first part of R, "
        "and have keys of it among those that can be taken, which then count twice; and they leave out the block "
        "before the run. An older kernel of theirs has the first block, as here.",
        "Their plain reference has another rule: one own block for the run, and pooled scores that are not scaled.",
        "The scores of R are formed once for the choice and once for the output, where the kernels go on from them.",
        "Runs stand at multiples of P from the first key; the last may be short. Keys that padding hides do not count, "
        "nor do their own queries.",
    ),
    verified="third-party",
    example={"block": 2, "step": 2, "theta": 0.5},
    tries={"local": {"local": 2, "block": 1}},
    exceptions={"L4": TOGETHER, "L6": TOGETHER},
    defaults=dict.fromkeys(("theta", "block", "step", "init", "local"), "code"),
)

PAIRS = 2**22
"""Scores of R formed together."""


class Stripes(NamedTuple):
    """What runs take; the first query stands at place `front` of its run."""

    anchor: Float[Tensor, "B H T"]
    taken: Bool[Tensor, "B H runs S"]
    """Of the keys between the two parts of R."""
    region: Bool[Tensor, "runs S"]
    """The two parts of R, whole runs of them."""
    front: int


def anchor_stripes(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    theta: float = 12.0,
    block: int = 128,
    step: int = 16,
    init: int = 1,
    local: int = 1,
    real: Bool[Tensor, "#B 1 S"] | None = None,
) -> Stripes:
    """The keys that each run of queries takes, the queries being the last of the keys' tokens; see `AnchorStripes`.

    Args:
        real: True = a real key; None = all are.
    """
    (B, H, T, D), S, P = q.shape, k.shape[2], block * step
    wide = torch.promote_types(q.dtype, torch.float32)
    key = torch.ones(1, 1, S, dtype=torch.bool, device=q.device) if real is None else real
    q, k = q.to(wide).masked_fill(~key[:, :, S - T :, None], 0.0), k.to(wide).masked_fill(~key[..., None], 0.0)
    front = (S - T) % P
    runs = in_blocks(F.pad(q, (0, 0, front, 0)), P, 2)  # (B, H, n, P, D)
    counts = in_blocks(F.pad(key[:, :, S - T :], (front, 0)), P, 2)
    n = runs.shape[2]
    number_of = torch.arange(n, device=q.device) + (S - T - front) // P
    at = torch.arange(S, device=q.device)
    first, start = init * block, (number_of[:, None] + 1 - local) * P
    region = (at < first) | ((at >= start) & (at < start + local * P))

    # The anchors, a few runs at a time; scores are those of the run's own keys, of those before, and of the first.
    inside, width = torch.arange(P, device=q.device), min(first, S)
    own = torch.arange(local * P, device=q.device)

    def largest(some: Tensor) -> Tensor:
        """a of these runs: (B, H, some, P)."""
        place = (start[some] + own).clamp(0, S - 1)  # (some, local P)
        t = number_of[some, None, None] * P + inside[:, None]
        queries = runs[:, :, some].flatten(2, 3)
        scores = dots(queries, k[:, :, :width]).unflatten(2, (-1, P))
        allowed = (at[:width] <= t) & key[:, :, None, None, :width]
        most = scores.masked_fill(~allowed, -math.inf).amax(-1)
        mine = k[:, :, place].repeat_interleave(H // k.shape[1], 1)  # (B, H, some, local P, D)
        scores = runs[:, :, some] @ mine.mT
        stands = start[some, None] + own
        allowed = (stands >= 0) & (stands <= t) & (stands < S) & key[:, :, place][:, :, :, None]
        return torch.maximum(most, scores.masked_fill(~allowed, -math.inf).amax(-1))

    rows = torch.arange(n, device=q.device)
    parts = [rows] if exporting() else rows.split(max(1, PAIRS // max(1, B * H * P * (local * P + width))))
    anchor = torch.cat([largest(part) for part in parts], 2) / math.sqrt(D)
    anchor = anchor.masked_fill(~counts, 0.0)

    # Pooled queries and anchors of each block, against all keys before the run's part of R.
    many = counts.unflatten(3, (step, block)).sum(4)
    pooled = runs.unflatten(3, (step, block)).sum(4) / many.clamp(min=1)[..., None]
    level = anchor.unflatten(3, (step, block)).sum(4) / many.clamp(min=1)
    near = dots(pooled.flatten(2, 3), k).unflatten(2, (n, step)) / math.sqrt(D) + theta
    # Not `>=`: what is NaN is taken, so that it stays to be seen.
    taken = (~(near < level[..., None]) & (many > 0)[..., None]).any(3)
    taken = taken & (at >= first) & (at < start)
    return Stripes(anchor.flatten(2, 3)[:, :, front : front + T], taken, region, front)


def anchor_mask(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    theta: float = 12.0,
    block: int = 128,
    step: int = 16,
    init: int = 1,
    local: int = 1,
    mask: Mask | None = None,
) -> Mask:
    """The pairs that AnchorAttention keeps: causal; the options are those of `AnchorStripes`.

    Raises:
        ValueError: if the mask is more than causality and padding, or there are more queries than keys.
    """
    if not hides_keys_only(mask):
        refuse("anchor_mask", "mask", "hides more than keys", repr(mask), "causality and padding alone")
    T, S = q.shape[2], k.shape[2]
    if T > S:
        refuse("anchor_mask", "q", "has more tokens than k", T, f"at most {S}, the last of the keys' own")
    if q.numel() == 0 or k.numel() == 0 or (not exporting() and max(init, step * local) * block >= S):  # all is in R
        return causal()
    real = real_keys(mask, S, k.device)
    found = anchor_stripes(q, k, theta=theta, block=block, step=step, init=init, local=local, real=real)
    kept = Chosen(found.taken | found.region, T + found.front, S, (block * step, 1))
    return kept if mask is not None and mask.is_causal else causal() & kept


@CARD.fills("selector")
class AnchorStripes(Selector):
    """Stripes of single keys, for runs of queries, beside the first keys and the run's own. No parameters.

    Args:
        theta: how far below the anchor a key's pooled score may be, in natural logarithms of weight.
        block: b, queries that are pooled, and keys in a block.
        step: blocks of queries in a run.
        init: blocks of first keys that all see.
        local: runs of keys that a query sees, its own among them.
    """

    streams = False

    def __init__(self, *, theta: float = 12.0, block: int = 128, step: int = 16, init: int = 1, local: int = 1) -> None:
        super().__init__()
        number(self, theta=theta)
        whole(self, block=block, step=step, init=init, local=local)
        self.options: dict[str, Any] = {"theta": theta, "block": block, "step": step, "init": init, "local": local}

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        return anchor_mask(q, k, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

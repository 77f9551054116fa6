"""HiP: a search through halved branches of keys finds those that a block of queries scores highest.

The keys before a window are cut into branches. Each round halves every branch, scores a child by the one block of keys
that represents it, and keeps the best half. That rests on attention being alike at near keys: a lone strong key that
represents no branch is lost. It costs T log T scores. Training-free: put it into a layer that was trained with full
attention.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, refuse, whole
from regard.kernels.blocks import in_blocks
from regard.kernels.native.listed import greatest
from regard.masks import Mask, causal, prefix
from regard.masks import window as near
from regard.masks.selection import Chosen
from regard.routing._shared import ends, hides_keys_only, real_keys
from regard.routing.tree import Stands, tree_topk
from regard.stages import Selector
from regard.tracing import exporting

TOGETHER = "a block of queries searches together, so later queries of the block can change the choice"
PLACES = "key blocks and branches are cut from the first place of a row, padding among them"
ROUNDED = "the search takes a round more for every doubling of the length, and is compiled anew for it"

CARD = Card(
    "hip",
    equation="""for a block of queries that ends before key e:   R = e - window searchable keys,
n = ceil(R / block_k) blocks of keys,   m = mask_k / block_k branches [floor(n i / m), floor(n (i + 1) / m))
while n / m > 1 (halved each round): every branch in two halves, of which the m best stay, by
  max over the sampled queries and the keys of the half's representative block of q . k
seen by query t: keys j <= t in the first block of a branch left, or t - window < j, or j < sinks
all R keys where R <= mask_k""",
    papers=(
        Paper(
            "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
            "Lee et al.",
            2024,
            "2406.09827",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "dropout", "compile"},
    lacks={"streaming": "a block of queries searches together; the mechanism hip_each streams"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost(
        "B*H*T*D*(min(S, 2*(mask_k + window + sinks)) + 2*mask_k/query_stride*max(0, log2(S/(mask_k + window))))", ""
    ),
    claim="Where scores are smooth along the keys, the tree finds most of the best keys, and nearly all of the "
    "attention; among keys without any order, little more than chance: "
    "tests/routing/test_hip.py::test_finds_what_lies_together.",
    differs=(
        "The representatives first, center and last are here; the code also has random, by position, and an oracle "
        "that scores all keys. Bounds of grouped keys for scores, rotation that is extended within the search, masks "
        "kept for some steps of decoding, and unions over heads are left out.",
        "A last block too short for a sampled query takes its last one, where the authors' plain reference ends.",
        "Branches are those of the authors' plain reference, cut in whole numbers. Their kernels search behind the "
        "sinks, and cut at multiples of a power of two.",
        "The search ends with the last real token of a row; keys that padding hides, and their queries, don't count.",
        "What is chosen is held for each block of queries and keys, which grows as T S / (block_q block_k) bits.",
        "Exported with a free length, the search runs for more rounds than it needs, which change nothing.",
    ),
    verified="reconstructed",
    example={"mask_k": 2, "block_q": 2, "block_k": 1, "window": 2, "sinks": 1},
    exceptions={"L4": TOGETHER, "L6": TOGETHER, "L32 compiled_for_any_length": ROUNDED},
    defaults=dict.fromkeys(
        ("mask_k", "block_q", "block_k", "window", "sinks", "representative", "query_stride"), "code"
    ),
)
CARD.variant(
    "hip_each",
    "HiP where every query searches for itself, as in decoding; it streams.",
    preset={"block_q": 1, "query_stride": 1},
    supports={"causal", "padding", "packed", "gqa", "streaming", "dropout", "compile"},
    lacks={},
    cost=Cost("B*H*T*D*(min(S, 2*(mask_k + window + sinks)) + 2*mask_k*max(0, log2(S/(mask_k + window))))", "2*S*G*D"),
    exceptions={"L18 left_padded_stream": PLACES, "L32 compiled_for_any_length": ROUNDED},
    example={"mask_k": 2, "block_k": 1, "window": 2, "sinks": 1},
)

ROOM = 2**21
"""Numbers of keys gathered together."""


def hip_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    mask_k: int = 512,
    block_q: int = 64,
    block_k: int = 2,
    window: int = 256,
    representative: Stands = "center",
    query_stride: int = 2,
    real: Bool[Tensor, "#B 1 S"] | None = None,
) -> Bool[Tensor, "B H nq nk"]:
    """The key blocks that each block of queries finds before its window; the options are those of `HiP`."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    key = torch.ones(1, 1, S, dtype=torch.bool, device=q.device) if real is None else real
    query = F.pad(key, (max(0, T - S), 0), value=True)[:, :, max(0, S - T) :]
    q, k = q.to(wide).masked_fill(~query[..., None], 0.0), k.to(wide).masked_fill(~key[..., None], 0.0)
    keys, hidden = in_blocks(k, block_k, 2), ~in_blocks(key, block_k, 2)[:, 0]
    n = keys.shape[2]
    keys, hidden = keys.reshape(B * G * n, block_k, D), hidden.expand(B, -1, -1).reshape(B * n, block_k)
    b, h = torch.arange(B, device=q.device)[:, None], torch.arange(H, device=q.device)
    row = (b * G + h // (H // G))[..., None, None] * n
    end = ends(key).expand(B, 1)[..., None]  # (B, 1, 1)

    I = torch.arange(in_blocks(query, block_q, 2).shape[2], device=q.device)
    reach = (torch.minimum((I + 1) * block_q + (S - T), end) - window).clamp(min=0)
    # Every so many queries of the block's real ones; where there are not so many, the last.
    count = (end - (S - T) - I * block_q).clamp(1, block_q)[..., None]
    offset = torch.arange(min(query_stride, block_q) - 1, block_q, query_stride, device=q.device)
    offset = torch.where(offset < count, offset, (count - 1).clamp(max=query_stride - 1))
    place = (I[:, None] * block_q + offset).clamp(max=T - 1)  # (B, 1, nq, r)
    asked = query.expand(B, 1, T).gather(2, place.flatten(2)).view(place.shape)
    asked = asked | ~asked.any(3, keepdim=True)
    place = torch.where(asked, place, place.gather(3, asked.int().argmax(3, keepdim=True)))  # others in their stead
    sample = q.gather(2, place.flatten(2)[..., None].expand(B, H, -1, D)).unflatten(2, place.shape[2:])

    def found(part: Int[Tensor, " c"], most: int) -> Tensor:
        """The blocks that these blocks of queries find."""
        queries, limit = sample[:, :, part], reach[:, :, part]
        inside = torch.arange(block_k, device=q.device)

        def scores_of(block: Int[Tensor, "B H c w"]) -> Float[Tensor, "B H c w"]:
            scores = greatest(queries, keys, row + block)
            away = hidden[b[..., None, None] * n + block] | (
                block[..., None] * block_k + inside >= limit[..., None, None]
            )
            return scores.masked_fill(away, -math.inf).amax(4)

        blocks = (limit + block_k - 1).div(block_k, rounding_mode="floor").expand(B, H, -1)
        return tree_topk(scores_of, blocks, mask_k // block_k, representative=representative, most=most)

    step = max(1, ROOM // max(1, B * H * 2 * mask_k * D))
    parts = [I] if exporting() else I.split(step)
    tops = [-(-max(0, min((s + 1) * step * block_q + S - T, S) - window) // block_k) for s in range(len(parts))]
    index = torch.cat([found(part, most) for part, most in zip(parts, tops, strict=True)], 2)
    tiles = torch.zeros(*index.shape[:3], n, dtype=torch.bool, device=q.device).scatter(3, index, 1)
    return tiles & (torch.arange(n, device=q.device) * block_k < reach[..., None])


def hip(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    *,
    mask_k: int = 512,
    block_q: int = 64,
    block_k: int = 2,
    window: int = 256,
    sinks: int = 16,
    representative: Stands = "center",
    query_stride: int = 2,
    mask: Mask | None = None,
) -> Mask:
    """The pairs that HiP keeps: causal; the options are those of `HiP`.

    Raises:
        ValueError: if the mask is more than causality and padding.
    """
    if not hides_keys_only(mask):
        refuse("hip", "mask", "hides more than keys", repr(mask), "causality and padding alone")
    T, S = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0 or (not exporting() and S - window <= mask_k):  # all are seen
        return causal()
    block_q = block_q if exporting() else min(block_q, T)
    tiles = hip_blocks(
        q, k, mask_k=mask_k, block_q=block_q, block_k=block_k, window=window, representative=representative,
        query_stride=query_stride, real=real_keys(mask, S, k.device),
    )  # fmt: skip
    kept = Chosen(tiles, T, S, (block_q, block_k)) | near(window, ahead=1)
    kept = kept | prefix(sinks) if sinks else kept
    return kept if mask is not None and mask.is_causal else causal() & kept


@CARD.fills("selector")
class HiP(Selector):
    """A search through halved branches of keys, a window and the first keys. No parameters.

    Args:
        mask_k: keys that a block of queries finds before the window, a multiple of block_k.
        block_q: queries that search together. With 1 each searches for itself, as when decoding, and it streams.
        block_k: keys in a block.
        window: the last keys, which every query sees, its own among them.
        sinks: the first keys, which every query sees.
        representative: the block that stands for a branch.
        query_stride: every so many queries of a block are asked.
    """

    def __init__(
        self,
        *,
        mask_k: int = 512,
        block_q: int = 64,
        block_k: int = 2,
        window: int = 256,
        sinks: int = 16,
        representative: Stands = "center",
        query_stride: int = 2,
    ) -> None:
        super().__init__()
        whole(self, mask_k=mask_k, block_q=block_q, block_k=block_k, window=window, query_stride=query_stride)
        whole(self, 0, sinks=sinks)
        divides(self, block_k=block_k, mask_k=mask_k)
        choice(self, ("first", "center", "last"), representative=representative)
        self.options: dict[str, Any] = {
            "mask_k": mask_k, "block_q": block_q, "block_k": block_k, "window": window, "sinks": sinks,
            "representative": representative, "query_stride": query_stride,
        }  # fmt: skip
        self.streams = block_q == 1

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        return hip(q, k, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

"""Landmark attention: a landmark token ends each block, and its score says how much of it is read.

A query's weights are softmax over its own block's tokens and the landmarks before; a landmark's share goes to the
tokens of its block, by a softmax of their own. That is one softmax of shifted scores. What landmarks get also says
which blocks of a long past are worth fetching.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, refuse, whole
from regard.kernels.blocks import among
from regard.kernels.problem import dots
from regard.masks import Mask, full
from regard.masks.selection import Chosen
from regard.stages import Mix, Rows, Selector

CARD = Card(
    "landmark",
    equation="""token j is a landmark if (j + 1) mod (block + 1) = 0;   g_j = floor(j / (block + 1)) stand before it
s_ij = q_i . k_j / sqrt(D),   l(b) the landmark of block b
s'_ij = s_ij                                                 j <= i of the own block, g_j = g_i
        s_ij - log sum_{j' of block b} exp s_ij' + s_i,l(b)  j of an earlier block b < g_i
        -inf                                                 landmarks
out_i = sum_j softmax_j(s'_ij) v_j
with topk: of the blocks that ended before floor(i / chunk) chunk, only the topk with the largest s_i,l(b)""",
    papers=(
        Paper(
            "Landmark Attention: Random-Access Infinite Context Length for Transformers",
            "Mohtashami, Jaggi",
            2023,
            "2305.16300",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"},
    lacks={
        "bidirectional": "a landmark stands for the tokens before it",
        "cross": "its blocks are those of one sequence",
    },
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*T*S*D", "2*S*G*D"),
    claim="A block is found by its landmark's key alone, whose value is never read: "
    "tests/routing/test_landmark.py::test_a_block_is_found_by_its_landmark.",
    differs=(
        "A block without a token that may be seen counts for nothing, where the code loses its landmark's share; a "
        "query that would see nothing (a landmark without a block) sees what its mask leaves, by softmax.",
        "Rotation isn't part of it: `position=` puts it in, and counts landmarks as tokens, as the code does. Keys "
        "that are fetched keep their places; the code's moved ones, by which a long past looks short, are left out.",
        "Chunks lie at multiples of `chunk`, however a stream is cut. The code's choice for all tokens of a chunk "
        "together, which sees later ones, and its dropout of whole blocks are left out.",
        "Landmarks must be put into the text; the layer counts places, from a row's first token on.",
        "Every block's scores are formed, so that topk spares no time.",
    ),
    verified="third-party",
    example={"block": 2, "topk": 1, "chunk": 3},
    defaults={
        "block": "code",
        "topk": "code, where nothing is cached: all",
        "chunk": "code, 250 tokens and their landmarks",
        "choose": "code",
    },
)


def landmark_scores(
    scores: Float[Tensor, "B H t s"],
    landmark: Bool[Tensor, "#B s"],
    group: Int[Tensor, "#B s"],
    own: Int[Tensor, "#B t"],
    groups: int,
    allowed: Bool[Tensor, "#B #H t s"] | None = None,
) -> Float[Tensor, "B H t s"]:
    """Scores whose softmax is landmark attention's weights.

    Args:
        landmark, group: which keys are landmarks, and the block of each, from 0 to groups - 1; a landmark ends its own.
        own: the block of each query.
        allowed: True = may attend.
    """
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    seen = z if allowed is None else z.masked_fill(~allowed, -math.inf)
    mark, block = landmark[:, None, None], group[:, None, None]
    at = block.expand_as(z)
    tokens, marks = seen.masked_fill(mark, -math.inf), seen.masked_fill(~mark, -math.inf)
    shape = (*z.shape[:3], groups)
    top = z.new_full(shape, -math.inf).scatter_reduce(3, at, tokens.detach(), "amax")
    empty = top == -math.inf
    top = top.masked_fill(empty, 0.0)
    total = z.new_zeros(shape).scatter_add(3, at, (tokens - top.gather(3, at)).exp())
    inside = total.masked_fill(empty, 1.0).log() + top
    marked = marks.detach() != -math.inf
    said = z.new_zeros(shape).scatter_add(3, at, marks.masked_fill(~marked, 0.0))
    unknown = ~z.new_zeros(shape).scatter_add(3, at, marked.to(z.dtype)).bool()
    mine = block == own[:, None, :, None]
    shift = (said - inside).gather(3, at).masked_fill(mine, 0.0)
    gone = (block > own[:, None, :, None]) | (~mine & unknown.gather(3, at))
    out = (tokens + shift).masked_fill(gone, -math.inf)
    nothing = (out.detach() == -math.inf).all(3, keepdim=True)
    return torch.where(nothing, z, out).to(scores.dtype)


class LandmarkScores(Mix):
    """Groups scores by blocks, each of which ends with its landmark. No parameters.

    Args:
        block: tokens between landmarks.
        landmarks: (T,) or (B, T), where landmarks stand in these very sequences, in place of every block + 1 tokens.
    """

    sees = "rows"
    placed = True

    def __init__(self, *, block: int = 50, landmarks: Bool[Tensor, "*b T"] | None = None) -> None:
        super().__init__()
        whole(self, block=block)
        self.block, self.landmarks = block, landmarks
        if landmarks is not None:
            fits(self, "B T" if landmarks.dim() > 1 else "T", landmarks=landmarks)
            if landmarks.dtype != torch.bool:
                refuse(self, "landmarks", "has the wrong dtype", landmarks.dtype, "torch.bool", error=TypeError)

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        if z.numel() == 0:
            return z
        (own, _), (group, landmark) = self._blocks(rows.i), self._blocks(rows.j)
        first, n = group[:, :1], self.block + 1
        groups = z.shape[3] // n + 2 if self.landmarks is None else self.landmarks.shape[-1] + 1
        return landmark_scores(z, landmark, group - first, own - first, groups, rows.allowed)

    def _blocks(self, at: Int[Tensor, " n"]) -> tuple[Int[Tensor, "#B n"], Bool[Tensor, "#B n"]]:
        """The block of the tokens at these places, and whether they are landmarks."""
        if self.landmarks is None:
            n = self.block + 1
            return at.div(n, rounding_mode="floor")[None], (at.remainder(n) == self.block)[None]
        marks = self.landmarks.to(at.device).reshape(-1, self.landmarks.shape[-1])
        return (marks.cumsum(1) - marks.long())[:, at], marks[:, at]

    def extra_repr(self) -> str:
        return f"block={self.block}"


class LandmarkBlocks(Selector):
    """Of blocks that ended before the query's chunk, keeps those whose landmarks fit best. No parameters.

    Args:
        block: tokens between landmarks.
        topk: blocks that a query fetches, besides those that its chunk sees anyway.
        chunk: tokens and landmarks that come in together.
        choose: "each" head for itself, or all "together", by the largest share that a head gives.
    """

    def __init__(self, *, block: int, topk: int, chunk: int, choose: Literal["each", "together"] = "each") -> None:
        super().__init__()
        whole(self, block=block, topk=topk, chunk=chunk)
        choice(self, ("each", "together"), choose=choose)
        self.block, self.topk, self.chunk, self.choose = block, topk, chunk, choose

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        (T, D), S, n = q.shape[2:], k.shape[2], self.block + 1
        if q.numel() == 0 or k.numel() == 0 or n > S:
            return full()
        place, marks = torch.arange(S - T, S, device=q.device), torch.arange(self.block, S, n, device=q.device)
        past = marks < place[:, None].div(self.chunk, rounding_mode="floor") * self.chunk
        compete = past if mask is None else mask.at(place, marks) & past
        scores = dots(q, k[:, :, self.block :: n]).masked_fill(~compete, -math.inf)
        if self.choose == "together":
            some = compete.any(-1, keepdim=True)
            shares = (scores * D**-0.5).masked_fill(~some, 0.0).softmax(-1)
            scores = shares.masked_fill(~compete, -math.inf).amax(1, keepdim=True)
        taken = among(scores, min(self.topk, scores.shape[3])) & (scores != -math.inf)
        tiles = F.pad(taken | ~past, (0, -(-S // n) - marks.shape[0]), value=True)
        return Chosen(tiles, T, S, (1, n))

    def extra_repr(self) -> str:
        return f"block={self.block}, topk={self.topk}, chunk={self.chunk}, choose={self.choose!r}"


@CARD.fills()
def landmark(
    *, block: int = 50, topk: int | None = None, chunk: int = 255, choose: Literal["each", "together"] = "each"
) -> dict[str, Mix | Selector]:
    """The grouped softmax, and what fetches blocks if any is left out.

    Args:
        block: tokens between landmarks: every token number block + 1 is one.
        topk: blocks that a query fetches of what its chunk doesn't hold; None: all.
        chunk, choose: as of `LandmarkBlocks`.
    """
    grouped = LandmarkScores(block=block)
    whole("landmark", chunk=chunk)
    choice("landmark", ("each", "together"), choose=choose)
    if topk is None:
        return {"score_mix": grouped}
    return {"score_mix": grouped, "selector": LandmarkBlocks(block=block, topk=topk, chunk=chunk, choose=choose)}

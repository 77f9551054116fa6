"""Shifted cross chunk attention: a chunk of queries sees keys that each head shifts by its own number.

Queries stay where they are, and each key keeps its own position; all heads of a layer together see what no chunk of
one size does.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, flag, whole
from regard.masks.algebra import Mask
from regard.masks.shifted import shifted_chunks, shifted_dilated
from regard.masks.tensors import PerHead, per_head

PAPER = Paper(
    "SCCA: Shifted Cross Chunk Attention for long contextual semantic expansion",
    "Guo",
    2023,
    "2312.07305",
    "abstract and start of the introduction; neither the formulas nor any code were to be had",
)
EMPTY = "A query that a head leaves without any key gives 0 in that head; what the paper does is not known."
PACE = (
    "Chunks count from the first token of a row, padding among them: pad on the right. Documents of `masks.packed` are "
    "run one by one, each from its own start."
)

CARD = Card(
    "shifted_chunks",
    equation="""allowed(h, i, j) = floor(i / w) == floor((j + s_h) / w),   w = chunk          (causal: and j <= i)
fixed   s_h = 0 for h < H / 2,   floor(w / 2) for the others
flow    s_h = w g_h:   group g of n = groups sees the g-th chunk back;   g_h = floor(h n / H), or h where H < n
mixed   the first H / 2 heads as `fixed` of their own, the others as `shifted_dilated`""",
    papers=(PAPER,),
    traits=PLAIN - {"position_free", "shift_invariant", "normalised"},
    cost=Cost("2*B*H*T*min(S, chunk)*D", "2*S*G*D"),
    claim="Heads of kind flow see all of the past between them, each a chunk of it; those of kind fixed carry what is "
    "farther than a chunk away over layers: "
    "tests/masks/test_cross_chunks.py::test_heads_between_them_see_the_whole_past, "
    "tests/masks/test_cross_chunks.py::test_layers_carry_news_from_chunk_to_chunk.",
    differs=(
        "How heads are split, what `mixed` mixes and whether keys wrap around are this library's reading.",
        EMPTY,
        "A mask knows no length: `chunk` and `groups` are numbers, not shares of it.",
        PACE,
        "Left out: LoRA and position interpolation, with which the paper tunes a model; `linear_rope` has the latter.",
    ),
    verified="reconstructed",
    example={"chunk": 3},
    tries={
        "kind": "flow",
        "groups": {"kind": "flow", "groups": 3},
        "spread": {"kind": "flow", "groups": 12, "spread": True, "chunk": 1},
        "wrap": 12,
        "segment": {"kind": "mixed", "segment": 4, "dilation": 2},
        "dilation": {"kind": "mixed", "segment": 6, "dilation": 3},
    },
    defaults={
        "chunk": "ours",
        "kind": "ours",
        "groups": "ours",
        "spread": "ours",
        "wrap": "ours",
        "segment": "ours",
        "dilation": "ours",
    },
)

DILATED = Card(
    "shifted_dilated",
    gist="Shifted dilated attention: of a segment's keys, each head sees those of one residue.",
    equation="""allowed(h, i, j) = floor(i / g) == floor(j / g)  and  (j - o_h) mod r == 0          (causal: and j <= i)
g = segment,   r = dilation,   o_h = h mod r""",
    papers=(PAPER,),
    traits=PLAIN - {"position_free", "shift_invariant", "normalised"},
    cost=Cost("2*B*H*T*min(S, segment)/dilation*D", "2*S*G*D"),
    claim="r heads see a whole segment between them, each an r-th of it: "
    "tests/masks/test_cross_chunks.py::test_residues_add_up_to_the_segment.",
    differs=(
        "Residues count from the first key; from a segment's start it would be the same where r divides g.",
        EMPTY,
        PACE,
        "Kernels visit blocks of keys, of which none is without a key of each residue: time is that of the segments.",
    ),
    verified="reconstructed",
    example={"segment": 4, "dilation": 2},
    defaults={"segment": "ours", "dilation": "ours"},
)

Kind = Literal["fixed", "flow", "mixed"]


def fixed_shifts(heads: int, chunk: int) -> list[int]:
    """No shift for one half of the heads, and half a chunk for the other."""
    return [0] * (heads - heads // 2) + [chunk // 2] * (heads // 2)


def flow_shifts(heads: int, chunk: int, groups: int | None = None, *, spread: bool = False) -> list[int]:
    """Each group of heads a chunk farther back; of more groups than heads the nearest, or those `spread` evenly."""
    n = heads if groups is None else groups
    return [chunk * (h if n > heads and not spread else h * n // heads) for h in range(heads)]


@CARD.fills("mask")
def cross_chunks(
    num_heads: int,
    *,
    chunk: int = 128,
    kind: Kind = "fixed",
    groups: int | None = None,
    spread: bool = False,
    wrap: int | None = None,
    segment: int = 512,
    dilation: int = 4,
) -> Mask:
    """The mask of `num_heads` heads.

    Args:
        chunk: w.
        kind: how heads are shifted, "fixed", "flow" or "mixed".
        groups: n of "flow", how many chunks there are to see; default one for each head.
        spread: of more groups than heads take those that lie evenly apart, in place of the nearest.
        wrap: how many tokens there are, a multiple of `chunk`, where keys before the first are to be taken from the
            end; of no use in a causal layer, which they are the future of.
        segment, dilation: of "mixed", as in `shifted_dilated`.
    """
    who = "shifted_chunks"
    choice(who, get_args(Kind), kind=kind)
    whole(who, num_heads=num_heads, chunk=chunk, segment=segment, dilation=dilation)
    flag(who, spread=spread)
    if groups is not None:
        whole(who, groups=groups)
    if kind == "flow":
        return shifted_chunks(chunk, flow_shifts(num_heads, chunk, groups, spread=spread), wrap=wrap)
    if kind == "fixed":
        return shifted_chunks(chunk, fixed_shifts(num_heads, chunk), wrap=wrap)
    own = num_heads - num_heads // 2
    first = shifted_chunks(chunk, fixed_shifts(own, chunk), wrap=wrap)
    if own == num_heads:
        return first
    rest = shifted_dilated(segment, dilation, [h % dilation for h in range(own, num_heads)])
    return per_head([*_of_each(first), *_of_each(rest)])


@DILATED.fills("mask")
def dilated_segments(num_heads: int, *, segment: int = 512, dilation: int = 4) -> Mask:
    """The mask of `num_heads` heads.

    Args:
        segment: g, tokens that see each other.
        dilation: r.
    """
    whole("shifted_dilated", num_heads=num_heads, segment=segment, dilation=dilation)
    return shifted_dilated(segment, dilation, [h % dilation for h in range(num_heads)])


def _of_each(mask: Mask) -> Sequence[Mask]:
    return mask.parts if isinstance(mask, PerHead) else [mask]

"""Jenga: video tokens along a Hilbert curve; blocks keep the best, their neighbours and text.

Blocks of tokens along the curve (`regard.routing.gilbert_order`) are compact in space and time, so that their means
stand for them. An image block keeps the best of the others, those that touch it, and the text; text sees all. Early
steps of denoising may run at a lower resolution (`progressive`), in which fewer image tokens stand against the text:
a bias on text keys makes up for it. A block in a volume touches up to 26 others, so that savings begin with videos of
many more blocks. Training-free: put it into a video model that was trained with full attention.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, whole
from regard.kernels.problem import dots
from regard.masks import Mask, full
from regard.masks.selection import Chosen
from regard.routing._shared import block_means, hides_keys_only, real_keys, softmax
from regard.routing.curve import curve_neighbours
from regard.routing.resolution import TextBias, box_of
from regard.stages import Mix, Selector
from regard.tracing import exporting

CARD = Card(
    "jenga",
    equation="""N = T Y X image tokens in the order of the curve, then text;   n = N / block blocks
p[I, .] = softmax over image blocks J of mean(q_I) . mean(k_J) / sqrt(D)
r = max(floor((1 - drop) n), 1 + the number of sums of largest p that stay within mass)
image block I sees: its r largest p;  blocks that hold one of the 26 neighbours of a token of I;  text
out = softmax of q . k / sqrt(D) + (text_bias ln 2 on text keys);   text sees all, without the bias
first stage of rising resolution:   text_bias = -log2 sqrt(tokens / tokens at last)""",
    papers=(
        Paper(
            "Training-Free Efficient Video Generation via Dynamic Token Carving",
            "Zhang et al.",
            2025,
            "2505.16864",
            "abstract; the authors' code",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "gqa", "dropout", "compile"},
    lacks={
        "causal": "blocks along the curve see what comes later, and text sees all",
        "cross": "its blocks are those of one sequence",
        "streaming": "blocks along the curve see what comes later, and text sees all",
    },
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent", "sparse", "routed"},
    cost=Cost("B*H*T*D*(2*min(S, max(1 - drop, mass)*S + 2*block) + S/block**2)", ""),
    claim="Of a field that is smooth in space and time, means of blocks along the curve find more of the attention "
    "than those of blocks row by row, at one density: tests/routing/test_jenga.py::test_the_curve_finds_more.",
    differs=(
        "Where text begins within a block, the block counts as text. The last block of an image without text may be "
        "short. The authors take whole blocks.",
        "With mass = 1 all is kept, also where sums are rounded to more.",
        "Without sizes, tokens are those of a line, and a block touches those before and behind it.",
        "With drop = 0 all is seen and a text_bias still counts; the code then has none.",
        "Keys that padding hides do not count, nor do their own queries, nor blocks of them in the number n.",
        "One curve, where the code can draw one of several for each call. Steps that are skipped, a drop that begins "
        "at 0 (for Wan), and what a sampler does between stages are left out.",
    ),
    verified="third-party",
    example={"block": 2, "drop": 0.6},
    tries={
        "sizes": {"block": 1, "drop": 0.8, "sizes": (1, 3, 4)},
        "text_bias": {"block": 2, "sizes": (2, 2, 2), "num_text": 4, "text_bias": 1.0},
    },
    defaults={
        "block": "code",
        "drop": "code, its runs of HunyuanVideo: 0.75, later 0.85",
        "top_k": "ours, the code's is what drop leaves",
        "mass": "code, its runs of HunyuanVideo",
        "num_text": "ours, not every model has text among its tokens",
        "sizes": "ours, a box is the video's own",
        "text_bias": "code, of stages behind the first",
    },
)


def carve_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    *,
    num_text: int = 0,
    block: int = 128,
    drop: float = 0.75,
    top_k: int | None = None,
    mass: float = 0.3,
    neighbours: Bool[Tensor, "n n"] | None = None,
    real: Bool[Tensor, "#B 1 T"] | None = None,
) -> Bool[Tensor, "B H blocks blocks"]:
    """The blocks that Jenga keeps; see `carve`. `real`: True = a real key; None = all are."""
    (_, _, T, D), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    key = torch.ones(1, 1, T, dtype=torch.bool, device=q.device) if real is None else real
    q, k = q.to(wide).masked_fill(~key[..., None], 0.0), k.to(wide).masked_fill(~key[..., None], 0.0)
    (means_q, _), (means_k, some) = block_means(q, key, block), block_means(k, key, block)
    column = torch.arange(means_k.shape[2], device=q.device)
    text = column >= ((T - num_text) // block if num_text else T)
    image = some & ~text
    p = softmax(dots(means_q, means_k) / math.sqrt(D), image[:, :, None])
    order = p.argsort(stable=True, dim=3, descending=True)
    least = ((1 - drop) * image.sum(2).double()).floor()[..., None, None] if top_k is None else top_k
    # A block goes if the better ones are enough and hold more than mass. Where a NaN hides that, all stay.
    better = F.pad(p.gather(3, order).cumsum(3), (1, 0))[..., :-1]
    gone = (column >= least) & (better > (mass if mass < 1 else math.inf))
    best = ~torch.zeros_like(gone).scatter(3, order, gone) & image[:, :, None]
    if neighbours is None:
        near = (column - column[:, None]).abs() <= 1
    else:
        more = column.shape[0] - neighbours.shape[0]
        near = F.pad(neighbours.to(q.device), (0, more, 0, more))
    return best | near | text | text[:, None]


def carve(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    *,
    num_text: int = 0,
    block: int = 128,
    drop: float = 0.75,
    top_k: int | None = None,
    mass: float = 0.3,
    neighbours: Bool[Tensor, "n n"] | None = None,
    mask: Mask | None = None,
) -> Mask:
    """The pairs that Jenga keeps of image tokens in the order of their curve, and text behind them.

    Args:
        num_text: how many tokens at the end are text.
        block, drop, top_k, mass: as of `Carve`.
        neighbours: which image blocks touch, of `curve_neighbours`; None: those beside each other.

    Raises:
        ValueError: if q and k are not of the same tokens, there is more text than tokens, the neighbours are those of
            other blocks, or the mask is more than padding.
    """
    T, S = q.shape[2], k.shape[2]
    _options("carve", block=block, drop=drop, top_k=top_k, mass=mass, num_text=num_text)
    if T != S:
        refuse("carve", "k", "is of another length than q", S, f"{T}, the same tokens")
    if not hides_keys_only(mask) or (mask is not None and mask.is_causal):
        refuse("carve", "mask", "is more than padding", repr(mask), "padding alone")
    if num_text > T:
        refuse("carve", "num_text", "is more than all tokens", num_text, f"at most {T}")
    if neighbours is not None:
        n = -(-(T - num_text) // block)
        if tuple(neighbours.shape) != (n, n) or neighbours.dtype != torch.bool:
            got = f"{neighbours.dtype} {tuple(neighbours.shape)}"
            refuse("carve", "neighbours", "are those of other blocks", got, f"bool ({n}, {n})")
    if q.numel() == 0 or k.numel() == 0 or (drop == 0 and top_k is None) or (not exporting() and block >= T):
        return full()
    tiles = carve_blocks(
        q, k, num_text=num_text, block=block, drop=drop, top_k=top_k, mass=mass, neighbours=neighbours,
        real=real_keys(mask, S, k.device),
    )  # fmt: skip
    return Chosen(tiles, T, S, (block, block))


def _options(who: object, *, block: int, drop: float, top_k: int | None, mass: float, num_text: int) -> None:
    whole(who, block=block)
    number(who, least=0, most=1, drop=drop, mass=mass)
    whole(who, 0, num_text=num_text)
    if top_k is not None:
        whole(who, 0, top_k=top_k)


class Carve(Selector):
    """Blocks along the curve: the best by pooled scores, those that touch, and text. No parameters.

    Args:
        block: tokens in a block.
        drop: the share of image blocks that may go; 0: none.
        top_k: image blocks that are kept at least, in place of what `drop` leaves.
        mass: further blocks are kept while those before them hold no more of the pooled attention.
        num_text: how many tokens at the end are text.
        sizes: (T, Y, X) of the video, whose tokens come in the order of `gilbert_order`; None: a line.
    """

    streams = False

    def __init__(
        self,
        *,
        block: int = 128,
        drop: float = 0.75,
        top_k: int | None = None,
        mass: float = 0.3,
        num_text: int = 0,
        sizes: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        _options(self, block=block, drop=drop, top_k=top_k, mass=mass, num_text=num_text)
        self.sizes = None if sizes is None else box_of(self, sizes)
        self.neighbours = None if self.sizes is None else curve_neighbours(*self.sizes, block)
        self.options: dict[str, Any] = {
            "num_text": num_text, "block": block, "drop": drop, "top_k": top_k, "mass": mass,
        }  # fmt: skip

    def forward(self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], mask: Mask | None) -> Mask:
        if self.sizes is not None and q.shape[2] != math.prod(self.sizes) + self.options["num_text"]:
            wanted = f"{math.prod(self.sizes)} of the box {self.sizes} and {self.options['num_text']} of text"
            refuse(self, "q", "has another number of tokens", q.shape[2], wanted)
        return carve(q, k, neighbours=self.neighbours, mask=mask, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in [*self.options.items(), ("sizes", self.sizes)])


@CARD.fills()
def jenga(
    *,
    block: int = 128,
    drop: float = 0.75,
    top_k: int | None = None,
    mass: float = 0.3,
    num_text: int = 0,
    sizes: tuple[int, int, int] | None = None,
    text_bias: float = 0.0,
) -> dict[str, Selector | Mix]:
    """What carves, and the bias on text if there is any.

    Args:
        block, drop, top_k, mass, num_text, sizes: as of `Carve`.
        text_bias: image queries weigh text 2**text_bias times as much; `text_amplifier` tells how much. With one, all
            heads compute the blocks that any of them keeps.
    """
    carver = Carve(block=block, drop=drop, top_k=top_k, mass=mass, num_text=num_text, sizes=sizes)
    number("jenga", text_bias=text_bias)
    if not text_bias:
        return {"selector": carver}
    if carver.sizes is None or not num_text:
        refuse("jenga", "text_bias", "has no text to act on", text_bias, "sizes and num_text with it")
    return {"selector": carver, "score_mix": TextBias(math.prod(carver.sizes), text_bias)}

"""Mamba in both directions: two selective scans, one of them backwards, and one gate."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, tokens
from regard.linear._shared import widened
from regard.linear.mamba import CHUNK, Selective, rank
from regard.masks import Mask, full, padding
from regard.pipeline.tokens import key_mask, quarantine, spoil
from regard.tracing import as_it_is

CARD = Card(
    "bimamba",
    equation="""[u | z] = x W_in
f_t = o_t of mamba's scan of u;   b_t = that of the scan of u from the last token to the first, by parameters of its own
y_t = W_o ((f_t + b_t) / 2 * silu(z_t))      merge="sum":   without the 2""",
    papers=(
        Paper(
            "DocMamba: Efficient Document Pre-training with State Space Model",
            "Hu, Zhang, Ma, Liu, Du, Zhang",
            2025,
            "AAAI 2025",
            "abstract; official code",
        ),
        Paper(
            "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
            "Gu, Dao",
            2023,
            "2312.00752",
            "the layer of transformers; not the paper's own text",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "compile"},
    lacks={"causal": "it reads from both ends; `mamba` is the causal one"},
    traits={"shift_invariant"},
    cost=Cost("2*B*T*expand*M*(M + 2*dt_rank + 3*state_dim)", ""),
    claim="One token decides how far is heard, to both sides: a long step is a wall between what stands before it and "
    "behind it: tests/linear/test_bimamba.py::test_a_long_step_is_a_wall_to_both_sides.",
    differs=(
        "Hidden tokens leave no trace in either direction, and packed documents begin anew in both; the authors' code "
        "ignores its mask, and cuts sequences of a batch to one length.",
        "Each direction draws its own steps at the start; the authors' code gives both the same.",
        "Left out: the paper's model around it (embeddings of boxes, its pre-training); its order of tokens is "
        "`regard.linear.segment_first`, which sorts segments, where the authors' code keeps the order of its files.",
        "merge='sum' is that of Vim and BIMBA, by account alone.",
    ),
    verified="third-party",
    example={"state_dim": 4, "dt_rank": 2},
    tries={"chunk": ...},
    defaults={
        "merge": "code",
        "expand": "code, Mamba's",
        "state_dim": "code, Mamba's",
        "dt_rank": "code, Mamba's: M / 16 rounded up",
        "conv_size": "code, Mamba's",
        "conv_bias": "code, Mamba's",
        "bias": "code, Mamba's",
        "chunk": "ours",
    },
)

Merge = Literal["mean", "sum"]


@checked()
def segment_first(
    boxes: Float[Tensor, "*b T 4"] | Int[Tensor, "*b T 4"],
    segments: Int[Tensor, "*b T"],
    *,
    keep: Bool[Tensor, "*b T"] | None = None,
) -> Int[Tensor, "*b T"]:
    """The order in which a page is read: `x.gather(1, order[..., None].expand_as(x))`, and back by `order.argsort(-1)`.

    Segments, such as lines of text, come by the centre of their boxes, the upper ones first and of those at one height
    the left ones; within a segment words stay as they come. A segment's box is what its words' boxes span.

    Args:
        boxes: x1, y1, x2, y2 of each word, or of its segment; y grows downwards.
        segments: which segment each word belongs to: any numbers.
        keep: True at real words; others come last.

    Raises:
        ValueError: shapes that don't fit together.
    """
    T = segments.shape[-1]
    hidden = torch.zeros_like(segments, dtype=torch.bool) if keep is None else ~keep
    at = torch.arange(T, device=segments.device).expand_as(segments)
    order = _by(hidden, _by(segments, at))
    ids, unseen = segments.gather(-1, order), hidden.gather(-1, order)
    new = (ids[..., 1:] != ids[..., :-1]) | (unseen[..., 1:] != unseen[..., :-1])
    group = torch.zeros_like(order).scatter(-1, order, F.pad(new, (1, 0)).long().cumsum(-1)) if T else order

    def over(z: Tensor, how: str) -> Tensor:
        """The least or greatest of a word's segment, for each word."""
        return torch.zeros_like(z).scatter_reduce(-1, group, z, how, include_self=False).gather(-1, group)

    left, top, right, bottom = boxes.unbind(-1)
    order = _by(over(at, "amin"), at)  # segments with one centre as they come
    for low, high in ((left, right), (top, bottom)):
        order = _by(over(low, "amin") + over(high, "amax"), order)
    return _by(hidden, order)


def _by(key: Tensor, order: Int[Tensor, "*b T"]) -> Int[Tensor, "*b T"]:
    """An order, sorted by `key`; what is equal stays as it stood."""
    return order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))


class Direction(Selective):
    """What one direction has for itself.

    Args:
        inner: I channels; the rest as of `Mamba`.
    """

    def __init__(self, inner: int, state_dim: int, dt_rank: int, conv_size: int, conv_bias: bool, chunk: int) -> None:
        super().__init__()
        self.hold(inner, state_dim, dt_rank, conv_size, conv_bias, chunk)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"inner={self.inner}, state_dim={self.state_dim}, dt_rank={self.dt_rank}"

    def forward(
        self, u: Float[Tensor, "B T I"], keep: Bool[Tensor, "B T"] | None, starts: Bool[Tensor, "#B T"] | None
    ) -> Float[Tensor, "B T I"]:
        return self.selected(u, None, keep, starts)[0]


@CARD.module
class BiMamba(nn.Module):
    """Bidirectional Mamba: every token sees all others, in linear time.

    Args:
        dim: M.
        merge: "mean" or "sum" of both directions.
        expand, state_dim, dt_rank, conv_size, conv_bias, bias, chunk: as of `Mamba`. Both directions have the first
            and last projection and the gate in common, and all else for themselves.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        *,
        merge: Merge = "mean",
        expand: int = 2,
        state_dim: int = 16,
        dt_rank: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        choice(self, get_args(Merge), merge=merge)
        dt_rank = rank(self, dim, expand, state_dim, dt_rank, conv_size, chunk)
        flag(self, conv_bias=conv_bias, bias=bias)
        self.dim, self.expand, self.state_dim, self.dt_rank = dim, expand, state_dim, dt_rank
        self.share = 0.5 if merge == "mean" else 1.0
        self.in_proj = nn.Linear(dim, 2 * expand * dim, bias=bias)
        sizes = (state_dim, dt_rank, conv_size, conv_bias, chunk)
        self.ahead, self.back = (Direction(expand * dim, *sizes) for _ in range(2))
        self.o_proj = nn.Linear(expand * dim, dim, bias=bias)

    def extra_repr(self) -> str:
        return f"{self.dim}, merge={'mean' if self.share == 0.5 else 'sum'!r}"

    def receptive_field(self) -> Mask:
        """Every token."""
        return full()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens from both directions."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        starts, ends, allowed = None, None, full()
        if packed is not None:
            (B, T), allowed = x.shape[:2], packed
            starts, keep = packed.places(T) == 0, packed.real(B, T, keep)
            ends = F.pad(starts[:, 1:], (0, 1), value=True)
        x, bad = quarantine(x, always=packed is not None)
        out = self.run(x, keep, starts, ends)
        return spoil(out, bad, bad, allowed if keep is None else allowed & padding(keep))

    def run(self, x: Tensor, keep: Tensor | None, starts: Tensor | None, ends: Tensor | None) -> Tensor:
        """The mechanism. `starts` and `ends` mark the first and last token of each packed document."""
        projected = self.in_proj(x)
        with as_it_is(x.device):
            u, z = widened(projected)[0].chunk(2, -1)
            turned = (None if marks is None else marks.flip(1) for marks in (keep, ends))
            out = self.ahead(u, keep, starts) + self.back(u.flip(1), *turned).flip(1)
            out = (self.share * out * F.silu(z)).to(projected.dtype)
        return self.o_proj(out)

"""Transformer-XL: queries also score projected sinusoids of offsets, with biases of their own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import divides, fits, whole
from regard.positions._shared import angles, frequencies, work_dtype
from regard.positions.shaw import relative_scores
from regard.stages import Position, Rows
from regard.tracing import readable

CARD = Card(
    "transformer_xl",
    equation="""score[i,j] = ((q_i + u) . k_j + (q_i + w) . R[i - j]) / sqrt(D),   u, w (H, D) trained
R[o] = W_r [sin(o f), cos(o f)],   f_m = 10000^(-2m/M) for m < M/2""",
    papers=(
        Paper(
            "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
            "Dai, Yang, Yang, Carbonell, Le, Salakhutdinov",
            2019,
            "1901.02860",
            "section 3.2 in part, and accounts of 3.3 and of XLNet's layer in transformers, which has the same formula "
            "and gave numbers",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + B*H*T*(T + S)*D + (T + S)*M*H*D + B*H*S*D", "2*S*G*D"),
    claim="One layer learns offsets, keeps them in longer sequences, and finds in the memory of the last segment what "
    "its own lacks: tests/positions/test_transformer_xl.py::test_learns_offsets_and_finds_them_in_memory.",
    differs=(
        "The memory of earlier segments is a wrapper around any layer that takes a context: "
        "`regard.mixers.SegmentMemory`; norm and residual belong to the host model.",
        "The terms keep the scale 1/sqrt(D) even where the attention is given another: a position part isn't told.",
        "Each layer has biases of its own; the released code shares them among layers by default: `regard.share`.",
        "Offsets are looked up, where the paper shifts rows of a matrix; each chunk of rows projects its own.",
        "XLNet's third term, of segments, and a longest offset (clamp_len of the code) are left out.",
    ),
    verified="third-party",
)


def sinusoids(offsets: Int[Tensor, " n"], dim: int) -> Float[Tensor, "n M"]:
    """Sines in the first half of the channels, cosines in the second, in the widest float that the device has."""
    angle = angles(offsets, frequencies(dim, 10000.0, offsets.device))
    return torch.cat((angle.sin(), angle.cos()), -1)


def content_scores(k: Float[Tensor, "B G s D"], u: Float[Tensor, "H D"]) -> Float[Tensor, "B H 1 s"]:
    """u_h . k_j of each query head with its key head."""
    return (u.unflatten(0, (k.shape[1], -1)) @ k.mT).flatten(1, 2).unsqueeze(2)


@CARD.fills("position")
class RelativeXL(Position):
    """Adds (u . k_j + (q_i + w) . R[i - j]) / sqrt(D) to the scores.

    All starts normal with std 0.02, as the released code.

    Args:
        dim: M, even; as wide are the sinusoids.
        num_heads, head_dim: H and D.
    """

    sees = "rows"  # offsets are projected once for some rows and all their keys
    tied = ("content_bias", "offset_bias")

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, head_dim=head_dim)
        divides(self, pair=2, dim=dim)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim
        self.content_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.offset_bias = nn.Parameter(torch.empty(num_heads, head_dim))
        self.offset_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """All 0, which is plain attention."""
        for p in self.parameters():
            p.zero_()
        return True

    def bias(self, rows: Rows) -> Float[Tensor, "#B #H t s"]:
        fits(self, "B H t D", {"H": self.num_heads, "D": self.head_dim}, q=rows.q)
        t, s = rows.i.shape[0], rows.j.shape[0]
        if t == 0 or s == 0:
            return rows.q.new_zeros(1, 1, 1, 1)
        work = work_dtype(rows.q)
        q, k = rows.q.to(work), rows.k.to(work)
        first, n = rows.i.min() - rows.j.max(), t + s - 1  # the lowest offset, and how many there are
        if readable(rows.j):  # keys may be a selection
            n = int(rows.i.max() - rows.j.min() - first) + 1
        offsets = first + torch.arange(n, device=first.device)
        table = F.linear(sinusoids(offsets, self.dim).to(work), self.offset_proj.weight.to(work))
        table = table.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        index = rows.i.unsqueeze(-1) - rows.j - first
        by_offset = relative_scores(q + self.offset_bias.to(work).unsqueeze(1), table, index)
        return (content_scores(k, self.content_bias.to(work)) + by_offset) * self.head_dim**-0.5

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, {self.head_dim}"

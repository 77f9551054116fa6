"""Linformer: keys and values are projected along the sequence, S of them to L; queries see only those."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, fits, number, refuse, whole
from regard.kernels.check import check_inputs
from regard.linear._shared import hide, widened
from regard.masks import padding
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer

CARD = Card(
    "linformer",
    equation="""k'_l = sum_s E_sl k_s,   v'_l = sum_s F_sl v_s      l = 1..L;   E, F (max_length, L) for all heads
out = softmax(q k'^T / sqrt(D)) v'
pooling:  E_sl = F_sl = 1 / n where s is one of the n tokens of segment l, else 0
convolution:  k'_l = sum_i c_i * k_{l n + i},   n = max_length / L,   one kernel c for each feature of a head""",
    papers=(
        Paper(
            "Linformer: Self-Attention with Linear Complexity",
            "Wang et al.",
            2020,
            "2006.04768",
            "reviews by others; a public port of it (lucidrains)",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "cross", "gqa", "dropout", "compile"},
    lacks={"causal": "each slot mixes keys from everywhere", "mask": "slots mix positions"},
    traits={"linear_in_values", "head_independent"},
    cost=Cost("B*rank*D*(2*G*S + 2*H*T)", ""),
    claim="Exact with L = max_length and E = F = 1, and weights of rank L in linear time: "
    "tests/linear/test_linformer.py::test_of_full_length_it_is_softmax_attention, "
    "tests/linear/test_linformer.py::test_no_square_matrix.",
    differs=(
        "Sequences shorter than max_length use the first rows of E and F; the port takes one length only.",
        "Keys and values of padding are zero before they are projected; the port takes no mask.",
        "share='kv' has one E for keys and values, as in the paper; the port then takes the keys as values, too.",
        "The pooling and the convolution are by what the sections of the paper are said to name; a segment without a "
        "real token is not seen.",
        "The output projection has a bias only with bias=True; in the port it has one, and the others none.",
    ),
    verified="third-party",
    example={"max_length": 48, "rank": 6},
    defaults={
        "max_length": "ours",
        "rank": "code, lucidrains",
        "share": "code, lucidrains",
        "projection": "paper",
        "bias": "ours",
        "context_dim": "ours, as wide as dim",
    },
)

Share = Literal["headwise", "kv", "layer"]
Projection = Literal["linear", "mean", "conv"]


def linformer_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    e: Float[Tensor, "N L"],
    f: Float[Tensor, "N L"] | None = None,
    *,
    keep: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T V"]:
    """Softmax attention to the L rows of E^T k and F^T v; of E and F the first S rows count.

    Args:
        f: F; default E.
        keep: True at real keys.
        dropout: of the weights of slots.
    """
    check_inputs(q, k, v)
    f = e if f is None else f
    fits("linformer_attention", "N L", {}, e=e, f=f)
    if k.shape[2] > len(e):
        refuse("linformer_attention", "k", "is too long", f"{k.shape[2]} keys", f"at most {len(e)}, the rows of e")
    keys, values = (squeeze(z, p, keep) for z, p in ((k, e), (v, f)))
    return attention(q, keys, values, dropout=dropout)  # without a real key all slots are 0, and so is what is read


def squeeze(
    z: Float[Tensor, "B G S D"], e: Float[Tensor, "N L"], keep: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, "B G L D"]:
    """E^T z, of real tokens; summed in float32 at least."""
    (wide,) = widened(hide(z, keep))
    return (e[: z.shape[2]].to(wide.dtype).mT @ wide).to(z.dtype)


def by_segment(
    z: Float[Tensor, "B G S D"],
    length: int,
    rank: int,
    kernel: Float[Tensor, "n D"] | None = None,
    keep: Bool[Tensor, "B S"] | None = None,
) -> tuple[Float[Tensor, "B G L D"], Bool[Tensor, "B L"]]:
    """Of each of L segments of n = length / L tokens the mean of the real ones, or what the kernel makes of them.

    The second is True at segments that have a real token.
    """
    B, _, S, _ = z.shape
    (wide,) = widened(hide(z, keep))
    parts = nn.functional.pad(wide, (0, 0, 0, length - S)).unflatten(2, (rank, -1))
    real = z.new_ones(B, S, dtype=torch.bool) if keep is None else keep
    count = nn.functional.pad(real, (0, length - S)).unflatten(1, (rank, -1)).sum(-1)
    if kernel is None:
        out = parts.sum(3) / count.clamp(min=1)[:, None, :, None]
    else:
        out = (parts * kernel.to(wide.dtype)).sum(3)
    return out.to(z.dtype), count > 0


@CARD.module
class Linformer(HeadMixer):
    """Bidirectional attention to L projected keys, in time and memory linear in the number of tokens.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias, context_dim: as of `HeadMixer`.
        dropout: of the weights of slots, in training.
        max_length: the most keys; rows of E and F.
        rank: L.
        share: what E and F are shared by: "headwise", all heads; "kv", keys and values too (E = F); "layer", all layers
            too, which `regard.share(*layers)` does.
        projection: "linear" (E and F are trained), "mean" of each segment, or "conv", a trained kernel on each. For the
            last two rank divides max_length.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
        max_length: int = 512,
        rank: int = 256,
        share: Share = "headwise",
        projection: Projection = "linear",
    ) -> None:
        super().__init__(
            dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, context_dim=context_dim
        )
        number(self, least=0, most=1, dropout=dropout)
        whole(self, max_length=max_length, rank=rank)
        choice(self, get_args(Share), share=share)
        choice(self, get_args(Projection), projection=projection)
        if projection != "linear":
            divides(self, rank=rank, max_length=max_length)
        self.dropout, self.max_length, self.rank = dropout, max_length, rank
        self.share: Share = share
        self.projection: Projection = projection
        shape = {"linear": (max_length, rank), "conv": (max_length // rank, self.head_dim)}.get(projection)
        self.e = None if shape is None else nn.Parameter(torch.empty(shape))
        self.f = None if shape is None or share != "headwise" else nn.Parameter(torch.empty(shape))
        self.tied = ("e",) if share == "layer" and shape is not None else ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform up to 1 / sqrt(L), or 1 / sqrt(n) for a convolution over n tokens."""
        for p in (self.e, self.f):
            if p is not None:
                bound = 1 / math.sqrt(self.rank if self.projection == "linear" else p.shape[0])
                nn.init.uniform_(p, -bound, bound)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if source.shape[1] > self.max_length:
            name, wanted = "x" if source is x else "context", f"at most max_length = {self.max_length}"
            refuse(self, name, "is too long", f"{source.shape[1]} tokens", wanted)
        return super().split(x, source)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        dropout = self.dropout if self.training else 0.0
        e, f = self.e, self.e if self.f is None else self.f
        if self.projection == "linear" and e is not None and f is not None:
            return linformer_attention(q, k, v, e, f, keep=keep, dropout=dropout)
        sizes = self.max_length, self.rank
        (k, seen), (v, _) = by_segment(k, *sizes, e, keep), by_segment(v, *sizes, f, keep)
        return attention(q, k, v, mask=padding(seen), dropout=dropout)

"""Hepos: each head of cross-attention sees every s-th source token, heads side by side different ones."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import divides, fits, flag, number, refuse, tokens, whole
from regard.masks import Mask, full, padding
from regard.pipeline.function import attention
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.shapes import head_shape
from regard.tracing import exporting

CARD = Card(
    "hepos",
    equation="""I_h = {j : j mod stride = h mod stride}
o_h = sum_j softmax_{j in I_h}(q_h . k_h,j / sqrt(D)) v_h,j,   y = W_o [o_1; ...; o_H]""",
    papers=(
        Paper(
            "Efficient Attentions for Long Document Summarization",
            "Huang, Cao, Parulian, Ji, Wang",
            2021,
            "2104.02112",
            "abstract, start of the introduction; official code",
        ),
    ),
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "gqa", "dropout", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values"},
    cost=Cost("2*B*H*T*S*D/stride + 2*B*S*M*H*D/stride", ""),
    claim="A source token is heard by the heads of its residue alone, and each is heard by some: "
    "tests/cross/test_hepos.py::test_a_source_token_reaches_the_heads_of_its_residue.",
    differs=(
        "The authors' code appends up to a stride of zero rows to the source and does not hide them, so that heads "
        "also see a key made of the biases; the formula, and this, have none.",
        "A head whose source tokens are all hidden, or missing, gives 0, where the authors' code gives NaN.",
        "With fewer key heads the residue is that of the query head.",
        "Left out: the baselines in the authors' code (chunks, learned picks, hashing, clusters).",
    ),
    verified="reconstructed",
    example={"stride": 2},
    tries={"stride": 3},
    defaults={"stride": "code", "bias": "code", "context_dim": "ours, as wide as dim"},
)


class StridedKeys(NamedTuple):
    """What heads hold of a source: each its own tokens, in the order of residues. Head a stride + r is (r, a) here."""

    k: Float[Tensor, "R A n D"]
    """R = B stride, A = H / stride, n = ceil(S / stride)."""
    v: Float[Tensor, "R A n D"]
    keep: Bool[Tensor, "R n"] | None


@CARD.module
class Hepos(nn.Module):
    """Cross-attention with head-wise positional strides. For decoding, `hold` a source once and `read` it in steps.

    Args:
        dim: M, of x and of what comes out.
        num_heads: H, a multiple of the stride.
        num_kv_heads: G, dividing H; default H. Query heads of a group share weights, not tokens.
        head_dim: D; default dim / num_heads.
        context_dim: C, of the source; default dim.
        stride: of S source tokens a head sees S / stride.
        bias: whether the projections have one.
        dropout: of the weights, in training.

    Shapes: x (B, T, M), context (B, S, C) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        stride: int = 4,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who="Hepos")
        context_dim = dim if context_dim is None else context_dim
        whole(self, stride=stride, context_dim=context_dim)
        divides(self, stride=stride, num_heads=num_heads)
        flag(self, bias=bias)
        number(self, least=0, most=1, dropout=dropout)
        G, D = shape.num_kv_heads, shape.head_dim
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, G, D
        self.context_dim, self.stride, self.dropout = context_dim, stride, dropout
        self.q_proj = nn.Linear(dim, num_heads * D, bias=bias)
        self.k_proj = nn.Linear(context_dim, G * D, bias=bias)
        self.v_proj = nn.Linear(context_dim, G * D, bias=bias)
        self.o_proj = nn.Linear(num_heads * D, dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"],
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides source tokens: `regard.masks.padding`, or True = a real one."""
        tokens(self, "x", x, self.dim)
        fits(self, "B S context_dim", {"context_dim": self.context_dim}, context=context)
        if context.shape[0] != x.shape[0]:
            refuse(self, "context", "has another batch than x", context.shape[0], f"{x.shape[0]} sequences")
        keep = key_padding(self, mask, context)
        (x, bad), (context, bad_source) = quarantine(x), quarantine(context)
        out = self.read(x, self.hold(context, keep=keep))
        return spoil(out, bad, bad_source, None if keep is None else padding(keep))

    def hold(self, context: Float[Tensor, "B S C"], *, keep: Bool[Tensor, "B S"] | None = None) -> StridedKeys:
        """Keys and values, for each head at its own tokens alone: 2 H D S / stride numbers a sequence."""
        s, (B, S) = self.stride, context.shape[:2]
        if (more := -S % s) or keep is not None or exporting():
            keep = F.pad(context.new_ones(B, S, dtype=torch.bool) if keep is None else keep, (0, more))
            keep = keep.unflatten(1, (-1, s)).transpose(1, 2).flatten(0, 1)
        by_residue = F.pad(context, (0, 0, 0, more)).unflatten(1, (-1, s)).permute(2, 0, 1, 3)  # (s, B, n, C)
        return StridedKeys(self._projected(by_residue, self.k_proj), self._projected(by_residue, self.v_proj), keep)

    def _projected(self, source: Float[Tensor, "s B n C"], proj: nn.Linear) -> Float[Tensor, "R A n D"]:
        def of_residue(parameter: Tensor) -> Tensor:
            heads = parameter.unflatten(0, (self.num_kv_heads, self.head_dim))
            heads = heads.repeat_interleave(self.num_heads // self.num_kv_heads, 0)
            return heads.unflatten(0, (-1, self.stride)).transpose(0, 1).flatten(1, 2)  # (s, A D) or (s, A D, C)

        made = source.flatten(1, 2) @ of_residue(proj.weight).mT
        if proj.bias is not None:
            made = made + of_residue(proj.bias)[:, None].to(made.dtype)
        made = made.unflatten(1, source.shape[1:3]).unflatten(-1, (-1, self.head_dim))
        return made.permute(1, 0, 3, 2, 4).flatten(0, 1)

    def read(self, x: Float[Tensor, "B T M"], held: StridedKeys) -> Float[Tensor, "B T M"]:
        """What `forward` gives for these tokens and the source that is held."""
        q = self.q_proj(x).unflatten(-1, (-1, self.stride, self.head_dim)).permute(0, 3, 2, 1, 4).flatten(0, 1)
        # full(): while compiling, torch's backward of an operator takes no empty list of a mask's numbers
        mask = None if held.keep is None else full() & padding(held.keep)
        out = attention(q, held.k, held.v, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.o_proj(out.unflatten(0, (-1, self.stride)).permute(0, 3, 2, 1, 4).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, stride={self.stride}"

"""ConvBERT's mixed attention: half of the heads attend, the other half convolve, with the same queries.

    attention:    a_t,h = softmax(q_t,h . k_h / sqrt(D)) v_h
    convolution:  c_t,h = sum_j f_t,h,j u_{t + j - r, h}      (span-based dynamic convolution, see `span_conv.py`)
    out_t = W_o [a_t,1 .. a_t,H ; c_t,1 .. c_t,H],   H = heads / head_ratio of each kind, D = M / (2 H)

Jiang et al. 2020, https://arxiv.org/abs/2008.02496: abstract read; equations as the authors' released code and the
transformers library have them. Differs from them: hidden tokens count as outside for the convolutions too, where theirs
leak into their neighbours; and the output projection, which follows outside in theirs, belongs to the layer.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import Card, Cost, register
from regard.checks import tokens as check_tokens
from regard.masks import Mask, full, padding
from regard.mixers.span_conv import HIDDEN, PAPER, SpanHeads, initialise
from regard.pipeline.function import attention
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.positions._shared import check_int
from regard.shapes import HeadShape


class MixedAttention(nn.Module):
    """H heads attend and H heads convolve, with the same queries.

    Args:
        dim: M.
        num_heads: heads that plain attention would have; H = num_heads / head_ratio of each kind (at least 1) remain,
            each of half the width that H heads would have: D = M / (2 H).
        head_ratio: 2 in the paper.
        kernel_size: K, odd.
        dropout: of the attention weights, in training.
    """

    supports: frozenset[str] = frozenset({"bidirectional", "padding", "dropout", "compile"})
    name = "convbert"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_ratio: int = 2,
        kernel_size: int = 9,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, n in (("dim", dim), ("num_heads", num_heads), ("head_ratio", head_ratio)):
            check_int("MixedAttention", name, n)
        H = max(1, num_heads // head_ratio)
        if dim % (2 * H):
            raise ValueError(f"MixedAttention: {H} heads of each of two kinds do not divide the width {dim}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"MixedAttention: dropout must be in [0, 1], got {dropout}")
        self.dim, self.num_heads, self.head_dim, self.dropout = dim, H, dim // (2 * H), dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim // 2) for _ in range(3))
        self.heads = SpanHeads(dim, H, self.head_dim, kernel_size)
        self.o_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self.q_proj, self.k_proj, self.v_proj, self.o_proj)

    def receptive_field(self) -> Mask:
        """Everything, through the heads that attend."""
        return full()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        check_tokens(self.name, "x", x, self.dim)
        keep = key_padding(self.name, mask, x)
        x, bad = quarantine(x)
        q = self.q_proj(x)
        out = torch.cat([self.attend(x, q, keep), self.heads(x, q, keep)], -1)
        return spoil(self.o_proj(out), bad, bad, full() if keep is None else padding(keep))

    def attend(
        self, x: Float[Tensor, "B T M"], q: Float[Tensor, "B T N"], keep: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T N"]:
        """The heads that attend."""
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, self.k_proj(x), self.v_proj(x)))
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=None if keep is None else padding(keep), dropout=dropout)
        return out.transpose(1, 2).flatten(2)


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    head_ratio: int = 2,
    kernel_size: int = 9,
    dropout: float = 0.0,
) -> MixedAttention:
    if causal:
        raise ValueError("convbert: its convolutions look to both sides (got causal=True); expected causal=False")
    if shape.head_dim * shape.num_heads != shape.dim:
        raise ValueError(
            f"convbert: head_dim follows from dim and num_heads (got head_dim {shape.head_dim} for {shape.num_heads} "
            f"heads and dim {shape.dim}); leave it out"
        )
    options: dict[str, Any] = {"kernel_size": kernel_size, "dropout": dropout}
    return MixedAttention(shape.dim, shape.num_heads, head_ratio=head_ratio, **options)


CARD = register(
    Card(
        name="convbert",
        family="mixers",
        gist="Half of the heads attend, the other half convolve with kernels made for each token.",
        equation="[softmax(q k / sqrt(D)) v ; sum_j f_tj u_{t+j-r}],  f_t = softmax(W_f (span key_t * q_t))",
        paper=PAPER,
        build=_build,
        supports=MixedAttention.supports,
        traits=frozenset({"shift_invariant"}),
        cost=Cost("B*H*T*S*D/2 + B*T*kernel_size*2*M", ""),
        claim="Fewer parameters than plain attention of the same width: tests/mixers/test_span_conv.py.",
        differs=(HIDDEN,),
        verified="third-party",
        example={"kernel_size": 5},
    )
)

"""ConvBERT's mixed attention: half of the heads attend, half convolve with a kernel for each token."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import checked, divides, number, whole
from regard.masks import Mask, full, padding
from regard.mixers.span_conv import HIDDEN, PAPER, SpanHeads, initialise
from regard.pipeline.function import attention
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.weights import Loaded, reshaped, same

CARD = Card(
    "convbert",
    equation="""attention:    a_t,h = softmax(q_t,h . k_h / sqrt(D)) v_h
convolution:  c_t,h = sum_j f_t,h,j u_{t + j - r, h},   u = W_u x,   r = (K - 1) / 2
              f_t,h = softmax over the K taps of (W_f (s_t * q_t))_h,   s = W_p (depthwise convolution of x, K taps)
out_t = W_o [a_t,1 .. a_t,H ; c_t,1 .. c_t,H],   H = heads / head_ratio of each kind,   D = M / (2 H)""",
    papers=(PAPER,),
    supports={"bidirectional", "padding", "packed", "dropout", "compile"},
    traits={"shift_invariant"},
    cost=Cost("B*T*S*M + B*T*M*(M + kernel_size*(1 + H/(2*head_ratio)))", ""),
    claim="Fewer parameters than plain attention of the same width, and half of its work on pairs of tokens: "
    "tests/mixers/test_span_conv.py::test_fewer_parameters_than_plain_attention_and_half_of_its_pairs.",
    differs=(HIDDEN, "The output projection, which follows outside in the released code, belongs to the layer."),
    verified="third-party",
    example={"kernel_size": 5},
    defaults={"head_ratio": "code", "kernel_size": "code, transformers"},
)


@CARD.module
class MixedAttention(nn.Module):
    """H heads attend and H heads convolve, with the same queries.

    Args:
        dim: M.
        num_heads: heads that plain attention would have; H = num_heads / head_ratio of each kind (at least 1) remain,
            each of half the width that H heads would have: D = M / (2 H).
        head_ratio: 2 in the paper.
        kernel_size: K, odd; 9 in the released models.
        dropout: of the attention weights, in training.
    """

    def __init__(
        self, dim: int, num_heads: int, *, head_ratio: int = 2, kernel_size: int = 9, dropout: float = 0.0
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, head_ratio=head_ratio)
        number(self, least=0, most=1, dropout=dropout)
        H = max(1, num_heads // head_ratio)
        divides(self, **{"heads of both kinds": 2 * H}, dim=dim)
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

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
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


@CARD.loads("transformers", "ConvBertSelfAttention")
def _transformers(theirs: Any) -> Loaded:
    """It has no output projection. Its convolutions see hidden tokens."""

    def build() -> MixedAttention:
        H, K = theirs.num_attention_heads, theirs.conv_kernel_size
        return MixedAttention(theirs.query.in_features, H, head_ratio=1, kernel_size=K, dropout=theirs.dropout.p)

    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "heads.u_proj": "conv_out_layer"}
    deep = {"heads.kernel_proj": "conv_kernel_layer", "heads.depthwise": "key_conv_attn_layer.depthwise"}
    span = "key_conv_attn_layer"
    return Loaded(
        build,
        [
            *same(theirs, names | deep),
            reshaped("heads.pointwise.weight", f"{span}.pointwise.weight", lambda w: w[..., 0], lambda w: w[..., None]),
            reshaped("heads.pointwise.bias", f"{span}.bias", lambda b: b[:, 0], lambda b: b[:, None]),
        ],
    )

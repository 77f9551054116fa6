"""Span-based dynamic convolution: each token mixes its neighbours by a kernel that it makes from them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import called, checked, refuse, whole
from regard.masks import Mask, padding, window
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.shapes import head_shape
from regard.tracing import exporting

PAPER = Paper(
    "ConvBERT: Improving BERT with Span-based Dynamic Convolution",
    "Jiang et al.",
    2020,
    "2008.02496",
    "abstract; the authors' and the transformers library's code",
)
HIDDEN = (
    "Hidden tokens count as outside the sequence for the convolutions too; in the released code they leak into their "
    "neighbours."
)

CARD = Card(
    "span_conv",
    equation="""q = W_q x,   u = W_u x,   s = W_p (depthwise convolution of x, K taps)
f_t = softmax over the K taps of ( W_f (s_t * q_t) )_h      for each head h
c_t,h = sum_j f_t,h,j u_{t + j - r, h},   r = (K - 1) / 2,   zeros outside""",
    papers=(PAPER,),
    supports={"bidirectional", "padding", "packed", "compile"},
    traits={"shift_invariant"},
    cost=Cost("B*T*M*(2*H*D + kernel_size*(1 + H))", ""),
    claim="Sees (K - 1) / 2 tokens on each side and nothing else: "
    "tests/mixers/test_span_conv.py::test_a_convolution_sees_its_neighbourhood_only.",
    differs=(HIDDEN, "All heads convolve, not half of them, and an output projection of its own follows."),
    verified="third-party",
    example={"kernel_size": 5},
    defaults={"kernel_size": "code, transformers"},
)


def dynamic_convolution(u: Float[Tensor, "B T H D"], taps: Float[Tensor, "B T H K"]) -> Float[Tensor, "B T H D"]:
    """sum_j taps[t, h, j] u[t + j - (K - 1) / 2, h], zeros outside."""
    T, K = u.shape[1], taps.shape[-1]
    if not exporting() and K // 2 > T:  # what lies farther away is outside for every token
        taps, K = taps[..., K // 2 - T : K // 2 + T + 1], 2 * T + 1
    around = F.pad(u, (0, 0, 0, 0, K // 2, K // 2))
    out = torch.zeros_like(u)
    for j in range(K):  # K passes over u are cheaper than a K times larger copy of it
        out = torch.addcmul(out, taps[..., j, None], around[:, j : j + T])
    return out


class SpanHeads(nn.Module):
    """The convolution heads, without query and output projections: (x, q) -> (B, T, H D)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, head_dim=head_dim, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            refuse(self, "kernel_size", "is even", kernel_size, "an odd int, which has a middle")
        self.num_heads, self.kernel_size, inner = num_heads, kernel_size, num_heads * head_dim
        self.u_proj = nn.Linear(dim, inner)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.pointwise = nn.Linear(dim, inner)
        self.kernel_proj = nn.Linear(inner, num_heads * kernel_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self.u_proj, self.pointwise, self.kernel_proj)
        nn.init.trunc_normal_(self.depthwise.weight, std=1 / self.kernel_size)

    def forward(
        self, x: Float[Tensor, "B T M"], q: Float[Tensor, "B T N"], keep: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T N"]:
        """`keep` is True at real tokens; the others count as outside the sequence."""
        if x.shape[1] == 0:
            return q
        u = self.u_proj(x)
        if keep is not None:
            x, u = (z.masked_fill(~keep[..., None], 0) for z in (x, u))
        span = self.pointwise(self.depthwise(x.mT).mT)
        taps = self.kernel_proj(span * q).unflatten(-1, (self.num_heads, self.kernel_size))
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32)).softmax(-1).to(u.dtype)
        return dynamic_convolution(u.unflatten(-1, (self.num_heads, -1)), taps).flatten(2)


def initialise(*projections: nn.Linear) -> None:
    for proj in projections:
        nn.init.normal_(proj.weight, std=0.02)
        nn.init.zeros_(proj.bias)


@CARD.module
class SpanConvolution(nn.Module):
    """All heads convolve: time linear in T.

    Args:
        dim, num_heads: M and H.
        head_dim: D; default dim / num_heads.
        kernel_size: K, odd; a token sees (K - 1) / 2 neighbours on each side. 9 in the released models.
    """

    def __init__(self, dim: int, num_heads: int, *, head_dim: int | None = None, kernel_size: int = 9) -> None:
        super().__init__()
        head_dim = head_shape(dim, num_heads, head_dim=head_dim, who=called(self)).head_dim
        self.dim = dim
        self.heads = SpanHeads(dim, num_heads, head_dim, kernel_size)
        self.q_proj = nn.Linear(dim, num_heads * head_dim)
        self.o_proj = nn.Linear(num_heads * head_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise(self.q_proj, self.o_proj)

    def receptive_field(self) -> Mask:
        """(K - 1) / 2 tokens on each side."""
        return window(self.heads.kernel_size // 2 + 1)

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
        out = self.o_proj(self.heads(x, self.q_proj(x), keep))
        field = self.receptive_field()
        return spoil(out, bad, bad, field if keep is None else field & padding(keep))

"""Efficient probing: learned queries pool a frozen encoder's tokens, each into its own slice of the output.

    a_j = softmax_n(<q_j, x_n> / sqrt(M))        y[slice j] = W_v[slice j] (sum_n a_jn x_n) + b_v[slice j]

Psomas et al. 2025, "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling"
(https://arxiv.org/abs/2506.10178): abstract and the authors' code followed, the paper's text not read. There are no
key, query and output projections: a query sees the token's full width, so the scale is 1 / sqrt(M).
Differs from the paper: nothing known. Pooling comes before the value projection, which is the same function, cheaper;
the classifier around it (a batch norm without weights, and a linear layer) is left to the caller.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.masks import Mask
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import key_padding, quarantine
from regard.shapes import HeadShape


def efficient_probing(
    x: Float[Tensor, "B T M"],
    queries: Float[Tensor, "Q M"],
    value_weight: Float[Tensor, "C M"],
    value_bias: Float[Tensor, "C"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B C"]:
    """Pool tokens; query j fills the j-th of Q equal slices of C. A row whose tokens are all hidden gives 0."""
    Q, (C, M) = queries.shape[0], value_weight.shape
    scores = queries @ x.mT * M**-0.5
    allowed = None if keep is None else keep[:, None, None].expand(-1, -1, Q, -1)
    weights = softmax(scores[:, None], allowed)[:, 0]
    pooled = weights @ x
    slices = torch.einsum("bqm,qcm->bqc", pooled, value_weight.view(Q, C // Q, M))
    if value_bias is not None:
        slices = slices + value_bias.view(Q, C // Q) * weights.sum(-1, keepdim=True)
    return slices.flatten(1)


class EfficientProbing(nn.Module):
    """Tokens to one vector: (B, T, dim) -> (B, dim / reduction).

    Args:
        dim: M, the width of the tokens.
        num_queries: Q, how many learned queries; it divides dim / reduction.
        reduction: how many times narrower than a token the output is.
        bias: whether the value projection has one.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 32,
        *,
        reduction: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if num_queries < 1 or reduction < 1 or dim % (num_queries * reduction):
            raise ValueError(
                f"EfficientProbing: dim must be a multiple of num_queries * reduction (got {dim}, {num_queries}, "
                f"{reduction}); expected num_queries and reduction that divide it"
            )
        self.dim = dim
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.v_proj = nn.Linear(dim, dim // reduction, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)
        self.v_proj.reset_parameters()

    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Pool the tokens that `mask` keeps (`regard.masks.padding`, or True = a real token)."""
        check_tokens("EfficientProbing", "x", x, self.dim)
        keep = key_padding("EfficientProbing", mask, x)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        x, bad = quarantine(x)
        out = efficient_probing(x, self.queries, self.v_proj.weight, self.v_proj.bias, keep)
        return out if bad is None else out.masked_fill(bad.any(1, keepdim=True), torch.nan)

    def extra_repr(self) -> str:
        return f"{self.dim}, {len(self.queries)}"


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    num_queries: int | None = None,
    reduction: int = 1,
    bias: bool = False,
) -> EfficientProbing:
    """By default there are as many queries as heads: both own a slice of the values."""
    if causal:
        raise ValueError("efficient_probing: pools all tokens into one vector (got causal=True); expected causal=False")
    num_queries = shape.num_heads if num_queries is None else num_queries
    return EfficientProbing(shape.dim, num_queries, reduction=reduction, bias=bias)


CARD = register(
    Card(
        name="efficient_probing",
        family="cross",
        gist="Learned queries pool tokens, each into its slice of the values; no key projection.",
        equation="a_j = softmax_n(<q_j, x_n> / sqrt(M));  y[slice j] = W_v[slice j] sum_n a_jn x_n",
        paper=Paper(
            "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
            "Psomas et al.",
            2025,
            "2506.10178",
            "abstract; official code",
        ),
        build=_build,
        protocol="Pooler",
        supports=frozenset({"bidirectional", "padding", "compile"}),
        traits=frozenset({"position_free"}),
        cost=Cost("2*B*T*M*H + B*M*M/reduction", ""),
        claim="Fewer parameters than multi-head attention pooling (Q M + M^2 against 4 M^2), and less work: "
        "tests/cross/test_efficient_probing.py.",
        differs=("Tokens are pooled before the value projection, which is the same function.",),
        verified="third-party",
        tasks=("digits",),
    )
)

"""Efficient probing: learned queries pool tokens, each into its own slice of the output, without keys.

A query sees the token's full width, so the scale is 1 / sqrt(M).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, whole
from regard.kernels.sums import over_keys
from regard.masks import Mask
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import key_padding, quarantine

CARD = Card(
    "efficient_probing",
    equation="a_j = softmax_n(<q_j, x_n> / sqrt(M)),   y[slice j] = W_v[slice j] (sum_n a_jn x_n) + b_v[slice j]",
    papers=(
        Paper(
            "Attention, Please! Revisiting Attentive Probing for Masked Image Modeling",
            "Psomas et al.",
            2025,
            "2506.10178",
            "abstract; official code",
        ),
    ),
    protocol="Pooler",
    supports={"bidirectional", "padding", "compile"},
    traits={"position_free"},
    cost=Cost("2*B*T*M*H + B*M*M/reduction", ""),
    claim="Fewer parameters than multi-head attention pooling (Q M + M^2 against 4 M^2), and less work: "
    "tests/cross/test_efficient_probing.py::test_work_grows_with_queries_not_with_the_width_of_values.",
    differs=(
        "Tokens are pooled before the value projection, which is the same function, cheaper.",
        "The classifier around it (a batch norm without weights, and a linear layer) is left to the caller.",
    ),
    verified="third-party",
    tasks=("digits",),
    defaults={"num_queries": "ours, one for each head", "reduction": "code", "bias": "code"},
)


def efficient_probing(
    x: Float[Tensor, "B T M"],
    queries: Float[Tensor, "Q M"],
    value_weight: Float[Tensor, "C M"],
    value_bias: Float[Tensor, " C"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B C"]:
    """Pool tokens; query j fills the j-th of Q equal slices of C. A row whose tokens are all hidden gives 0."""
    Q, (C, M) = queries.shape[0], value_weight.shape
    scores = queries @ x.mT * int(M) ** -0.5
    allowed = None if keep is None else keep[:, None, None].expand(-1, -1, Q, -1)
    weights = softmax(scores[:, None], allowed)[:, 0]
    pooled = over_keys(weights, x)
    slices = torch.einsum("bqm,qcm->bqc", pooled, value_weight.view(Q, C // Q, M))
    if value_bias is not None:
        slices = slices + value_bias.view(Q, C // Q) * weights.sum(-1, keepdim=True)
    return slices.flatten(1)


@CARD.module
class EfficientProbing(nn.Module):
    """Tokens to one vector: (B, T, dim) -> (B, dim / reduction).

    Args:
        dim: M, the width of the tokens.
        num_heads: Q, where num_queries is not given: heads and queries alike own a slice of the values. 32 is the
            authors' default.
        num_queries: Q, how many learned queries; it divides dim / reduction.
        reduction: how many times narrower than a token the output is.
        bias: whether the value projection has one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 32,
        *,
        num_queries: int | None = None,
        reduction: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_queries = num_heads if num_queries is None else num_queries
        whole(self, dim=dim, num_queries=num_queries, reduction=reduction)
        divides(self, **{"num_queries * reduction": num_queries * reduction}, dim=dim)
        self.dim = dim
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.v_proj = nn.Linear(dim, dim // reduction, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=0.02)
        self.v_proj.reset_parameters()

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Pool the tokens that `mask` keeps (`regard.masks.padding`, or True = a real token)."""
        keep = key_padding(self, mask, x)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        x, bad = quarantine(x)
        out = efficient_probing(x, self.queries, self.v_proj.weight, self.v_proj.bias, keep)
        return out if bad is None else out.masked_fill(bad.any(1, keepdim=True), torch.nan)

    def extra_repr(self) -> str:
        return f"{self.dim}, {len(self.queries)}"

"""Non-local block: every place gathers from all others; it starts as the identity."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number
from regard.kernels.check import check_inputs
from regard.pipeline.function import attention
from regard.vision.gating import batch_normed, inner_width
from regard.vision.maps import to_map, to_tokens

CARD = Card(
    "nonlocal",
    equation="""y = x + BN(Wz o)                         BN's weight starts at 0
"gaussian":  o_i = sum_j softmax_j(scale q_i . k_j) v_j
"dot":       o_i = 1/N sum_j (q_i . k_j) v_j      q, k, v of R channels, N places""",
    papers=(
        Paper(
            "Non-local Neural Networks",
            "Wang, Girshick, Gupta, He",
            2018,
            "1711.07971",
            "official and third-party code; not the paper's body",
        ),
        Paper(
            "CNNtention: Can CNNs do better with Attention?",
            "Kapila, Glattki, Rathi",
            2024,
            "2412.11657",
            "abstract; summaries",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*(Y*X)**2*inner_dim", ""),
    claim="A block can go into a network without changing it, and then reaches any place from any other: "
    "tests/vision/test_non_local.py::test_starts_as_nothing_and_reaches_everywhere.",
    differs=(
        "Keys and values are not max-pooled, as in timm; the authors' code halves both sides of their map by default.",
        'The form "dot" multiplies k and v first, where the codes form all N x N products: the same sums, O(N R^2).',
    ),
    verified="third-party",
    example={"inner_dim": 12},
    tries={"reduction": {"reduction": 4, "inner_dim": None}, "scale": 0.3},
    exceptions={"L10 batch_rows_do_not_meet_in_training": "the authors' batch normalisation reads the whole batch"},
    defaults={
        "pairwise": "code",
        "reduction": "code",
        "inner_dim": "code, C / reduction",
        "scale": "code, 1 / sqrt(R)",
    },
)

Pairwise = Literal["gaussian", "dot"]


@checked()
def gathered(
    q: Float[Tensor, "B H N R"],
    k: Float[Tensor, "B H N R"],
    v: Float[Tensor, "B H N V"],
    *,
    pairwise: Pairwise = "gaussian",
    scale: float | None = None,
) -> Float[Tensor, "B H N V"]:
    """What each place gathers. The dot form has neither softmax nor scale, but a mean.

    Args:
        scale: of the scores below the softmax; default 1 / sqrt(R).
    """
    check_inputs(q, k, v)
    if pairwise == "dot":
        return q @ (k.mT @ v / max(1, k.shape[2]))
    return attention(q, k, v, scale=scale)


@CARD.module
class NonLocal(nn.Module):
    """`gathered` with its projections, on a map of any number of axes.

    Args:
        dim: C.
        pairwise: the embedded Gaussian, which is softmax attention, or the dot product.
        reduction: C / R; 2 in the authors' models, 8 in timm.
        inner_dim: R itself.
        scale: of the Gaussian's scores; default 1 / sqrt(R), in timm 1 / sqrt(C).
    """

    def __init__(
        self,
        dim: int,
        *,
        pairwise: Pairwise = "gaussian",
        reduction: float = 2,
        inner_dim: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        choice(self, ("gaussian", "dot"), pairwise=pairwise)
        if scale is not None:
            number(self, above=0, scale=scale)
        self.dim, self.pairwise, self.scale = dim, pairwise, scale
        self.inner_dim = inner_width(self, dim, inner_dim, reduction)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, self.inner_dim) for _ in range(3))
        self.o_proj = nn.Linear(self.inner_dim, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: normal with 0.01, no bias; the norm gives 0."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
        self.norm.reset_parameters()
        nn.init.zeros_(self.norm.weight)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C X *sizes"]) -> Float[Tensor, "B C X *sizes"]:
        tokens = to_tokens(x)
        q, k, v = (proj(tokens)[:, None] for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = self.o_proj(gathered(q, k, v, pairwise=self.pairwise, scale=self.scale)[:, 0])
        return x + to_map(batch_normed(self.norm, out.mT).mT, x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.dim}, pairwise={self.pairwise!r}, inner_dim={self.inner_dim}"

"""Entropy-guided attention: a loss keeps the entropy of every head near a learnable threshold."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, whole
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Attention maps of two layers."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 2, shape.num_heads, 12, 12, generator=generator, dtype=torch.float64).softmax(-1),)


CARD = Card(
    "entropy_regularizer",
    equation="""E_i = -sum_j A_ij log A_ij,   d = E - theta_h log T
loss = weight / L sum over layers of 1/H sum over heads, batch and rows of (d^2 if |d| > margin log T else 0)""",
    papers=(
        Paper(
            "Entropy-Guided Attention for Private LLMs",
            "Jha, Reagen",
            2025,
            "2501.03489",
            "section 4; algorithm 1; appendices A and B; the authors' code",
        ),
    ),
    protocol="Loss",
    inputs=_inputs,
    supports={"causal", "bidirectional", "padding", "compile"},
    cost=Cost("B*H*T*S", ""),
    claim="Prevents entropic overload and entropy collapse: rows too flat or too sharp come within the margin: "
    "tests/training/test_entropy.py::test_brings_entropies_within_the_margin.",
    differs=(
        "Every layer has its own thresholds, where the released trainer reads the first layer's for all.",
        "Where thresholds start is not stated; it is 0.4 here, within the range of the learned values that the paper "
        "shows.",
        "Code and appendix B penalise each row and sum over batch and rows, as is done here; algorithm 1 averages the "
        'entropy over the rows first, which is per="head", here summed over the batch.',
    ),
    verified="third-party",
    example={"num_layers": 2, "weight": 1.0, "margin": 0.05},
    tries={"context_size": 9},
    defaults={
        "num_layers": "ours",
        "context_size": "ours, the keys at hand",
        "margin": "paper",
        "weight": "paper, on CodeParrot",
        "per": "code",
        "threshold": "ours, within the range of the paper's learned ones",
    },
)


def row_entropy(attention: Float[Tensor, "*b T S"]) -> Float[Tensor, "*b T"]:
    """-sum_j A log(A + 1e-9), in at least fp32."""
    a = attention.to(torch.promote_types(attention.dtype, torch.float32))
    return -(a * torch.log(a + 1e-9)).sum(-1)


def entropy_penalty(
    entropy: Float[Tensor, "L B H T"],
    threshold: Float[Tensor, "L H"],
    greatest: float,
    margin: float,
    *,
    per: Literal["row", "head"] = "row",
    keep: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Squared deviations from threshold * greatest beyond the margin: mean over layers and heads, sum over the rest."""
    rows = torch.ones_like(entropy) if keep is None else keep[None, :, None].expand_as(entropy).to(entropy.dtype)
    target = threshold[:, None, :, None].to(entropy.dtype) * greatest
    if per == "head":
        entropy = (entropy * rows).sum(-1, keepdim=True) / rows.sum(-1, keepdim=True).clamp_min(1)
        rows = rows.amax(-1, keepdim=True)
    d = entropy - target
    penalty = (d**2).masked_fill((d.abs() <= margin * greatest) | (rows == 0), 0)
    return penalty.sum() / (entropy.shape[0] * entropy.shape[2])


@CARD.module
class EntropyRegularizer(nn.Module):
    """To be added to the training loss; thresholds are learned with the model.

    Args:
        num_heads, num_layers: of the model whose attention maps are given. Causal maps need nothing else: what is
            masked has weight 0, and log T is the same.
        context_size: T in log T, the greatest entropy; default the number of keys at hand.
        margin: gamma, the share of log T within which nothing is penalised; the paper's choice.
        weight: lambda; the paper's on CodeParrot, and 5e-5 on Languini.
        per: penalise "row" by row, or each "head"'s mean entropy.
        threshold: theta at the start.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_layers: int = 1,
        context_size: int | None = None,
        margin: float = 0.2,
        weight: float = 1e-5,
        per: Literal["row", "head"] = "row",
        threshold: float = 0.4,
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, num_layers=num_layers)
        if context_size is not None:
            whole(self, 2, context_size=context_size)
        number(self, least=0, margin=margin)
        number(self, weight=weight, threshold=threshold)
        choice(self, ("row", "head"), per=per)
        self.num_heads, self.num_layers, self.context_size = num_heads, num_layers, context_size
        self.margin, self.weight, self.initial = margin, weight, threshold
        self.per: Literal["row", "head"] = per
        self.threshold = nn.Parameter(torch.empty(num_layers, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.threshold, self.initial)

    @checked(L="num_layers", H="num_heads")
    def forward(
        self, attention: Float[Tensor, "L B H T S"], *, mask: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a model's attention maps, one a layer; rows of queries that `mask` hides don't count."""
        if mask is not None:
            attention = attention.masked_fill(~mask[None, :, None, :, None], 0)
        greatest = math.log(attention.shape[-1] if self.context_size is None else self.context_size)
        penalty = entropy_penalty(
            row_entropy(attention), self.threshold, greatest, self.margin, per=self.per, keep=mask
        )
        return (self.weight * penalty).to(attention.dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.num_heads}, num_layers={self.num_layers}"
        return f"{sizes}, margin={self.margin}, weight={self.weight}, per={self.per!r}"

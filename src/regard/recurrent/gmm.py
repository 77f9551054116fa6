"""GMM attention: the weights are a mixture of Gaussians over places, whose means only move forward."""

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.recurrent.location import LOCATION_PAPER, LocationAligner

CARD = Card(
    "gmm_attention",
    equation="""(w^, d^, s^) = V tanh(W s_t + b)        mu_t = mu_{t-1} + Delta_t > mu_{t-1}
alpha_tj = sum_k w_k / Z_k exp(-(j - mu_tk)^2 / (2 sigma_k^2))        c_t = sum_j alpha_tj H_j
v0: w = exp(w^), Z = 1, Delta = exp(d^), sigma = sqrt(exp(-s^) / 2)
v1: w = softmax(w^), Z = sqrt(2 pi) sigma, Delta = exp(d^), sigma = sqrt(exp(s^))
v2: as v1, but Delta = softplus(d^), sigma = softplus(s^)""",
    papers=(
        replace(
            LOCATION_PAPER,
            read="abstract; equations of a public implementation; the biased start's Delta = 1, sigma = 10 from memory",
        ),
        Paper(
            "Generating Sequences With Recurrent Neural Networks",
            "Graves",
            2013,
            "1308.0850",
            "not read: version v0 as the same implementation has it",
        ),
    ),
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("B*T*(S*(M + components) + hidden*(M + 3*components))", "components"),
    claim="Looks at no content, moves forward, and aligns sequences longer than any seen in training: "
    "tests/recurrent/test_gmm.py::test_content_does_not_count, "
    "tests/recurrent/test_gmm.py::test_generalises_to_longer_sequences.",
    differs=(
        "With padding, places are counted from the first real token.",
        "As in the public implementation, 1e-5 is added to every sigma.",
    ),
    verified="reconstructed",
    example={"hidden": 8, "components": 3},
    defaults={
        "components": "ours, the paper's as remembered",
        "hidden": "ours, the paper's as remembered",
        "version": "paper, GMMv2b",
        "biased": "paper, GMMv2b",
    },
)

Version = Literal["v0", "v1", "v2"]
SIGMA = 1e-5
"""Added to every width, so that none is 0."""


def mixture_parameters(
    raw: Float[Tensor, "B T _"], version: Version
) -> tuple[Float[Tensor, "B T K"], Float[Tensor, "B T K"], Float[Tensor, "B T K"]]:
    """Weights w / Z, moves Delta > 0 and widths sigma of the components, in at least fp32."""
    w, move, width = raw.to(torch.promote_types(raw.dtype, torch.float32)).chunk(3, -1)
    if version == "v0":
        return w.exp(), move.exp(), (width.neg().exp() / 2).sqrt() + SIGMA
    softplus = nn.functional.softplus
    delta, sigma = (move.exp(), width.exp().sqrt()) if version == "v1" else (softplus(move), softplus(width))
    sigma = sigma + SIGMA
    return w.softmax(-1) / (math.sqrt(2 * math.pi) * sigma), delta, sigma


def mixture_weights(
    height: Float[Tensor, "B T K"],
    mean: Float[Tensor, "B T K"],
    sigma: Float[Tensor, "B T K"],
    places: Int[Tensor, "B S"],
) -> Float[Tensor, "B T S"]:
    """alpha: the mixture's density at the places."""
    away = (places[:, None, :, None] - mean[:, :, None]) / sigma[:, :, None]
    return (torch.exp(-0.5 * away**2) @ height[..., None])[..., 0]


@CARD.module(closed=("context_dim",))
class GMMAttention(LocationAligner):
    """A mixture of Gaussians whose means only move forward; all steps at once.

    Args:
        dim, context_dim: widths of decoder states and of the context.
        components: K; 5, and `hidden` of 128, are the paper's as remembered, not read.
        hidden: A, of the layer that makes the mixture.
        version: how its parameters are kept positive: "v0" (Graves), "v1" or "v2"; v1 and v2 are normalised densities.
        biased: start near Delta = 1 and sigma = 10 (v1, v2).
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        components: int = 5,
        hidden: int = 128,
        version: Version = "v2",
        biased: bool = True,
    ) -> None:
        super().__init__(dim, context_dim)
        choice(self, get_args(Version), version=version)
        whole(self, components=components, hidden=hidden)
        if biased and version == "v0":
            refuse(self, "version", "has no biased start", "'v0' with biased=True", "biased=False")
        self.components, self.version, self.biased = components, version, biased
        self.hidden = nn.Linear(dim, hidden)
        self.mixture = nn.Linear(hidden, 3 * components)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as ever; a biased start has the moves' and widths' biases such that Delta = 1, sigma = 10."""
        self.hidden.reset_parameters()
        self.mixture.reset_parameters()
        if self.biased:
            log_of = {"v1": (0.0, math.log(100)), "v2": (math.log(math.e - 1), math.log(math.expm1(10)))}
            with torch.no_grad():
                for part, value in zip(self.mixture.bias.chunk(3)[1:], log_of[self.version], strict=True):
                    part.fill_(value)

    def origin(self, x: Tensor, context: Tensor, keep: Tensor | None) -> Float[Tensor, "B K"]:
        """All means at place 0."""
        return x.new_zeros(len(x), self.components, dtype=torch.promote_types(x.dtype, torch.float32))

    def advance(
        self, x: Tensor, context: Tensor, keep: Tensor | None, at: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B t S"], Float[Tensor, "B K"]]:
        """The means are a running sum, so the steps need no loop."""
        height, delta, sigma = mixture_parameters(self.mixture(torch.tanh(self.hidden(x))), self.version)
        mean = at[:, None] + delta.cumsum(1)
        B, S = context.shape[:2]
        places = torch.arange(S, device=x.device).expand(B, -1) if keep is None else keep.cumsum(1) - 1
        alpha = mixture_weights(height, mean, sigma, places).to(x.dtype)
        if keep is not None:
            alpha = alpha.masked_fill(~keep[:, None], 0)
        return alpha, (mean[:, -1] if x.shape[1] else at)

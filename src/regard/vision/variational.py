"""Variational attention: a channel gate is drawn from a Gaussian; a loss holds that near its domain's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole

CARD = Card(
    "variational",
    equation="""h = ReLU(W1 mean of x),  mu = Wm h + bm,  log sigma^2 = Wv h + bv
z = mu + sigma eps,  eps ~ N(0, 1) for each sample and channel; z = mu in evaluation         y = sigmoid(z) x""",
    papers=(
        Paper(
            "Variational Attention: Propagating Domain-Specific Knowledge for Multi-Domain Learning in Crowd Counting",
            "Chen, Yan, Li, Li, Wang, Zuo, Zhang",
            2021,
            "2108.08023",
            "abstract and the introduction's beginning; the authors' code holds the baseline alone",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("3*B*M*(M//reduction)", ""),
    claim="Attention is a distribution over gates, one draw a channel and image, inferred from the image alone: "
    "tests/vision/test_variational.py::test_a_gate_is_drawn_once_a_channel.",
    differs=(
        "The formulas are inferred: the authors published the baseline without its attention.",
        "log sigma^2 starts near -4, so that gates are hardly noisy at first, and is kept within 10 of 0.",
    ),
    verified="reconstructed",
    example={"reduction": 4},
    exceptions={
        "L29 no_randomness_unasked": "gates are drawn in training, by design",
        "L43 every_parameter_has_a_gradient": "evaluation takes the mean, so that training alone moves the variance",
    },
    defaults={"reduction": "ours, as squeeze and excitation"},
)


@CARD.module
class VariationalAttention(nn.Module):
    """The gate. No domain enters it, for none is known of a new image; the loss `domain_kl` takes it in training.

    Args:
        dim: C.
        reduction: the inner width is C // reduction, 1 at least.
    """

    def __init__(self, dim: int, *, reduction: int = 16) -> None:
        super().__init__()
        whole(self, dim=dim, reduction=reduction)
        self.dim = dim
        inner = max(1, dim // reduction)
        self.down = nn.Linear(dim, inner, bias=False)
        self.mean = nn.Linear(inner, dim)
        self.log_variance = nn.Linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in (self.down, self.mean, self.log_variance):
            part.reset_parameters()
        nn.init.constant_(self.log_variance.bias, -4.0)

    @checked(C="dim")
    def posterior(self, x: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        """mu and log sigma^2."""
        h = F.relu(self.down(x.mean((2, 3))))
        return self.mean(h), self.log_variance(h).clamp(-10, 10)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        z, log_variance = self.posterior(x)
        if self.training:
            z = z + (log_variance / 2).exp() * torch.randn_like(z)
        return z.sigmoid()[:, :, None, None] * x


def intrinsic_domains(
    means: Float[Tensor, "N C"], domain: Int[Tensor, " N"], k: int, *, seed: int = 0, rounds: int = 100
) -> Int[Tensor, " N"]:
    """New labels for InVA: k clusters of the attention's means within each domain, numbered domain by domain.

    Lloyd's k-means; it starts from points far from each other, the first of which is drawn. Means, not samples: of one
    image they are always the same.

    Raises:
        ValueError: a domain with fewer than k samples.
    """
    whole("intrinsic_domains", k=k, rounds=rounds)
    if means.dim() != 2 or domain.shape != means.shape[:1] or domain.is_floating_point():
        refuse("intrinsic_domains", "domain", "is no label a row", tuple(domain.shape), f"({len(means)},) integers")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros_like(domain, dtype=torch.long)
    for n, name in enumerate(domain.unique().tolist()):
        here = domain == name
        if (count := int(here.sum())) < k:
            refuse("intrinsic_domains", "domain", f"has too few samples of {name}", count, f"{k} at least")
        points = means[here].detach()
        centres = points[torch.randint(count, (1,), generator=generator).to(points.device)]
        while len(centres) < k:
            centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
        labels[here] = n * k + _lloyd(points, centres, rounds)
    return labels


def _lloyd(points: Float[Tensor, "n C"], centres: Float[Tensor, "k C"], rounds: int) -> Int[Tensor, " n"]:
    """The nearest centre of each point, once centres are the means of their points; one without points stays."""
    near = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        members = F.one_hot(near, len(centres)).to(points.dtype)
        size = members.sum(0)[:, None]
        centres = torch.where(size > 0, members.mT @ points / size.clamp_min(1), centres)
        if torch.equal(near, moved := torch.cdist(points, centres).argmin(1)):
            break
        near = moved
    return near

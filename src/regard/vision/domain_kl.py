"""Domain loss: the divergence of a gate's Gaussian from that of the input's domain, or a mixture."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Means and log-variances of 4 samples, and their domains."""
    generator = torch.Generator().manual_seed(3)
    mean, log_variance = torch.randn(2, 4, shape.dim, generator=generator, dtype=torch.float64)
    return mean, log_variance, torch.tensor([0, 1, 1, 0])


CARD = Card(
    "domain_kl",
    equation="""KL(N(mu, sigma^2) || N(m_d, 1)) = 1/2 sum over channels of sigma^2 + (mu - m_d)^2 - 1 - log sigma^2
several components: -log sum_k pi_dk exp(-KL_dk), the least upper bound of the divergence from their mixture
loss: the mean over samples, each with its domain d""",
    papers=(
        Paper(
            "Variational Attention: Propagating Domain-Specific Knowledge for Multi-Domain Learning in Crowd Counting",
            "Chen, Yan, Li, Li, Wang, Zuo, Zhang",
            2021,
            "2108.08023",
            "abstract and the introduction's beginning; the authors' code holds the baseline alone",
        ),
    ),
    protocol="Loss",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    cost=Cost("B*M*components", ""),
    claim="Attention of different domains is set apart: tests/vision/test_domain_kl.py::test_domains_are_set_apart.",
    differs=(
        "The formulas are inferred. The paper's abstract has clusters of each domain as domains of their own; "
        "components are that with responsibilities that are soft.",
    ),
    verified="reconstructed",
    example={"num_domains": 2, "components": 2},
    tries={"distance": {"prior": "fixed", "distance": 1.0}},
    defaults={
        "num_domains": "ours, the fewest",
        "components": "ours, one Gaussian a domain",
        "prior": "ours, means that training moves",
        "distance": "ours",
    },
)


def gaussian_kl(
    mean: Float[Tensor, "*#b C"], log_variance: Float[Tensor, "*#b C"], prior: Float[Tensor, "*#b C"]
) -> Float[Tensor, "*b"]:
    """From N(prior, 1), summed over channels."""
    return (log_variance.exp() + (mean - prior) ** 2 - 1 - log_variance).sum(-1) / 2


@CARD.module
class DomainKL(nn.Module):
    """The loss with its prior, of unit variance.

    Args:
        dim: C.
        num_domains: of the data.
        components: K, Gaussians a domain, whose weights are learned.
        prior: means that are learned, or that are fixed, two on each axis, one on each side of 0.
        distance: of the fixed ones from 0.
    """

    log_weights: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        num_domains: int = 2,
        components: int = 1,
        prior: Literal["learned", "fixed"] = "learned",
        distance: float = 2.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_domains=num_domains, components=components)
        choice(self, ("learned", "fixed"), prior=prior)
        number(self, above=0, distance=distance)
        if prior == "fixed" and num_domains * components > 2 * dim:
            refuse(self, "dim", "has too few axes for the fixed means", dim, f"{num_domains * components} / 2 at least")
        self.dim, self.num_domains, self.prior, self.distance = dim, num_domains, prior, distance
        means = torch.empty(num_domains, components, dim)
        if prior == "learned":
            self.means = nn.Parameter(means)
        else:
            self.register_buffer("means", means)
        self.register_parameter("log_weights", None)
        if components > 1:
            self.log_weights = nn.Parameter(torch.empty(num_domains, components))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.log_weights is not None:
            self.log_weights.zero_()
        if self.prior == "learned":  # apart, or components of a domain would stay as one
            self.means.normal_()
            return
        rows = torch.arange(self.means[..., 0].numel(), device=self.means.device)
        signed = self.distance * (1 - 2 * (rows % 2)).to(self.means.dtype)
        self.means.zero_().flatten(0, 1)[rows, rows // 2] = signed

    @checked(C="dim")
    def forward(
        self, mean: Float[Tensor, "B C"], log_variance: Float[Tensor, "B C"], domain: Int[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Of a posterior, as `VariationalAttention.posterior` gives it, and each sample's domain, from 0."""
        if not len(mean):
            refuse(self, "mean", "has no sample", tuple(mean.shape), "one at least")
        wide = torch.promote_types(mean.dtype, torch.float32)
        prior = self.means.to(wide)[domain]
        kl = gaussian_kl(mean.to(wide)[:, None], log_variance.to(wide)[:, None], prior)
        if self.log_weights is None:
            return kl.mean().to(mean.dtype)
        log_pi = self.log_weights.to(wide).log_softmax(-1)[domain]
        return -(log_pi - kl).logsumexp(-1).mean().to(mean.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_domains={self.num_domains}, prior={self.prior!r}"

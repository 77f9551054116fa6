"""The loss of domains against loops over samples and channels, and torch's own divergence."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from regard.laws.agreement import close
from regard.vision import DomainKL, VariationalAttention
from vision.naive_variational import domain_kl, fixed_prior_means_signed, mixture_kl
from vision.shared import filled, leaves, normal

DOMAIN = torch.tensor([0, 2, 2, 1, 0])


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("prior", ["learned", "fixed"])
def test_equals_the_loops(prior: str, components: int) -> None:
    layer = filled(DomainKL(5, num_domains=3, components=components, prior=prior))
    mean, log_variance = leaves(normal(1, 5, 5), normal(2, 5, 5))
    got = layer(mean, log_variance, DOMAIN)
    if components == 1:
        want = domain_kl(mean, log_variance, DOMAIN, layer.means[:, 0])
        q, p = Normal(mean, (log_variance / 2).exp()), Normal(layer.means[DOMAIN, 0], torch.ones(5, 5))
        close(want, kl_divergence(q, p).sum(1).mean())
    else:
        want = mixture_kl(mean, log_variance, DOMAIN, layer.means, layer.log_weights)
        hard = mixture_kl(mean, log_variance, DOMAIN, layer.means, layer.log_weights, hard=True)
        assert got <= hard
    close(got, want)
    inputs = [mean, log_variance, *layer.parameters()]
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        close(g, w)


def test_fixed_means_stand_two_on_an_axis() -> None:
    layer = DomainKL(4, num_domains=5, prior="fixed", distance=3.0).double()
    close(layer.means[:, 0], fixed_prior_means_signed(5, 4, 3.0))
    assert not list(layer.parameters())
    assert "means" in layer.state_dict()
    gaps = torch.pdist(layer.means[:, 0])
    assert gaps.min() > 4


def test_domains_are_set_apart() -> None:
    """Descent on the loss alone: the attention of two kinds of images comes to lie at its own domain's mean, and is no
    longer sure; which kind an image is of, nobody has told the gate."""
    torch.manual_seed(0)
    layer, loss = VariationalAttention(6, reduction=1), DomainKL(6, prior="fixed")
    domain = torch.arange(64) % 2
    x = torch.randn(64, 6, 3, 3) + domain[:, None, None, None]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)

    def told() -> float:
        gaps = torch.cdist(layer.posterior(x)[0], loss.means[:, 0])
        return float((gaps.argmin(1) == domain).float().mean())

    assert layer.posterior(x)[1].exp().max() < 0.2
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(*layer.posterior(x), domain) + 0 * sum(p.sum() for p in layer.parameters())
        value.backward()
        optimizer.step()
    assert told() > 0.95
    assert layer.posterior(x)[1].exp().mean() > 0.5


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"dim has too few axes for the fixed means \(got 2\); expected 6 / 2 at least"
    ):
        DomainKL(2, num_domains=6, prior="fixed")
    with pytest.raises(ValueError, match=r"prior is unknown \(got 'free'\); expected one of 'learned', 'fixed'"):
        DomainKL(4, prior="free")  # type: ignore[arg-type]
    layer = DomainKL(4)
    with pytest.raises(ValueError, match=r"mean has no sample \(got \(0, 4\)\); expected one at least"):
        layer(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(TypeError, match=r"domain has the wrong dtype \(got torch.float32\)"):
        layer(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2))

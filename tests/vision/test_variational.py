"""Variational attention, and the labels made of it, against loops over samples and channels."""

import pytest
import torch

from regard.laws.agreement import close
from regard.vision import VariationalAttention, intrinsic_domains
from vision.naive_variational import (
    intrinsic_domains as naive_domains,
)
from vision.naive_variational import (
    is_k_means_fixpoint,
    posterior,
    variational_attention,
)
from vision.shared import filled, gradients, leaves, normal


def weights(layer: VariationalAttention) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    heads = (layer.mean, layer.log_variance)
    biases = dict(zip(("mean_bias", "log_var_bias"), (head.bias for head in heads), strict=True))
    return (layer.down.weight, *(head.weight for head in heads)), biases


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("reduction", [1, 2, 16])
def test_equals_the_loops(reduction: int, training: bool) -> None:
    layer = filled(VariationalAttention(4, reduction=reduction)).train(training)
    (x,) = leaves(normal(1, 3, 4, 2, 3))
    matrices, biases = weights(layer)
    for g, w in zip(layer.posterior(x), posterior(x, *matrices, **biases), strict=True):
        close(g, w)
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    eps = torch.randn(3, 4, dtype=torch.float64) if training else None
    want = variational_attention(x, *matrices, eps=eps, **biases)
    close(got, want)
    inputs = [x, *(p for name, p in layer.named_parameters() if training or "log_variance" not in name)]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


def test_log_variances_are_bounded() -> None:
    layer = filled(VariationalAttention(4))
    matrices, biases = weights(layer)
    x = 1e4 * normal(1, 2, 4, 2, 2).abs()
    _, found = layer.posterior(x)
    close(found, posterior(x, *matrices, **biases)[1])
    assert found.abs().max() == 10


def test_a_gate_is_drawn_once_a_channel() -> None:
    """The same for all places, another in every call, and none at all in evaluation."""
    layer = filled(VariationalAttention(4))
    x = normal(1, 3, 4, 3, 3)
    torch.manual_seed(0)
    drawn = [layer.train()(x) / x for _ in range(2)]
    fixed = [layer.eval()(x) / x for _ in range(2)]
    for gate in (*drawn, *fixed):
        close(gate, gate[:, :, :1, :1].expand_as(gate))
        assert 0 < gate.min() < gate.max() < 1
    assert torch.equal(*fixed)
    assert (drawn[0] - drawn[1]).abs().min() > 1e-6


def test_starts_with_little_noise() -> None:
    torch.manual_seed(0)
    layer = VariationalAttention(32)
    assert (layer.posterior(torch.randn(4, 32, 5, 5))[1] + 4).abs().max() < 1


def test_domains_are_divided_as_the_loops_do() -> None:
    """Two clusters in each of two domains, far from each other: any start ends at the same."""
    domain = torch.tensor([3, 1, 3, 1, 3, 1, 3, 1, 1, 3])
    side = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 0])
    means = normal(1, 10, 3) + 20 * side[:, None] + 100 * domain[:, None]
    found = intrinsic_domains(means, domain, 2, seed=4)
    assert sorted(found.unique().tolist()) == [0, 1, 2, 3]
    starts = []
    for d, first in ((1, 0), (3, 2)):  # the loops start where the found clusters' first points are
        here = means[domain == d], found[domain == d]
        starts.append(torch.stack([here[0][here[1] == first + k][0] for k in range(2)]))
    assert torch.equal(found, naive_domains(means, (domain == 3).long(), starts))
    for d in (1, 3):
        assert len({(int(a), int(b)) for a, b in zip(found[domain == d], side[domain == d], strict=True)}) == 2
    assert torch.equal(found, intrinsic_domains(means, domain, 2, seed=4))


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_a_fixed_point(seed: int) -> None:
    means, domain = normal(2, 40, 2), torch.zeros(40, dtype=torch.long)
    found = intrinsic_domains(means, domain, 3, seed=seed)
    assert len(found.unique()) == 3
    assert is_k_means_fixpoint(means, found, 3)


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"reduction is too small \(got 0\)"):
        VariationalAttention(4, reduction=0)
    with pytest.raises(ValueError, match=r"domain has too few samples of 1 \(got 1\); expected 2 at least"):
        intrinsic_domains(torch.zeros(3, 2), torch.tensor([0, 0, 1]), 2)
    with pytest.raises(ValueError, match=r"domain is no label a row \(got \(2,\)\); expected \(3,\) integers"):
        intrinsic_domains(torch.zeros(3, 2), torch.tensor([0, 0]), 2)
    layer = VariationalAttention(4)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 4, Y, X\)"):
        layer.posterior(torch.zeros(1, 5, 2, 2))
    assert layer(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)

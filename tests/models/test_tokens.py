"""The host of many tasks: causal where its mixers are, and without positions unless they are asked for."""

import pytest
import torch
from torch import nn

import regard
from regard.models.tokens import AfterConvolution, Mean, OnMaps, TokenModel


class Nothing(nn.Module):
    def forward(self, x, *others):
        return torch.zeros_like(x)


def host(mixers, **options):
    torch.manual_seed(0)
    return TokenModel(nn.Linear(3, 8), mixers, nn.Linear(8, 5), dim=8, mlp_dim=12, **options).double().eval()


X = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_positions_are_there_where_asked_for():
    def permuted(**options):
        model = host([Nothing()], **options)
        return (model(X.flip(1)) - model(X).flip(1)).abs().max()

    assert permuted() < 1e-12
    assert permuted(positions=7) > 1e-2


def test_shorter_examples_have_the_first_positions():
    model = host([Nothing()], positions=7)
    torch.testing.assert_close(model(X[:, :4]), model(X)[:, :4])


def test_a_pooler_makes_one_of_all():
    model = host([Nothing(), Nothing()], pool=Mean())
    assert model(X).shape == (2, 5)
    torch.testing.assert_close(model(X), model(X.flip(1)))
    assert model.mixers == [block.mixer for block in model.blocks]


def test_the_mechanism_is_what_was_handed_in():
    inner, pool = Nothing(), nn.Linear(8, 8)
    assert host([AfterConvolution(inner, 8)]).mixers == [inner]
    assert host([OnMaps(inner, (7, 1))]).mixers == [inner]
    assert host([Nothing()], pool=pool).mixers == [pool]


def test_what_else_there_is_reaches_every_mixer():
    seen = []

    class Looks(nn.Module):
        def forward(self, x, edges):
            seen.append(edges)
            return x

    edges = torch.zeros(2, 4, dtype=torch.long)
    host([Looks(), Looks()])(X[0], edges)
    assert [e is edges for e in seen] == [True, True]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_convolution_sees_back_and_not_ahead(width):
    layer = AfterConvolution(nn.Identity(), 8, width).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    for t in range(9):
        (grad,) = torch.autograd.grad(layer(x)[0, t].sum(), x)
        assert grad[0].ne(0).any(1).nonzero()[:, 0].tolist() == list(range(max(0, t - width + 1), t + 1))


def test_a_causal_mixer_makes_a_causal_host():
    mixers = [AfterConvolution(regard.create("softmax", dim=8, num_heads=2, causal=True), 8) for _ in range(2)]
    model, changed = host(mixers), X.clone()
    changed[:, 4] += 1
    before, after = model(X), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax((0, 2)).gt(1e-6).all()

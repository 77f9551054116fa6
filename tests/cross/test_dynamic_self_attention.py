"""Dynamic self-attention against loops whose author saw the equations only. No numbers of the authors exist."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from cross.naive_dynamic_self_attention import naive_dynamic_self_attention, naive_pair_features, naive_route
from regard.cross.dynamic_self_attention import DynamicSelfAttention, pair_features, route
from regard.laws.agreement import close, close_all, run


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Naive(nn.Module):
    """The loops, with the layer's parameters under the same names."""

    def __init__(self, layer: DynamicSelfAttention) -> None:
        super().__init__()
        self.v_proj, self.layer = layer.v_proj, [layer]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (at,) = self.layer
        return naive_dynamic_self_attention(
            x,
            self.v_proj.weight,
            self.v_proj.bias,
            num_attentions=at.num_attentions,
            keep=mask,
            iterations=at.iterations,
            slope=at.slope,
            detach_weights=at.detach_weights,
        )[0]


@pytest.mark.parametrize("detach_weights", [False, True])
@pytest.mark.parametrize(
    ("T", "A", "D", "iterations", "slope"),
    [(1, 1, 3, 2, 0.01), (5, 2, 4, 1, 0.2), (6, 3, 2, 3, 0.2), (4, 1, 5, 5, 0.01)],
)
def test_equals_the_loops(T: int, A: int, D: int, iterations: int, slope: float, detach_weights: bool) -> None:
    layer = regard.create(
        "dynamic_self_attention",
        dim=4,
        num_heads=2,
        num_attentions=A,
        width=D,
        iterations=iterations,
        slope=slope,
        detach_weights=detach_weights,
    ).double()
    x = 2 * normal(T, 3, T, 4)
    close_all(run(layer, x), run(Naive(layer), x))
    keep = torch.rand(3, T, generator=torch.Generator().manual_seed(T)) < 0.6
    keep[1] = False
    close_all(run(layer, x, mask=keep), run(Naive(layer), x, mask=keep))


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_routes_as_the_loops(iterations: int) -> None:
    values = normal(7, 2, 3, 5, 4)
    keep = torch.tensor([[True] * 5, [False, True, True, False, True]])
    for mask in (None, keep):
        for got, want in zip(route(values, mask, iterations=iterations), naive_route(values, mask, iterations)):
            close(got, want)


def test_rounds_come_closer_to_what_most_tokens_agree_on() -> None:
    """5 words say one thing, 7 each something else; weights without a query find the 5."""
    layers = [DynamicSelfAttention(16, num_attentions=1, width=16, iterations=r, slope=1.0).double() for r in (1, 2, 3)]
    topic = nn.functional.normalize(normal(0, 20, 1, 16), dim=-1)
    words = 2 * nn.functional.normalize(normal(1, 20, 12, 16), dim=-1)
    words[:, :5] = 2 * topic + 0.1 * normal(2, 20, 5, 16)
    found = []
    for layer in layers:
        with torch.no_grad():
            layer.v_proj.weight.copy_(torch.eye(16))
            layer.v_proj.bias.zero_()
        found.append(nn.functional.cosine_similarity(layer(words), torch.tanh(2 * topic[:, 0]), dim=-1).mean())
    assert found[0] < found[1] - 0.01
    assert found[1] < found[2] - 0.01
    assert found[2] > 0.99


def test_one_round_is_the_mean_and_many_choose() -> None:
    values = normal(1, 4, 1, 5, 5)
    pooled, weights = route(values, iterations=1)
    close(pooled, torch.tanh(values.mean(2)))
    entropies = []
    for r in (1, 2, 3, 5, 10):
        weights = route(2 * values, iterations=r)[1]
        entropies.append(float(-(weights * weights.clamp(min=1e-300).log()).sum(-1).mean()))
    assert entropies[0] == pytest.approx(math.log(5))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < 0.01


def test_all_attentions_have_parameters_of_their_own_in_order() -> None:
    layer, x = DynamicSelfAttention(4, num_attentions=3, width=2).double(), normal(2, 2, 5, 4)
    for a in range(3):
        alone = DynamicSelfAttention(4, num_attentions=1, width=2).double()
        rows = slice(2 * a, 2 * a + 2)
        alone.load_state_dict({"v_proj.weight": layer.v_proj.weight[rows], "v_proj.bias": layer.v_proj.bias[rows]})
        close(layer(x)[:, rows], alone(x))


def test_detached_weights_change_gradients_alone() -> None:
    values = normal(3, 2, 2, 5, 3).requires_grad_()
    (plain, weights), (fixed, _) = route(values), route(values, detach_weights=True)
    assert torch.equal(plain, fixed)
    (got,) = torch.autograd.grad(fixed.sum(), values)
    close(got, weights.detach()[..., None] * (1 - fixed.detach() ** 2)[:, :, None])
    assert (torch.autograd.grad(plain.sum(), values)[0] - got).abs().max() > 1e-3


def test_order_is_free_and_padding_is_as_if_absent() -> None:
    layer = DynamicSelfAttention(6, num_attentions=2, width=3, iterations=3).double()
    x = normal(2, 2, 5, 6)
    close(layer(x.flip(1)), layer(x))
    padded = torch.cat([x, torch.full((2, 2, 6), torch.nan, dtype=torch.float64)], 1)
    keep = (torch.arange(7) < 5).expand(2, 7)
    for mask in (keep, keep[:, None, None], regard.masks.padding(keep)):
        close_all(
            {k: v[:, :5] if k == "input0" else v for k, v in run(layer, padded, mask=mask).items()}, run(layer, x)
        )
    assert not layer(x, mask=torch.zeros(2, 5, dtype=torch.bool)).any()
    assert not layer(x[:, :0]).any()


def test_nan_reaches_its_own_sample_only() -> None:
    layer, x = DynamicSelfAttention(6, width=3).double(), normal(3, 2, 5, 6)
    x[0, 1, 2] = torch.inf
    out = layer(x)
    assert out[0].isnan().all()
    close(out[1:], layer(x[1:]))


def test_features_of_a_pair() -> None:
    h, p = normal(4, 3, 5), normal(5, 3, 5)
    close(pair_features(h, p), naive_pair_features(h, p))
    with pytest.raises(ValueError, match=r"second has the wrong shape \(got \(3, 4\)\); expected \(3, 5\)"):
        pair_features(h, p[:, :4])


def test_is_built_as_written() -> None:
    layer = regard.create("dynamic_self_attention", dim=16, num_heads=2)
    assert layer(torch.zeros(1, 3, 16)).shape == (1, 2400)
    assert (layer.num_attentions, layer.width, layer.iterations, layer.slope) == (8, 300, 2, 0.01)
    assert not layer.detach_weights
    assert sum(p.numel() for p in layer.parameters()) == 17 * 2400, "a projection and nothing more"
    assert 0.2 < float(layer.v_proj.weight.detach().abs().max()) <= 0.25  # uniform within 1 / sqrt(16)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"iterations": 0}, "iterations is too small"),
        ({"iterations": 101}, "iterations is too large"),
        ({"num_attentions": 0}, "num_attentions is too small"),
        ({"width": 0}, "width is too small"),
        ({"slope": math.nan}, "slope is out of range"),
    ],
)
def test_refuses(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regard.create("dynamic_self_attention", dim=8, num_heads=2, **wrong)


def test_refuses_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="causal"):
        regard.create("dynamic_self_attention", dim=12, num_heads=4, causal=True)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 8\)\); expected \(B, T, M = 12\)"):
        DynamicSelfAttention(12)(torch.zeros(2, 3, 8))
    with pytest.raises(TypeError, match="detach_weights has the wrong type"):
        DynamicSelfAttention(12, detach_weights=1)

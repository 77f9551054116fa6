"""Dynamic convolution attention against loops, and the paper's claims: forward, by place alone, to any length."""

import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor, nn

import regard
from recurrent.naive_location import naive_dca, naive_location
from regard.laws.agreement import close, close_all, run, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import DynamicConvolutionAttention
from regard.recurrent.dynamic_convolution import beta_binomial

SMALL = {"hidden": 4, "static_filters": 3, "dynamic_filters": 2, "filter_length": 5, "prior_length": 4}


def build(dim: int, **options: int) -> DynamicConvolutionAttention:
    torch.manual_seed(3)
    layer = DynamicConvolutionAttention(dim, **{**SMALL, **options}).double()  # type: ignore[arg-type]
    perturb(layer, size=0.5)
    return layer


class Naive(nn.Module):
    def __init__(self, layer: DynamicConvolutionAttention, keep: Tensor | None = None) -> None:
        super().__init__()
        self.filter_hidden, self.filter_out, self.static_filter = (
            layer.filter_hidden,
            layer.filter_out,
            layer.static_filter,
        )
        self.static_proj, self.dynamic_proj, self.score = layer.static_proj, layer.dynamic_proj, layer.score
        self.keep, self.prior = keep, list(layer.prior)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        alpha = torch.zeros(context.shape[:2], dtype=x.dtype)
        alpha[:, 0] = 1
        weights = naive_dca(
            x,
            alpha,
            self.static_filter,
            self.filter_hidden.weight,
            self.filter_hidden.bias,
            self.filter_out.weight,
            self.static_proj.weight,
            self.dynamic_proj.weight,
            self.dynamic_proj.bias,
            self.score,
            self.keep,
            Kd=self.static_filter.shape[1],
            prior=self.prior,
        )
        return naive_location(weights, context)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 7), (3, 2)])
def test_equals_the_loops(T: int, S: int) -> None:
    """S = 2 is shorter than every filter."""
    layer = build(3, context_dim=4)
    given = tokens(2, T, dim=3), tokens(2, S, dim=4, seed=8)
    close_all(run(layer, *given), run(Naive(layer), *given))


@pytest.mark.parametrize("length", [1, 4, 11])
def test_prior_is_beta_binomial(length: int) -> None:
    got = torch.tensor(beta_binomial(length, 0.1, 0.9), dtype=torch.float64)
    close(got, torch.from_numpy(betabinom.pmf(range(length), length - 1, 0.1, 0.9)))
    assert abs(beta_binomial(11, 0.1, 0.9)[0] - 0.740) < 5e-4


def test_without_energies_the_prior_moves_one_place_a_step() -> None:
    layer = build(3, prior_length=11)
    nn.init.zeros_(layer.score)
    alpha = layer.weights(tokens(1, 8, dim=3), tokens(1, 200, dim=3))
    mean = alpha @ torch.arange(200, dtype=torch.float64)
    assert (mean - torch.arange(1, 9)).abs().max() < 0.02  # what leaks in at 1e-6 a place has a small part of the mass


def test_steps_are_the_full_pass() -> None:
    layer, x, context = build(3), tokens(2, 7, dim=3), tokens(2, 9, dim=3, seed=8)
    want, (_, _, last) = layer(x, context), layer.step(x, layer.start(x, context))[1]
    for cuts in ([1] * 7, [3, 0, 4], [7]):
        state, out = layer.start(x[:, :0], context), []
        for part in x.split(cuts, 1):
            before = state
            y, state = layer.step(part, state)
            same(layer.step(part, before)[0], y)  # the state is a value
            out.append(y)
        close(torch.cat(out, 1), want)
        close(state.at, last)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(side: str) -> None:
    layer, x, context = build(3), tokens(2, 5, dim=3), tokens(2, 7, dim=3, seed=8)
    pads = torch.full((2, 3, 3), torch.nan, dtype=torch.float64)
    keep = torch.ones(2, 10, dtype=torch.bool)
    where = slice(0, 3) if side == "left" else slice(7, 10)
    keep[:, where] = False
    padded = torch.cat([pads, context] if side == "left" else [context, pads], 1)
    for mask in (keep, regard.masks.padding(keep)):
        got = run(layer, x, padded, mask=mask)
        assert not got["input1"][:, where].any()
        got["input1"] = got["input1"][keep].view(2, 7, 3)
        close_all(got, run(layer, x, context))
    assert not layer(x, context, mask=torch.zeros(2, 7, dtype=torch.bool)).any()


def test_padding_equals_the_loops() -> None:
    layer, keep = build(3), torch.arange(6) < torch.tensor([[4], [6]])
    given = tokens(2, 3, dim=3), tokens(2, 6, dim=3, seed=8)
    close(layer(*given, mask=keep), Naive(layer, keep)(*given))


def test_content_does_not_count_and_places_are_relative() -> None:
    layer, x, context = build(3), tokens(1, 4, dim=3), tokens(1, 40, dim=3, seed=8)
    want = layer.weights(x, context)
    same(layer.weights(x, 7 * context.flip(1)), want)
    state = layer.start(x, context)
    near = layer.advance(x, state.context, None, nn.functional.one_hot(torch.tensor([10]), 40).double())[0]
    far = layer.advance(x, state.context, None, nn.functional.one_hot(torch.tensor([15]), 40).double())[0]
    assert (near[..., 6:20] - far[..., 11:25]).abs().max() < 1e-3 * near.max()  # but for the leak at both ends


def test_nan_reaches_what_follows() -> None:
    layer, x, context = build(3), tokens(2, 4, dim=3), tokens(2, 6, dim=3, seed=8)
    x[0, 2, 0], context[1, 3, 0] = torch.nan, torch.inf
    assert layer(x, context).isnan().all(-1).tolist() == [[False, False, True, True], [True] * 4]


def test_generalises_to_longer_sequences() -> None:
    """Learns to read a sequence of 8 in order, one a step; then reads one of 80, which it never saw."""
    torch.manual_seed(0)
    layer = DynamicConvolutionAttention(
        2, context_dim=8, hidden=16, static_filters=4, dynamic_filters=4, filter_length=7
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)

    def error(length: int) -> Tensor:
        context = torch.randn(8, length, 8)
        x = torch.ones(8, length - 1, 2)
        return nn.functional.mse_loss(layer(x, context), context[:, 1:])

    before = float(error(80).detach())
    for _ in range(80):
        optimizer.zero_grad()
        error(8).backward()
        optimizer.step()
    with torch.no_grad():
        alpha = layer.weights(torch.ones(1, 79, 2), torch.zeros(1, 80, 8))
        assert error(80) < 0.05 < 0.5 < before
    assert alpha.argmax(-1).tolist() == [list(range(1, 80))]


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"filter_length is even \(got 4\); expected an odd int"):
        DynamicConvolutionAttention(3, filter_length=4)
    with pytest.raises(ValueError, match=r"hidden is too small \(got 0\); expected an int >= 1"):
        DynamicConvolutionAttention(3, hidden=0)
    with pytest.raises(ValueError, match=r"prior_length is too large \(got 1001\); expected an int from 1 to 1000"):
        DynamicConvolutionAttention(3, prior_length=1001)
    with pytest.raises(ValueError, match=r"prior_alpha is out of range \(got 0.0\); expected a finite number > 0"):
        DynamicConvolutionAttention(3, prior_alpha=0.0)
    with pytest.raises(ValueError, match=r"context has .*\(got \(2, 6, 4\)\); expected \(B = 2, S, C = 3\)"):
        build(3)(tokens(2, 4, dim=3), tokens(2, 6, dim=4))
    with pytest.raises(ValueError, match="causal"):
        regard.create("dynamic_convolution_attention", dim=4, num_heads=2, causal=True)

"""GMM attention against loops, and the paper's claims: it moves forward, by place alone, to any length."""

import math

import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent.naive_location import naive_gmm, naive_location
from regard.laws.agreement import close, close_all, run, same
from regard.laws.subject import perturb, tokens
from regard.recurrent import GMMAttention


def build(dim: int, **options: object) -> GMMAttention:
    torch.manual_seed(3)
    layer = GMMAttention(dim, **{"hidden": 4, "components": 3, "biased": False, **options}).double()  # type: ignore
    perturb(layer, size=0.5)
    return layer


class Naive(nn.Module):
    def __init__(self, layer: GMMAttention) -> None:
        super().__init__()
        self.hidden, self.mixture, self.version = layer.hidden, layer.mixture, layer.version.upper()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        raw = self.mixture(torch.tanh(self.hidden(x)))
        return naive_location(naive_gmm(raw, context.shape[1], version=self.version)[0], context)


@pytest.mark.parametrize("version", ["v0", "v1", "v2"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 7), (3, 2)])
def test_equals_the_loops(version: str, T: int, S: int) -> None:
    layer = build(3, context_dim=4, version=version)
    given = tokens(2, T, dim=3), tokens(2, S, dim=4, seed=8)
    close_all(run(layer, *given), run(Naive(layer), *given))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_biased_start(version: str) -> None:
    """At first every mean moves by 1 a step, with a width of 10."""
    layer = GMMAttention(3, components=1, version=version, biased=True).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.mixture.weight.zero_()
    alpha = layer.weights(tokens(1, 30, dim=3), tokens(1, 60, dim=3))
    assert alpha.argmax(-1).tolist() == [list(range(1, 31))]
    assert abs(float(alpha[0, 20, 21]) * math.sqrt(2 * math.pi) * 10 - 1) < 1e-5
    assert abs(float(alpha[0, 20, 31] / alpha[0, 20, 21]) - math.exp(-0.5)) < 1e-5


def test_means_only_move_forward() -> None:
    layer = build(3)
    x, context = tokens(2, 9, dim=3), tokens(2, 5, dim=3)
    state, means = layer.start(x, context), []
    for part in x.split(1, 1):
        _, state = layer.step(part, state)
        means.append(state.at)
    assert (torch.stack(means).diff(dim=0) > 0).all()


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


def test_content_does_not_count() -> None:
    layer, x, context = build(3), tokens(1, 4, dim=3), tokens(1, 40, dim=3, seed=8)
    same(layer.weights(x, 7 * context.flip(1)), layer.weights(x, context))
    close(layer(x, context + 7 * context.flip(1)), layer(x, context) + 7 * layer(x, context.flip(1)))  # linear in it


def test_nan_reaches_what_follows() -> None:
    layer, x, context = build(3), tokens(2, 4, dim=3), tokens(2, 6, dim=3, seed=8)
    x[0, 2, 0], context[1, 3, 0] = torch.nan, torch.inf
    assert layer(x, context).isnan().all(-1).tolist() == [[False, False, True, True], [True] * 4]


def test_generalises_to_longer_sequences() -> None:
    """Learns to read a sequence of 12 in order, one a step; then reads one of 80, which it never saw."""
    torch.manual_seed(0)
    layer = GMMAttention(8, hidden=16, components=1)
    query = nn.Parameter(torch.ones(8))  # the same at every step: only the place can tell what comes next
    optimizer = torch.optim.Adam([query, *layer.parameters()], lr=2e-2)

    def error(length: int) -> Tensor:
        context = torch.randn(8, length, 8)
        return nn.functional.mse_loss(layer(query.expand(8, length - 1, 8), context), context[:, 1:])

    before = float(error(80).detach())
    for _ in range(300):
        optimizer.zero_grad()
        error(12).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(80) < 0.05 < 0.5 < before
        alpha = layer.weights(query.expand(1, 79, 8), torch.zeros(1, 80, 8))
    assert alpha.argmax(-1).tolist() == [list(range(1, 80))]


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"version is unknown \(got 'v3'\); expected one of 'v0', 'v1', 'v2'"):
        GMMAttention(3, version="v3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"version has no biased start \(got 'v0' .*expected biased=False"):
        GMMAttention(3, version="v0")
    with pytest.raises(ValueError, match=r"components is too small \(got 0\); expected an int >= 1"):
        GMMAttention(3, components=0)
    with pytest.raises(ValueError, match="causal"):
        regard.create("gmm_attention", dim=4, num_heads=2, causal=True)

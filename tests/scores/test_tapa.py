"""Token-aware phase attention against loops by one who saw a summary only, neither code nor test (naive_tapa.py)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.scores.tapa import TokenAwarePhase, tapa_scores
from scores import naive_tapa as naive

OPTIONS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.7},
    {"theta": 0.25},
    {"phase": "linear"},
    {"alpha": 2.0, "theta": 0.75, "phase": "linear"},
]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T: int = 4, S: int = 6, D: int = 8) -> list[Tensor]:
    return [normal(n, 2, *shape).requires_grad_() for n, shape in enumerate(((4, T, D), (2, S, D), (2, S, 3)))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_definition(options: dict[str, Any], causal: bool) -> None:
    q, k, v = inputs()
    keep = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    mask = masks.padding(keep) & (masks.causal() if causal else masks.full())
    want, weights = naive.tapa(q, k, v, **options, causal=causal, allowed=keep[:, None].expand(-1, 4, -1))
    g = normal(9, *want.shape)
    of_loops = torch.autograd.grad((want * g).sum(), [q, k, v])
    for kernel in ("auto", "eager"):
        got = regard.attention(q, k, v, mask=mask, score=TokenAwarePhase(8, **options), kernel=kernel)
        close(got, want, "out")
        for mine, theirs in zip(torch.autograd.grad((got * g).sum(), [q, k, v]), of_loops, strict=True):
            close(mine, theirs, "gradient")
    one = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    close(regard.attention(q, k, one, mask=mask, score=TokenAwarePhase(8, **options)), weights, "weights")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_layer_hands_its_heads_to_it(options: dict[str, Any]) -> None:
    layer = regard.create("tapa", dim=16, num_heads=2, causal=True, **options).double()
    x = normal(3, 2, 5, 16)
    q, k, v = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = layer.o_proj(naive.tapa(q, k, v, **options)[0].transpose(1, 2).flatten(2))
    close(layer(x), want, "out")
    state, outs = layer.init_state(2, 5), []
    for t in range(5):
        y, state = layer.step(x[:, t : t + 1], state)
        outs.append(y)
    close(torch.cat(outs, 1), want, "stream")


def test_one_pair_by_hand() -> None:
    """D = 2: amplitude 2 * 3, phase 0.25 * 0.5; an eighth of a turn at distance 1, none at distance 0."""
    q, k = (torch.tensor(z, dtype=torch.float64)[None, None, None] for z in ([2.0, 0.25], [3.0, 0.5]))
    at = torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([[16.0]])
    near, next_one, far = (float(tapa_scores(q, k, d, alpha=0.5, amplitude=1)) for d in at)
    assert near == 6.0
    assert next_one == pytest.approx(6 * math.sqrt(0.5), abs=1e-14)
    assert far == pytest.approx(6 * math.cos(2 * math.pi * 4 / 8), abs=1e-14)


def test_without_phases_it_is_plain_attention_of_the_amplitudes() -> None:
    q, k, v = inputs()
    q = torch.cat([q[..., :4], torch.zeros_like(q[..., 4:])], -1)
    got = regard.attention(q, k, v, score=TokenAwarePhase(8))
    close(got, regard.attention(q[..., :4], k[..., :4], v), "out")


def test_scores_have_no_mean_at_a_distance_and_keep_their_spread() -> None:
    """Keys alike their queries: q ~ N(0, 1), k = 0.6 q + 0.8 noise."""
    part, draws, far = TokenAwarePhase(16), 20000, (0, 1, 16, 1024, 65536)
    q = normal(0, draws, 1, 1, 16)
    k = 0.6 * q + 0.8 * normal(1, draws, 1, 1, 16)
    mean, square = [], []
    for distance in far:
        rows = regard.stages.Rows(q, k, q @ k.mT / 4, i=torch.tensor([distance]), j=torch.tensor([0]))
        scores = part(rows, 0.25)
        mean.append(float(scores.mean()))
        square.append(float(scores.square().mean()))
    assert mean[0] == pytest.approx(0.6 * 8 / math.sqrt(8), abs=0.03)
    assert max(map(abs, mean[1:])) < 0.03
    assert square[1:] == pytest.approx([square[0] / 2] * 4, rel=0.06)


def test_phases_are_computed_in_float32() -> None:
    """A product of 40 turns at a distance is a phase that bfloat16 can't hold."""
    q, k = normal(1, 1, 1, 3, 64).bfloat16() * 3, normal(2, 1, 1, 3, 64).bfloat16() * 3
    at = torch.tensor([[1000.0] * 3] * 3)
    got = tapa_scores(q, k, at, alpha=0.3, amplitude=32)
    assert got.dtype == torch.float32
    exact = tapa_scores(q.double(), k.double(), at, alpha=0.3, amplitude=32)
    assert (got - exact).abs().max() < 2e-3 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": 0.0}, ValueError, "TokenAwarePhase: alpha is out of range"),
        ({"theta": 1.0}, ValueError, "TokenAwarePhase: theta is out of range"),
        ({"theta": 0.3}, ValueError, r"TokenAwarePhase: theta cuts no whole number of 8 channels \(got 0.3\)"),
        ({"phase": "cubic"}, ValueError, "TokenAwarePhase: phase is unknown"),
        ({"theta": "half"}, TypeError, "TokenAwarePhase: theta has the wrong type"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        regard.create("tapa", dim=16, num_heads=2, **options)
    with pytest.raises(ValueError, match="TokenAwarePhase: q has the wrong shape"):
        regard.attention(*inputs(), score=TokenAwarePhase(4))

"""Sink logits against a loop in Python floats and gpt-oss's attention in transformers."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import masks
from regard.kernels.native import build
from regard.kernels.problem import log_sums
from regard.normalizers import SinkSoftmax, SoftmaxOne, sink_softmax
from regard.pipeline.function import problem

VECTORS = Path(__file__).parents[1] / "vectors" / "sinks_and_cap.npz"
compiled = pytest.mark.skipif(bool(build.why_not()), reason="no compiler")
BAND = masks.causal() & masks.window(3)


def inputs(*, T: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(2, heads, n, 4, generator=g, dtype=torch.float64) for heads, n in ((4, T), (2, 7), (2, 7))]
    return [z.to(dtype).requires_grad_() for z in made]


def sinks() -> SinkSoftmax:
    part = SinkSoftmax(4).double()
    with torch.no_grad():
        part.sinks.copy_(torch.tensor([-1.0, 0.0, 0.7, 3.0]))
    return part


def oracle(scores: Tensor, b: list[float], allowed: Tensor) -> Tensor:
    """exp(s) / (exp(b) + sum of exp(s)), one row at a time."""
    weights = torch.zeros_like(scores)
    for h in range(scores.shape[1]):
        for t in range(scores.shape[2]):
            for n in range(scores.shape[0]):
                row = {s: math.exp(float(scores[n, h, t, s])) for s in range(scores.shape[3]) if allowed[t, s]}
                total = math.exp(b[h]) + sum(row.values())
                for s, e in row.items():
                    weights[n, h, t, s] = e / total
    return weights


def test_is_the_formula() -> None:
    scores = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    allowed = torch.rand(5, 6) < 0.5
    allowed[2] = False
    b = [-2.0, 0.0, 1.5]
    got = sink_softmax(scores, torch.tensor(b, dtype=torch.float64), allowed[None, None])
    torch.testing.assert_close(got, oracle(scores, b, allowed), rtol=1e-12, atol=1e-12)
    assert (got[:, :, 2] == 0).all()
    assert (got.sum(-1) < 1).all()
    one = SoftmaxOne()(scores, allowed[None, None])
    torch.testing.assert_close(one, oracle(scores, [0.0] * 3, allowed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "T"), [("eager", 7), ("chunked", 7), ("decode", 1)])
def test_is_an_extra_key_without_a_value(kernel: str, T: int) -> None:
    """Plain attention, one key more, its score the sink's, its value 0."""
    (q, k, v), part = inputs(T=T), sinks()
    got = regard.attention(q, k, v, mask=BAND, normalizer=part, kernel=kernel)
    scores = q @ k.repeat_interleave(2, 1).mT / 2
    scores = scores.masked_fill(~BAND.dense(T, 7), -torch.inf)
    weights = torch.cat([part.sinks[:, None, None].expand(2, 4, T, 1), scores], -1).softmax(-1)
    want = weights @ F.pad(v.repeat_interleave(2, 1), (0, 0, 1, 0))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_is_gpt_oss_attention(kernel: str) -> None:
    """Outputs and gradients, those of the sinks too, of the function in transformers."""
    oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    (q, k, v), part = inputs(), sinks()
    module = SimpleNamespace(num_key_value_groups=2, sinks=part.sinks, training=False)
    allowed = BAND.dense(7, 7)
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    want = oss.eager_attention_forward(module, q, k, v, added, scaling=0.4)[0].transpose(1, 2)
    got = regard.attention(q, k, v, mask=BAND, scale=0.4, normalizer=part, kernel=kernel)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    w = torch.randn_like(got)
    given = (q, k, v, part.sinks)
    for a, b in zip(*(torch.autograd.grad((z * w).sum(), given) for z in (got, want)), strict=True):
        assert float(b.abs().max()) > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_gives_the_golden_numbers(kernel: str) -> None:
    """Those of gpt-oss's function, kept: outputs and gradients."""
    z = {name: torch.from_numpy(array) for name, array in np.load(VECTORS).items()}
    part = SinkSoftmax(4).double()
    part.sinks = nn.Parameter(z["s_sinks"])
    q, k = (z[f"s_{name}"].requires_grad_() for name in "qk")
    out = regard.attention(q, k, z["s_v"], mask=z["s_allow"][None, None], normalizer=part, kernel=kernel)
    torch.testing.assert_close(out, z["s_out"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((out * z["s_w"]).sum(), (q, k, part.sinks))
    for got, name in zip(grads, ("q", "k", "sinks"), strict=True):
        torch.testing.assert_close(got, z[f"s_g{name}"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel", ["chunked", pytest.param("native", marks=compiled)])
def test_kernels_scale_what_softmax_gives(kernel: str) -> None:
    """In float32, with a row that sees nothing and a mask whose tiles the kernels skip."""
    hole = ~masks.blocks(1) & BAND & masks.padding(torch.tensor([[True] * 7, [False] * 3 + [True] * 4]))
    exact, part = inputs(), sinks()
    want = regard.attention(*exact, mask=hole, normalizer=part, kernel="eager")
    given, narrow = [z.detach().float().requires_grad_() for z in exact], sinks().float()
    got = regard.attention(*given, mask=hole, normalizer=narrow, kernel=kernel)
    assert (got[:, :, 0] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    w = torch.randn_like(want)
    ours = torch.autograd.grad((got * w.float()).sum(), [*given, narrow.sinks])
    for a, b in zip(ours, torch.autograd.grad((want * w).sum(), [*exact, part.sinks]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_the_share_is_what_the_weights_sum_to() -> None:
    (q, k, v), part = inputs(), sinks()
    lse = log_sums(problem(q, k, v, mask=~masks.blocks(1) & BAND))
    assert (lse[:, :, 0] == -torch.inf).all()
    rows = regard.attention(q, k, torch.ones_like(v), mask=~masks.blocks(1) & BAND, normalizer=part, kernel="eager")
    torch.testing.assert_close(part.share(lse), rows[..., 0], rtol=1e-12, atol=1e-12)


def test_a_sink_of_minus_infinity_is_softmax() -> None:
    (q, k, v), part = inputs(), sinks()
    nn.init.constant_(part.sinks, -math.inf)
    for kernel in ("eager", "chunked"):
        got = regard.attention(q, k, v, mask=BAND & ~masks.blocks(1), normalizer=part, kernel=kernel)
        want = regard.attention(q, k, v, mask=BAND & ~masks.blocks(1), kernel="eager")
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert all(z.isfinite().all() for z in torch.autograd.grad(got.sum(), (q, k, v)))


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_second_derivatives(kernel: str) -> None:
    q, k, v = (z[:1, :2, :3, :2].detach().requires_grad_() for z in inputs())
    part = SinkSoftmax(2).double()

    def run(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=masks.causal(), normalizer=part, kernel=kernel)

    assert torch.autograd.gradcheck(run, (q, k, v, part.sinks))
    assert torch.autograd.gradgradcheck(run, (q, k, v, part.sinks))


def test_a_head_learns_to_add_nothing() -> None:
    """Only the sinks are trained: outputs go to 0, which no weights that sum to 1 can give of values far from 0."""
    torch.manual_seed(0)
    layer = regard.create("sink_softmax", dim=8, num_heads=2).double()
    x = torch.randn(4, 6, 8, dtype=torch.float64) + 3
    before = float(layer(x).detach().square().mean())
    optimizer = torch.optim.Adam(layer.normalizer.parameters(), lr=0.3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-2 * before
    assert (layer.normalizer.sinks > 3).all()


def test_where_no_key_fits_next_to_nothing_is_put_out() -> None:
    """Queries that point away from every key: the more so, the less; where one fits, it is softmax but for 1 part."""
    layer = regard.create("softmax_one", dim=4, num_heads=1).double()
    for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        nn.init.eye_(proj.weight)
    away = torch.tensor([[[10.0, 0, 0, 0], [-10.0, 0, 0, 0]]], dtype=torch.float64)
    x, context = away[:, :1], away[:, 1:].expand(1, 5, 4)
    assert float(layer(x, context).detach().abs().max()) < 1e-15
    torch.testing.assert_close(layer(x, -context), -context[:, :1], rtol=1e-12, atol=1e-12)


def test_starts_neutral() -> None:
    torch.manual_seed(0)
    plain = regard.create("softmax", dim=8, num_heads=2).double()
    layer = regard.create("sink_softmax", dim=8, num_heads=2).double()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    far = float((layer(x) - plain(x)).detach().abs().max())
    layer.normalizer.start_neutral()
    assert float((layer(x) - plain(x)).detach().abs().max()) < 0.01 * far

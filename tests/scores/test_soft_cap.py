"""Soft-capped scores against their formula in Python floats and Gemma 2's attention in transformers."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels.native import build
from regard.positions import Alibi
from regard.scores.soft_cap import SoftCap, soft_cap

VECTORS = Path(__file__).parents[1] / "vectors" / "sinks_and_cap.npz"
compiled = pytest.mark.skipif(bool(build.why_not()), reason="no compiler")


def inputs(*, G: int = 2, large: float = 3.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=g, dtype=torch.float64) for heads in (4, G, G))
    return [z.to(dtype).requires_grad_() for z in (large * q, k, v)]


def oracle(q: Tensor, k: Tensor, v: Tensor, cap: float, scale: float, bias: Tensor | None = None) -> Tensor:
    """Pair by pair, causal: s = cap tanh((scale q.k + bias) / cap), then softmax over the past."""
    q, k, v = q.detach(), k.detach(), v.detach()
    (B, H, T, D), group = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                weights = []
                for s in range(t + 1):
                    dot = scale * sum(float(q[b, h, t, d]) * float(k[b, h // group, s, d]) for d in range(D))
                    dot += 0.0 if bias is None else float(bias[h, t, s])
                    weights.append(math.exp(cap * math.tanh(dot / cap)))
                for s, weight in enumerate(weights):
                    out[b, h, t] += weight / sum(weights) * v[b, h // group, s]
    return out


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
def test_is_the_formula(kernel: str, cap: float) -> None:
    q, k, v = inputs()
    got = regard.attention(q, k, v, mask=masks.causal(), score_mix=SoftCap(cap=cap), scale=0.4, kernel=kernel)
    torch.testing.assert_close(got, oracle(q, k, v, cap, 0.4), rtol=1e-12, atol=1e-12)


def test_a_bias_is_capped_with_the_score() -> None:
    q, k, v = inputs(G=4)
    i, j = torch.arange(7)[:, None], torch.arange(7)
    slopes = torch.tensor([2 ** (-8 * (h + 1) / 4) for h in range(4)], dtype=torch.float64)
    bias = slopes[:, None, None] * (j - i)
    slots = {"score_mix": SoftCap(cap=1.5), "position": Alibi(4).double()}
    got = regard.attention(q, k, v, mask=masks.causal(), **slots)
    torch.testing.assert_close(got, oracle(q, k, v, 1.5, 0.5, bias), rtol=1e-12, atol=1e-12)


def test_is_gemma_2s_attention() -> None:
    """Outputs and gradients of the function in transformers, whose mask is added after the cap."""
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    q, k, v = inputs()
    module = SimpleNamespace(num_key_value_groups=2, head_dim=4, training=False)
    allowed = (masks.causal() & masks.window(3)).dense(7, 7)
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    # It rounds weights through float32, so all is compared at that precision.
    want, _ = gemma.eager_attention_forward(module, q, k, v, added, scaling=0.4, softcap=1.5)
    want = want.transpose(1, 2)
    got = regard.attention(q, k, v, mask=masks.causal() & masks.window(3), scale=0.4, score_mix=SoftCap(cap=1.5))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    w = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((z * w).sum(), (q, k, v)) for z in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_gives_the_golden_numbers(kernel: str) -> None:
    """Those of Gemma 2's function, kept, which rounds its weights through float32."""
    z = {name: torch.from_numpy(array) for name, array in np.load(VECTORS).items()}
    q, k = (z[f"c_{name}"].requires_grad_() for name in "qk")
    cap = SoftCap(cap=float(z["c_cap"]))
    slots = {"mask": z["c_allow"][None, None], "scale": float(z["c_scale"]), "score_mix": cap, "kernel": kernel}
    out = regard.attention(q, k, z["c_v"], **slots)
    torch.testing.assert_close(out, z["c_out"], rtol=1e-6, atol=1e-6)
    for got, name in zip(torch.autograd.grad((out * z["c_w"]).sum(), (q, k)), "qk", strict=True):
        torch.testing.assert_close(got, z[f"c_g{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["chunked", pytest.param("native", marks=compiled)])
def test_gradients_in_tiles_are_those_of_the_formula(kernel: str) -> None:
    """Scores from far inside the cap to far beyond it."""
    exact = inputs(large=20.0)
    mask = masks.causal() & masks.window(4)
    slots = {"mask": mask, "score_mix": SoftCap(cap=2.0)}
    given = [z.detach().float().requires_grad_() for z in exact]
    got = regard.attention(*given, **slots, kernel=kernel)
    want = regard.attention(*exact, **slots, kernel="eager")
    w = torch.randn_like(want)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad((got * w.float()).sum(), given), torch.autograd.grad((want * w).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert float(b.abs().max()) > 1e-2
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_nearly_nothing_changes_below_the_cap() -> None:
    scores = torch.linspace(-1, 1, 9, dtype=torch.float64)
    off = (soft_cap(scores, 50.0) - scores).abs()
    assert 0 < float(off.max()) <= 1 / (3 * 50.0**2)  # tanh x = x - x^3 / 3 + ..


def test_no_key_takes_all() -> None:
    torch.manual_seed(0)
    layer = regard.create("soft_cap", dim=8, num_heads=2, cap=1.0).double()
    x = 1000 * torch.randn(1, 6, 8, dtype=torch.float64)
    weights = regard.inspect.effective_weights(layer, x)
    most, least = weights.amax(-1), weights.amin(-1)
    assert float((most / least).max()) <= math.exp(2.0) * (1 + 1e-9)


def test_a_cap_must_be_positive() -> None:
    with pytest.raises(ValueError, match="SoftCap: cap is out of range"):
        SoftCap(cap=0.0)

"""Luong's global attention against loops over steps and places, and OpenNMT's numbers (B091)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from recurrent.naive_luong import naive_luong
from regard.laws.agreement import close, close_all, run
from regard.laws.subject import perturb, tokens
from regard.recurrent import LuongAttention

VECTORS = Path(__file__).parents[1] / "vectors" / "B091.npz"


def weights_of(layer: LuongAttention) -> dict[str, Tensor]:
    """The layer's parameters as the loops name them."""
    score = layer.score
    found = {"Wc": layer.c_proj.weight}
    if score.kind == "general":
        found["Wa"] = score.q_proj.weight.T
    if score.kind == "concat":
        found["Wa"] = torch.cat([score.q_proj.weight, score.k_proj.weight], 1)
        found["va"] = score.vector
    return found


class Naive(nn.Module):
    def __init__(self, layer: LuongAttention, **options: object) -> None:
        super().__init__()
        self.score, self.c_proj = layer.score, layer.c_proj
        self.options = {"score": layer.score.kind, **options}

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return naive_luong(x, context, **weights_of(self), **self.options)  # type: ignore[arg-type]


def build(dim: int, **options: object) -> LuongAttention:
    torch.manual_seed(3)
    layer = LuongAttention(dim, **options).double()  # type: ignore[arg-type]
    perturb(layer, size=0.5)
    return layer


@pytest.mark.parametrize("case", ["full", "pad"])
@pytest.mark.parametrize("score", ["dot", "general", "mlp"])
def test_gives_the_numbers_of_opennmt(score: str, case: str) -> None:
    """Its `mlp` is concat with a bias on the query, and has no tanh at the end."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{score}_"): torch.from_numpy(file[k]) for k in file if k.startswith(score)}
    layer = LuongAttention(5, score="concat" if score == "mlp" else score).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.c_proj.weight.copy_(z["Wc"])
        if score == "general":
            layer.score.q_proj.weight.copy_(z["Wa"])
        if score == "mlp":
            layer.score.q_proj.weight.copy_(z["Wq"])
            layer.score.k_proj.weight.copy_(z["Uk"])
            layer.score.vector.copy_(z["v"].flatten())
            layer.score.q_proj.bias = nn.Parameter(z["bq"].clone())
    h, H = (z[f"{case}_{n}"].requires_grad_() for n in ("h", "H"))
    keep = torch.arange(7) < z[f"{case}_len"][:, None] if case == "pad" else None
    close(layer.weights(h, H, keep).detach(), z[f"{case}_align"])
    if score == "mlp":
        c = layer.weights(h, H, keep) @ H
        out = layer.c_proj(torch.cat([c, h], -1)) + z["bc"]
    else:
        out = layer(h, H, mask=keep)
    close(out.detach(), z[f"{case}_out"])
    grads = torch.autograd.grad((out * z[f"{case}_w"]).sum(), (h, H))
    close(grads[0], z[f"{case}_grad_h"])
    close(grads[1], z[f"{case}_grad_H"])


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (3, 7), (5, 2)])
def test_equals_the_loops(score: str, T: int, S: int) -> None:
    layer = build(5, score=score, context_dim=5 if score == "dot" else 4)
    given = tokens(2, T, dim=5), tokens(2, S, dim=layer.context_dim, seed=8)
    close_all(run(layer, *given), run(Naive(layer), *given))


def test_location_scores_know_no_content() -> None:
    layer = build(5, score="location", max_source=9)
    x, context = tokens(2, 3, dim=5), tokens(2, 7, dim=5, seed=8)
    want = (x @ layer.score.q_proj.weight.T)[..., :7].softmax(-1)
    close(layer.weights(x, context, None), want)
    close(layer.weights(x, -context, None), want)
    with torch.no_grad():
        layer.c_proj.weight[:, 5:] = 0  # the decoder's own state
    close(layer(x, -context), -layer(x, context))
    with pytest.raises(ValueError, match=r"context is too long \(got 10 tokens\); expected at most max_source = 9"):
        layer(x, tokens(2, 10, dim=5))


def test_general_with_the_identity_is_dot() -> None:
    dot, general = build(5, score="dot"), build(5, score="general")
    with torch.no_grad():
        general.score.q_proj.weight.copy_(torch.eye(5))
        general.c_proj.weight.copy_(dot.c_proj.weight)
    given = tokens(2, 3, dim=5), tokens(2, 7, dim=5, seed=8)
    close(general(*given), dot(*given))


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_padding_is_as_if_absent(score: str) -> None:
    layer = build(5, score=score)
    x, context = tokens(2, 3, dim=5), tokens(2, 6, dim=5, seed=8)
    padded = torch.cat([context, torch.full((2, 2, 5), torch.nan, dtype=torch.float64)], 1)
    keep = (torch.arange(8) < 6).expand(2, 8)
    for mask in (keep, keep[:, None, None], regard.masks.padding(keep)):
        got = run(layer, x, padded, mask=mask)
        assert not got["input1"][:, 6:].any()
        got["input1"] = got["input1"][:, :6]
        close_all(got, run(layer, x, context))


def test_nothing_to_see_leaves_the_decoder_state() -> None:
    layer, x = build(5), tokens(2, 3, dim=5)
    want = torch.tanh(x @ layer.c_proj.weight[:, 5:].T)
    close(layer(x, tokens(2, 4, dim=5), mask=torch.zeros(2, 4, dtype=torch.bool)), want)
    close(layer(x, tokens(2, 0, dim=5)), want)


def test_nan_reaches_the_steps_that_see_it() -> None:
    layer, x, context = build(5, score="concat"), tokens(2, 3, dim=5), tokens(2, 6, dim=5, seed=8)
    x[0, 1, 0], context[1, 2, 0] = torch.inf, torch.inf
    got = layer(x, context).isnan().all(-1)
    assert got.tolist() == [[False, True, False], [True, True, True]]


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match=r"score is unknown \(got 'cosine'\); expected one of 'dot', 'general'"):
        LuongAttention(5, score="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score 'dot' needs equal widths \(got 5 and 4\); expected context_dim = dim"):
        LuongAttention(5, context_dim=4, score="dot")
    with pytest.raises(ValueError, match=r"max_source goes with .*\(got None for 'location'\); expected both"):
        LuongAttention(5, score="location")
    with pytest.raises(ValueError, match="mask can only hide keys"):
        build(5)(tokens(2, 3, dim=5), tokens(2, 4, dim=5), mask=regard.masks.causal())
    with pytest.raises(ValueError, match="causal"):
        regard.create("luong", dim=4, num_heads=2, causal=True)

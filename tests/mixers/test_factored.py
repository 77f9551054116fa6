"""Factored attention alone: loops, the authors' numbers, offsets on a ring and on a grid, and streaming.

The loops are naive_factored.py, whose author has read neither the code nor this test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_factored as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.factored import FactoredAttention, offsets

VECTORS = Path(__file__).parents[1] / "vectors" / "B173.npz"
M, H = 12, 4


def numbers(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(**options) -> FactoredAttention:
    made = regard.create("factored", dim=M, num_heads=H, **{"max_length": 9, **options}).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return made


@pytest.mark.parametrize(
    ("case", "heads", "options"),
    [("free", 2, {"max_length": 5}), ("transl", 4, {"grid": (3, 3), "translation_invariant": True})],
)
def test_gives_the_authors_numbers(case: str, heads: int, options: dict) -> None:
    z = numbers(case)
    layer = FactoredAttention(z["x"].shape[-1], heads, **options).double()
    with torch.no_grad():
        for p, name in ((layer.alpha, "alpha"), (layer.v_proj.bias, "bv"), (layer.o_proj.bias, "bo")):
            p.copy_(z[name])
        layer.v_proj.weight.copy_(z["Wv"].T)
        layer.o_proj.weight.copy_(z["Wo"].T)
    x = z["x"].requires_grad_()
    out = layer(x)
    assert (out - z["y"]).abs().max() < 1e-10
    assert torch.equal(layer.scores(x.shape[1]), z["A"])
    grads = torch.autograd.grad((out * z["w"]).sum(), [x, layer.alpha, layer.v_proj.weight])
    for got, want in zip(grads, (z["gx"], z["g_alpha"], z["g_Wv"].T), strict=True):
        assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"translation_invariant": True}, {"max_length": None, "grid": (2, 4), "translation_invariant": True}],
)
def test_is_the_definition(options: dict, causal: bool) -> None:
    layer = filled(causal=causal, **options)
    x = normal(1, 2, layer.max_length, M).requires_grad_()
    alpha = layer.alpha
    if layer.translation_invariant:
        alpha = naive.expand(alpha, layer.grid if "grid" in options else (9,))
    maps = (p for proj in (layer.v_proj, layer.o_proj) for p in (proj.weight, proj.bias))
    got, want, g = layer(x), naive.factored(x, alpha, *maps, causal=causal), normal(2, *x.shape)
    close(got, want, "out")
    of = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((out * g).sum(), of) for out in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_weights_do_not_depend_on_the_input() -> None:
    """The layer is affine, token by token: three inputs add up; and a negative weight subtracts."""
    layer = filled()
    x, y, z = normal(1, 3, 1, 9, M)
    close(layer(x) + layer(y) - layer(z), layer(x + y - z))
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.v_proj.weight.copy_(torch.eye(M))
        layer.o_proj.weight.copy_(torch.eye(M))
        layer.alpha[:, 2, 5], layer.alpha[:, 2, 7] = 1, -1
    assert torch.equal(layer(x)[:, 2], x[:, 5] - x[:, 7]), "a difference, which no average is"


def test_parameters_are_half() -> None:
    """2 M^2 + 2 M + H n, where plain attention with biases has 4 M^2 + 4 M."""
    for invariant, table in ((True, H * 9), (False, H * 81)):
        layer = filled(translation_invariant=invariant)
        assert sum(p.numel() for p in layer.parameters()) == 2 * M * M + 2 * M + table


def test_offsets() -> None:
    """A place and itself is 0; neighbours are near on both sides of the border."""
    at = torch.arange(6)
    ring = offsets(at, at, (1, 6))
    assert ring.tolist() == [[(j - i) % 6 for j in range(6)] for i in range(6)]
    grid = offsets(at, at, (2, 3))
    assert grid[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert grid[5].tolist() == [4, 5, 3, 1, 2, 0], "(1, 2) looks at (0, 0): one row down, one column right"


@pytest.mark.parametrize("grid", [(1, 6), (2, 3), (3, 2)])
def test_a_shifted_lattice_gives_shifted_outputs(grid: tuple[int, int]) -> None:
    layer, x = filled(max_length=None, grid=grid, translation_invariant=True), normal(1, 2, 6, M)
    for step in ((0, 1), (1, 0), (1, 1)):
        rolled = x.unflatten(1, grid).roll(step, (1, 2)).flatten(1, 2)
        close(layer(rolled), layer(x).unflatten(1, grid).roll(step, (1, 2)).flatten(1, 2))


@pytest.mark.parametrize("invariant", [False, True])
def test_shorter_ones_are_as_if_the_rest_were_hidden(invariant: bool) -> None:
    for normalizer in (None, "softmax"):
        layer, x = filled(translation_invariant=invariant, normalizer=normalizer), normal(1, 2, 9, M)
        keep = torch.arange(9).lt(5).expand(2, -1)
        close(layer(x, mask=masks.padding(keep))[:, :5], layer(x[:, :5]))


def test_softmax_makes_an_average() -> None:
    layer = filled(normalizer="softmax")
    x, keep = normal(1, 2, 9, M), torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    weights = layer.weights(9, keep=keep)
    close(weights.sum(-1), torch.ones(2, H, 9).double())
    assert not weights[:, :, :, :][~keep[:, None, None].expand_as(weights)].any()
    want = layer.scores(9)[None].masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
    v = layer.v_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)
    close(layer(x, mask=masks.padding(keep)), layer.o_proj((want @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("options", [{}, {"normalizer": "softmax"}, {"translation_invariant": True}])
def test_steps_equal_the_full_pass(options: dict) -> None:
    layer, x = filled(causal=True, num_kv_heads=2, **options), normal(1, 2, 7, M)
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2] = keep[1, 4] = False
    want, state, outs, at = layer(x, mask=masks.padding(keep)), layer.init_state(2, 7, dtype=torch.float64), [], 0
    for t in (3, 0, 1, 3):
        out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
        outs, at = [*outs, out], at + t
    close(torch.cat(outs, 1)[keep], want[keep])


def test_starting_values() -> None:
    """Glorot as flax has it: an (H, n, n) table counts its heads in both fans, an (H, n) one is a matrix."""
    for options, bound in (
        ({"max_length": 40}, (3 / (8 * 40)) ** 0.5),
        ({"grid": (20, 20), "translation_invariant": True}, (6 / 408) ** 0.5),
    ):
        layer = regard.create("factored", dim=64, num_heads=8, **options)
        assert 0.99 * bound < layer.alpha.detach().abs().max().item() <= bound
        for proj in (layer.v_proj, layer.o_proj):
            assert not proj.bias.any()
            assert 0.99 * (6 / 128) ** 0.5 < proj.weight.detach().abs().max().item() <= (6 / 128) ** 0.5
    layer = regard.create("factored", dim=8, num_heads=2, bias=False)
    assert (layer.max_length, layer.grid, layer.alpha.shape) == (1024, (1, 1024), (2, 1024, 1024))
    assert layer.v_proj.bias is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"max_length": 0}, "max_length is too small"),
        ({"grid": (3, 4)}, r"max_length is not what the grid holds \(got 9\); expected 12, or none"),
        ({"grid": 9}, "grid is no pair of sizes"),
        ({"normalizer": "sparsemax"}, "normalizer is unknown"),
        ({"translation_invariant": 1}, "translation_invariant has the wrong type"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        FactoredAttention(M, H, **{"max_length": 9, **wrong})


def test_refuses_more_tokens_than_its_table() -> None:
    with pytest.raises(ValueError, match=r"factored: x is longer than the table \(got 10\); expected at most"):
        filled()(normal(1, 1, 10, M))
    layer = filled(causal=True)
    _, state = layer.step(normal(1, 1, 8, M), layer.init_state(1, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="is longer than the table"):
        layer.step(normal(1, 1, 2, M), state)

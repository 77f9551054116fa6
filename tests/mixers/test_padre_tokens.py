"""PADRe on sequences against loops, whose author has read neither code nor test, and what makes it a polynomial."""

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.mixers.padre_tokens import PolynomialTokenMixer
from vision import naive_padre as naive

M = 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(**options) -> PolynomialTokenMixer:
    given = {"kernel_size": 3, "causal": False, **options}
    layer = regard.create("padre_tokens", dim=M, num_heads=1, dtype=torch.float64, **given)
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
    return layer


def loops(layer: PolynomialTokenMixer, x: Tensor, keep: Tensor | None = None) -> Tensor:
    first, between = (
        [(m.proj.weight, m.proj.bias, m.weight, m.bias) for m in maps] for maps in (layer.first, layer.between)
    )
    out = None if layer.o_proj is None else (layer.o_proj.weight, layer.o_proj.bias)
    return naive.polynomial_mixer(x, first, between, out, keep=keep, causal=layer.causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"degree": 1, "kernel_size": 5}, {"bias": False, "out_proj": True, "degree": 2}]
)
def test_is_the_definition(options: dict, causal: bool) -> None:
    layer, x = built(causal=causal, **options), normal(1, 2, 7, M).requires_grad_()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2] = keep[1, [3, 6]] = False
    for mask in (None, keep):
        got = layer(x, mask=None if mask is None else masks.padding(mask))
        got, want = got if mask is None else got * mask[..., None], loops(layer, x, mask)
        close(got, want)
        of, direction = [x, *layer.parameters()], normal(2, 2, 7, M)
        for mine, theirs in zip(*(torch.autograd.grad((y * direction).sum(), of) for y in (got, want)), strict=True):
            close(mine, theirs)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_is_a_polynomial_of_its_degree(degree: int) -> None:
    """Differences of order d + 1 along a line are 0, and without biases t x gives t^d y."""
    for causal in (False, True):
        layer, x, step = built(degree=degree, causal=causal), normal(1, 1, 6, M), normal(2, 1, 6, M)
        points = torch.stack([layer(x + n * step) for n in range(degree + 2)])
        assert points.diff(n=degree + 1, dim=0).abs().max() < 1e-10 * points.abs().max()
        assert points.diff(n=degree, dim=0).abs().max() > 0.1
        layer = built(degree=degree, causal=causal, bias=False)
        assert torch.equal(layer(2 * x), 2**degree * layer(x))


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_steps_equal_the_full_pass(kernel_size: int) -> None:
    layer, x = built(causal=True, kernel_size=kernel_size), normal(1, 2, 9, M)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :2] = keep[1, 5] = False
    want, state, outs, at = layer(x, mask=masks.padding(keep)), layer.init_state(2, 9), [], 0
    for t in (1, 0, 3, 5):
        out, state = layer.step(x[:, at : at + t], state, mask=keep[:, at : at + t])
        outs, at = [*outs, out], at + t
        assert state.past.shape == (2, 5, kernel_size - 1, M)
    close(torch.cat(outs, 1)[keep], want[keep])


@pytest.mark.parametrize("causal", [False, True])
def test_nan_goes_where_it_is_seen(causal: bool) -> None:
    """Not through hidden tokens: a gap as wide as a convolution lets nothing pass."""
    layer, x = built(causal=causal, degree=2), normal(1, 1, 11, M)
    keep = torch.ones(1, 11, dtype=torch.bool)
    keep[0, 6:8] = False
    finite = x.clone().requires_grad_()
    rows = layer(finite, mask=masks.padding(keep))[0]
    reached = [bool(torch.autograd.grad(r.sum(), finite, retain_graph=True)[0][0, 4].ne(0).any()) for r in rows]
    x[0, 4] = torch.nan
    got = layer(x, mask=masks.padding(keep))[0].isnan().any(-1)
    assert [bool(n) for n, k in zip(got, keep[0], strict=True) if k] == [
        n for n, k in zip(reached, keep[0], strict=True) if k
    ]
    assert sum(reached) < 6


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("padre_tokens", dim=64, num_heads=1, kernel_size=9)
    assert (len(layer.first), len(layer.between)) == (3, 2)
    for part in (*layer.first, *layer.between):
        assert 0.9 / 3 < float(part.weight.detach().abs().max()) <= 1 / 3
        assert 0.9 / 8 < float(part.proj.weight.detach().abs().max()) <= 1 / 8
    assert sum(p.numel() for p in layer.parameters()) == 5 * (64 * 64 + 64 + 64 * 9 + 64)


def test_bad_input() -> None:
    for wrong in ({"degree": 0}, {"kernel_size": 4}, {"kernel_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PolynomialTokenMixer(M, **wrong)
    with pytest.raises(TypeError, match="out_proj has the wrong type"):
        PolynomialTokenMixer(M, out_proj=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="streaming needs causal=True"):
        built().init_state(1, 4)
    with pytest.raises(TypeError, match="state has the wrong type"):
        built(causal=True).step(normal(1, 1, 1, M), None)

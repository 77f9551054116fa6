"""Non-local blocks against loops over pixels, and timm's numbers (B199)."""

import pytest
import torch
from torch import Tensor

from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import NonLocal, gathered
from vision.gates import affine, equals_the_loops, gives_the_numbers, statistics
from vision.naive_gates import batch_norm, non_local
from vision.shared import filled, leaves, normal


def parts(layer: NonLocal) -> list[Tensor]:
    return affine(layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("sizes", "scale"), [((3, 2), None), ((1, 4), 1.0), ((2, 2), 0.3)])
def test_equals_the_loops(sizes: tuple[int, int], scale: float | None, training: bool) -> None:
    layer = filled(NonLocal(4, inner_dim=3, scale=scale)).train(training)
    (x,) = leaves(normal(1, 2, 4, *sizes))
    bn, scale = statistics(layer.norm), 3**-0.5 if scale is None else scale
    equals_the_loops(layer, layer(x), non_local(x, *parts(layer), bn, scale=scale, training=training), x)


@pytest.mark.parametrize("sizes", [(3, 2), (1, 1)])
def test_dot_products_equal_the_loops(sizes: tuple[int, int]) -> None:
    layer = filled(NonLocal(4, inner_dim=3, pairwise="dot"))
    (x,) = leaves(normal(1, 2, 4, *sizes))
    wq, bq, wk, bk, wv, bv, wo, bo = parts(layer)
    pixels = [(i, j) for i in range(sizes[0]) for j in range(sizes[1])]
    out = []
    for b in range(2):
        rows = []
        for i in pixels:
            q, o = wq @ x[b, :, *i] + bq, torch.zeros(3, dtype=x.dtype)
            for j in pixels:
                o = o + (q * (wk @ x[b, :, *j] + bk)).sum() * (wv @ x[b, :, *j] + bv) / len(pixels)
            rows.append(wo @ o + bo)
        out.append(torch.stack(rows, 1).view(4, *sizes))
    want = x + batch_norm(torch.stack(out), statistics(layer.norm))
    equals_the_loops(layer, layer(x), want, x)


def test_gives_timms_numbers() -> None:
    names = {"t": "q_proj", "p": "k_proj", "g": "v_proj", "z": "o_proj", "norm": "norm"}
    gives_the_numbers(NonLocal(12, inner_dim=4, scale=12**-0.5), "B199", "nl", names)


@pytest.mark.parametrize("pairwise", ["gaussian", "dot"])
def test_starts_as_nothing_and_reaches_everywhere(pairwise: str) -> None:
    torch.manual_seed(0)
    layer, (x,) = NonLocal(6, pairwise=pairwise).double(), leaves(normal(1, 2, 6, 4, 5))
    close(layer(x), x)
    layer = filled(layer)
    reached = torch.autograd.grad(layer(x)[0, 0, 0, 0], x)[0][0]
    assert (reached.abs().amax(0) > 1e-9).all()


def test_dot_products_cost_is_linear_in_pixels() -> None:
    layer = filled(NonLocal(4, pairwise="dot"))
    small, large = normal(0, 1, 4, 8, 8), normal(0, 1, 4, 16, 32)
    assert flops(lambda: layer(large)) == 8 * flops(lambda: layer(small)) > 0


def test_dot_products_are_no_softmax() -> None:
    """Twice the queries gather twice as much; a key of zeros gives nothing."""
    q, k, v = normal(1, 3, 2, 2, 5, 3)
    close(gathered(2 * q, k, v, pairwise="dot"), 2 * gathered(q, k, v, pairwise="dot"))
    assert not gathered(q, 0 * k, v, pairwise="dot").any()


@pytest.mark.parametrize("pairwise", ["gaussian", "dot"])
def test_volumes_and_empty_maps(pairwise: str) -> None:
    layer = filled(NonLocal(4, pairwise=pairwise))
    x = normal(2, 2, 4, 2, 3, 2)
    close(layer(x).flatten(2), layer(x.flatten(2)))
    for sizes in ((0, 4, 2, 3),):
        assert layer(torch.zeros(sizes, dtype=x.dtype)).shape == sizes


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"pairwise is unknown \(got 'mean'\)"):
        NonLocal(8, pairwise="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale is out of range \(got 0\)"):
        NonLocal(8, scale=0)
    with pytest.raises(ValueError, match=r"inner_dim is too small \(got 0\)"):
        NonLocal(8, inner_dim=0)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 8, X, \*sizes\)"):
        NonLocal(8)(torch.zeros(2, 4, 3, 3))

"""Efficient attention against explicit weights, the authors' numbers (B010) and its own claims."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_efficient import naive_efficient
from regard import masks
from regard.laws.agreement import close
from regard.linear.efficient import EfficientAttention, efficient_attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B010.npz"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(B: int, H: int, G: int, T: int, S: int, D: int, V: int) -> list[Tensor]:
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, V)
    return [normal(*shape).requires_grad_() for shape in shapes]


def hides(B: int, S: int) -> Tensor:
    """The last row of a batch has no key at all, the first has some."""
    keep = torch.rand(B, S) < 0.6
    keep[-1], keep[0, 0] = False, True
    return keep


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 7, 3, 4), (2, 2, 2, 4, 4, 5, 2), (2, 4, 2, 3, 9, 2, 3)]
)
def test_is_the_formula(shape, padded, normalisation):
    q, k, v = qkv(*shape)
    keep = hides(shape[0], shape[4]) if padded else None
    got = efficient_attention(q, k, v, keep=keep, normalisation=normalisation)
    repeat = shape[1] // shape[2]
    want = naive_efficient(q, *(z.repeat_interleave(repeat, 1) for z in (k, v)), keep=keep, norm=normalisation)
    close(got, want)
    direction = normal(*got.shape)
    grads = zip(*(torch.autograd.grad(z, (q, k, v), direction, allow_unused=True) for z in (got, want)), strict=True)
    for g, w in grads:
        close(g, torch.zeros_like(g) if w is None else w)


@pytest.mark.parametrize("case", ["a", "b"])
def test_authors_numbers(case):
    """Their module: 1x1 convolutions over a map, and the residual."""
    with np.load(VECTORS) as file:
        given = {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file if name[0] == case}
    H, width = int(given["heads"]), given["Wq"].shape[0] // int(given["heads"])
    x = given["x"].flatten(2).mT.requires_grad_()
    q, k, v = (
        torch.nn.functional.linear(x, given[f"W{n}"], given[f"b{n}"]).unflatten(-1, (H, -1)).transpose(1, 2)
        for n in "qkv"
    )
    assert q.shape[-1] == width
    out = efficient_attention(q, k, v).transpose(1, 2).flatten(2)
    y = torch.nn.functional.linear(out, given["Wo"], given["bo"]) + x
    close(y.mT, given["y"].flatten(2))
    (grad,) = torch.autograd.grad(y, x, given["w"].flatten(2).mT)
    close(grad.mT, given["gx"].flatten(2))


def test_the_module_is_the_function():
    module = EfficientAttention(12, 4, num_kv_heads=2, bias=True).double()
    x, context = normal(2, 5, 12), normal(2, 7, 12)
    keep = torch.arange(7) < torch.tensor([[7], [3]])
    q, k, v = module.split(x, context)
    close(module(x, context, mask=masks.padding(keep)), module.merge(efficient_attention(q, k, v, keep=keep)))


def test_scaling_is_dot_product_attention():
    """The paper's equality: only the order of the products differs."""
    q, k, v = qkv(2, 3, 3, 6, 9, 4, 5)
    close(efficient_attention(q, k, v, normalisation="scaling"), (q @ k.mT / 9) @ v)


def test_weights_are_convex():
    q, k, _ = qkv(2, 3, 3, 6, 9, 4, 5)
    weights = efficient_attention(10 * q, 10 * k, torch.eye(9).double().expand(2, 3, 9, 9))
    close(weights.sum(-1), torch.ones(2, 3, 6).double())
    assert (weights >= 0).all()


def test_no_square_matrix():
    """The largest tensor on the way is as long as the sequence, not its square."""
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        efficient_attention(*(t.detach() for t in qkv(1, 2, 2, T, T, 4, 4)))
    assert max(sizes) <= 2 * T * 4


def test_hidden_keys_do_not_poison():
    q, k, v = qkv(2, 2, 2, 3, 5, 4, 4)
    keep = torch.arange(5) < torch.tensor([[3], [5]])
    bad_k, bad_v = (z.detach().clone() for z in (k, v))
    bad_k[0, :, 3:], bad_v[0, :, 3:] = float("nan"), float("inf")
    for normalisation in ("softmax", "scaling"):
        want = efficient_attention(q, k, v, keep=keep, normalisation=normalisation)
        close(efficient_attention(q, bad_k, bad_v, keep=keep, normalisation=normalisation), want)


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        regard.create("efficient", dim=8, num_heads=2, causal=True)
    with pytest.raises(
        ValueError, match=r"normalisation is unknown \(got 'max'\); expected one of 'softmax', 'scaling'"
    ):
        EfficientAttention(8, 2, normalisation="max")
    with pytest.raises(ValueError, match="heads"):
        efficient_attention(normal(1, 3, 2, 4), normal(1, 2, 2, 4), normal(1, 2, 2, 4))
    with pytest.raises(ValueError, match="mask can only hide keys"):
        EfficientAttention(8, 2)(torch.randn(1, 3, 8), mask=masks.window(2))

"""Nystrom attention against loops, the transformers library, the authors' numbers (B142) and softmax attention."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_nystrom import naive_nystrom
from regard.laws.agreement import close
from regard.linear.nystrom import (
    NystromAttention,
    landmark_values,
    nystrom_attention,
    pseudo_inverse,
    segment_means,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "B142.npz"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(B: int, H: int, T: int, D: int, V: int) -> list[Tensor]:
    return [normal(B, H, T, width).requires_grad_() for width in (D, D, V)]


def means_of(T: int, m: int, keep: Tensor | None = None) -> Tensor:
    return segment_means(T, m, keep, like=torch.zeros((), dtype=torch.float64))


def same_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got, want)
    direction = normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file if name[0] == case}


@pytest.mark.parametrize("coefficient", ["exact", "original"])
@pytest.mark.parametrize("shape", [(1, 1, 6, 1, 1, 3), (2, 2, 9, 3, 4, 3), (2, 1, 8, 2, 3, 4), (1, 2, 5, 3, 2, 5)])
def test_is_the_formula(shape, coefficient):
    *sizes, m = shape
    q, k, v = qkv(*sizes)
    got = nystrom_attention(q, k, v, means_of(sizes[2], m), coefficient=coefficient)
    same_with_gradients(got, naive_nystrom(q, k, v, m, init=coefficient), [q, k, v])


def test_means_of_segments():
    """Neighbours share a landmark; segments differ in length by one at most; hidden tokens are passed over."""
    keep = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1, 0, 0]]).bool()
    means = means_of(9, 3, keep)
    assert means[0].ne(0).int().tolist() == [
        [1, 1, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    close(means[0].sum(-1), torch.ones(3).double())
    assert means[1].ne(0).int().sum(-1).tolist() == [1, 1, 0]  # two tokens need two landmarks
    for T in (1, 4, 7, 20):
        lengths = means_of(T, 4)[0].ne(0).sum(-1)
        assert len(lengths) == min(T, 4)
        assert lengths.sum() == T
        assert lengths.max() - lengths.min() <= 1


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_any_length_is_the_run_without_padding(length):
    """Even where, without its padding, a row is short enough to be exact."""
    q, k, v = (t.detach() for t in qkv(1, 2, 13, 3, 3))
    keep = torch.zeros(1, 13, dtype=torch.bool)
    keep[0, torch.randperm(13)[:length]] = True
    short = (z[:, :, keep[0]] for z in (q, k, v))
    want = nystrom_attention(*short, means_of(length, 4))
    poisoned = (z.masked_fill(~keep[0][:, None], float("nan")) for z in (k, v))
    got = nystrom_attention(q, *poisoned, means_of(13, 4, keep), keep=keep)
    close(got[:, :, keep[0]], want)


@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_few_tokens_are_attended_to_exactly(tokens):
    q, k, v = (t.detach() for t in qkv(2, 2, tokens, 3, 4))
    close(nystrom_attention(q, k, v, means_of(tokens, 5)), ((q @ k.mT) * 3**-0.5).softmax(-1) @ v)


def test_transformers_module():
    """The library's layer with the same weights, its pseudo-inverse and its convolution included."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    M, H, T, m = 12, 3, 20, 5
    config = NystromformerConfig(
        hidden_size=M,
        num_attention_heads=H,
        num_landmarks=m,
        segment_means_seq_len=T,
        conv_kernel_size=7,
        inv_coeff_init_option=False,
    )
    theirs = NystromformerSelfAttention(config).double().eval()
    ours = regard.convert_layer(theirs)
    x = normal(2, T, M).requires_grad_()
    same_with_gradients(ours(x), theirs(x)[0], [x])
    for ours_p, theirs_p in ((ours.conv.weight, theirs.conv.weight), (ours.k_proj.weight, theirs.key.weight)):
        (got,), (want,) = (
            torch.autograd.grad(f.square().sum(), p) for f, p in ((ours(x), ours_p), (theirs(x)[0], theirs_p))
        )
        close(got, want)


@pytest.mark.parametrize(("case", "m", "coefficient"), [("a", 4, "original"), ("b", 5, "original"), ("c", 7, "exact")])
def test_library_numbers(case, m, coefficient):
    """b and c hide keys from the third factor alone: their landmarks are means over everything."""
    given = vectors(case)
    x = given["x"].requires_grad_()
    H = given["conv"].shape[0] if "conv" in given else 2
    q, k, v = (F.linear(x, given[f"W{n}"], given[f"b{n}"]).unflatten(-1, (H, -1)).transpose(1, 2) for n in "qkv")
    means, keep = means_of(x.shape[1], m), given.get("keep")
    query = q * q.shape[-1] ** -0.5
    marks = means @ query, means @ k
    held = landmark_values(*marks, k, v, keep=None if keep is None else keep.bool(), coefficient=coefficient)
    out = (query @ marks[1].mT).softmax(-1) @ held
    if keep is None:
        close(nystrom_attention(q, k, v, means, coefficient=coefficient), out)
    if "conv" in given:
        out = out + F.conv2d(v, given["conv"], padding=(given["conv"].shape[2] // 2, 0), groups=H)
    y = out.transpose(1, 2).flatten(2)
    close(y, given["y"])
    close(torch.autograd.grad(y, x, given["w"])[0], given["gx"])


def test_authors_numbers():
    """Their masking: queries and keys of padding are zero and count in the means."""
    given = vectors("d")
    q, k, v = leaves = [given[n].requires_grad_() for n in "qkv"]
    real = given["keep"][:, None, :, None]
    out = nystrom_attention(q * real, k * real, v, means_of(10, 5), keep=given["keep"].bool())
    out = out + F.conv2d(v * real, given["conv"], padding=(1, 0), groups=2)
    # The output at padding is not compared: their queries there are zeroed, as here.
    close(out, given["y"])
    for name, grad in zip("qkv", torch.autograd.grad(out, leaves, given["w"]), strict=True):
        close(grad, given[f"g{name}"])


def test_nearer_with_more_landmarks():
    """The paper's claim: the error against softmax attention falls with m, and is 0 where every token is its own.

    Eight landmarks make weights of rank 8, of which softmax has more.
    """
    T, D = 64, 4
    t = torch.linspace(0, 1, T).double()
    waves = torch.stack([torch.sin(f * t + f) for f in range(3 * D)], -1)
    q, k, v = (z[None, None] for z in waves.split(D, -1))
    want = (q @ k.mT * D**-0.5).softmax(-1) @ v
    errors = [
        float((nystrom_attention(q, k, v, means_of(T, m), iterations=20) - want).norm() / want.norm())
        for m in (2, 4, 8, 64)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-3
    weights = nystrom_attention(q, k, torch.eye(T).double()[None, None], means_of(T, 8), iterations=20)
    assert torch.linalg.matrix_rank(weights, rtol=1e-9) <= 8
    assert errors[3] < 1e-12


def test_pseudo_inverse():
    a = (3 * normal(2, 2, 5, 5)).softmax(-1)
    close(pseudo_inverse(a, iterations=40), torch.linalg.pinv(a))
    wide = pseudo_inverse(a, iterations=6, coefficient="original")
    assert not torch.allclose(wide, pseudo_inverse(a, iterations=6))
    a[0, 0, 3], a[0, 0, :, 3] = 0, 0  # a landmark that is not in use
    z = pseudo_inverse(a, iterations=40)
    assert (z[0, 0, 3] == 0).all()
    assert (z[0, 0, :, 3] == 0).all()


def test_no_square_matrix():
    """Twice as many tokens, twice as large at most is whatever is made on the way."""

    def largest(T: int) -> int:
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
                return out

        module = NystromAttention(8, 2, num_landmarks=8)
        with Watch():
            module(torch.randn(1, T, 8), mask=torch.arange(T)[None] < T - 12)
        return max(sizes)

    assert 8 * 256 <= largest(256) < 256**2
    assert largest(512) <= 2 * largest(256)
    assert largest(1024) <= 4 * largest(256) < 1024**2 / 4


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        regard.create("nystromformer", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"conv_width is even \(got 4\); expected an odd int, or None"):
        NystromAttention(8, 2, conv_width=4)
    for value, wrong in ((0, "small"), (10**9, "large")):
        with pytest.raises(
            ValueError, match=rf"iterations is too {wrong} \(got {value}\); expected an int from 1 to 100"
        ):
            NystromAttention(8, 2, iterations=value)
    for option in ("num_landmarks", "conv_width"):
        with pytest.raises(ValueError, match=rf"{option} is too small \(got 0\); expected an int >= 1"):
            NystromAttention(8, 2, **{option: 0})
    with pytest.raises(ValueError, match=r"coefficient is unknown \(got 'mean'\); expected one of 'exact', 'original'"):
        NystromAttention(8, 2, coefficient="mean")
    with pytest.raises(ValueError, match=r"means has the wrong shape \(got \(1, 2, 4\)\); expected \(.*, m, T = 5\)"):
        nystrom_attention(*qkv(1, 1, 5, 2, 2), means_of(4, 2))


def test_no_tokens_with_a_mask():
    layer = regard.create("nystromformer", dim=12, num_heads=2)
    for B in (0, 2):
        assert layer(torch.zeros(B, 0, 12), mask=torch.zeros(B, 0, dtype=torch.bool)).shape == (B, 0, 12)

"""Linformer against loops, a port's numbers, and what it promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_linformer import linformer, pool
from regard import masks
from regard.laws.agreement import close
from regard.linear import Linformer, linformer_attention
from regard.linear.linformer import by_segment

VECTORS = Path(__file__).parents[1] / "vectors" / "S-linformer.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {n.removeprefix(f"{case}_"): torch.from_numpy(file[n]) for n in file if n.startswith(f"{case}_")}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(**options) -> Linformer:
    torch.manual_seed(2)
    sizes = {"dim": 8, "num_heads": 2, "max_length": 9, "rank": 3, "bias": True}
    layer = regard.create("linformer", dtype=torch.float64, **{**sizes, **options})
    for name in "qkv":
        torch.nn.init.zeros_(getattr(layer, f"{name}_proj").bias)
    return layer


def loops(layer: Linformer, x: Tensor, **rest) -> Tensor:
    weights = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.o_proj.weight, layer.o_proj.bias)
    e = pool(layer.max_length, layer.rank) if layer.e is None else layer.e
    return linformer(x, *weights, e, layer.f, heads=2, **rest)[0]


@pytest.mark.parametrize("share", ["headwise", "kv", "layer"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_loops(share: str, kv_heads: int, padded: bool, cross: bool):
    """Their author has read neither code nor test. Sequences of full length and shorter ones."""
    layer = built(share=share, num_kv_heads=kv_heads)
    assert (layer.f is None) == (share != "headwise")
    x, context = normal(2, 6, 8).requires_grad_(), normal(2, 9, 8, seed=3).requires_grad_() if cross else None
    S = 9 if cross else 6
    keep = torch.tensor([[True, False, True] * 3, [True] * 9])[:, :S] if padded else None
    want = loops(layer, x, context=context, keep=keep)
    got = layer(x, context, mask=keep)
    close(got.detach(), want.detach())
    leaves = [x, layer.e, layer.k_proj.weight] + ([] if layer.f is None else [layer.f]) + ([context] if cross else [])
    for g, w in zip(*(torch.autograd.grad(z, leaves, normal(*got.shape, seed=5)) for z in (got, want)), strict=True):
        close(g, w)


def test_means_equal_the_loops():
    layer, x = built(projection="mean"), normal(2, 9, 8)
    assert not [name for name, _ in layer.named_parameters() if name in ("e", "f")]
    close(layer(x), loops(layer, x))


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_the_ports_numbers(case: str):
    """b has one key head, and keys for values."""
    z = vectors(case)
    x, e = z["x"].requires_grad_(), z["proj_k"].requires_grad_()
    source = z.get("context", x)
    q, k = (F.linear(t, z[f"to_{n}.weight"]) for t, n in ((x, "q"), (source, "k")))
    v = F.linear(source, z["to_v.weight"]) if "to_v.weight" in z else k
    width = q.shape[-1] // 2
    q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    out = linformer_attention(q, k, v, e, z.get("proj_v"))
    y = F.linear(out.transpose(1, 2).flatten(2), z["to_out.weight"], z["to_out.bias"])
    close(y.detach(), z["out"])
    for g, name in zip(torch.autograd.grad(y, (x, e), z["w"]), ("gx", "gproj_k"), strict=True):
        close(g, z[name])


@torch.no_grad()
def test_of_full_length_it_is_softmax_attention():
    """The claim: exact where E and F are the identity; cut down to L rows, weights over tokens have rank L."""
    layer, x = built(rank=9), normal(2, 9, 8)
    layer.e.copy_(torch.eye(9))
    layer.f.copy_(torch.eye(9))
    q, k, v = layer.split(x, x)
    close(layer(x), layer.merge((q @ k.mT / 2).softmax(-1) @ v))
    layer = built(rank=2, head_dim=12)
    q, k, _ = (z[..., :9] for z in layer.split(x, x))
    tokens = F.pad(torch.eye(9, dtype=torch.float64).expand(2, 2, 9, 9), (0, 3))
    q, k = F.pad(q, (0, 3)), F.pad(k, (0, 3))
    weights = layer.mix(q, k, tokens, None)[..., :9]
    assert torch.linalg.matrix_rank(weights, rtol=1e-9).max() == 2


@torch.no_grad()
def test_no_square_matrix():
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    layer, x = Linformer(8, 2, rank=8), torch.randn(1, T, 8)
    with Watch():
        layer(x, mask=torch.arange(T)[None] < 500)
    assert max(sizes) <= 2 * 8 * T


@pytest.mark.parametrize("projection", ["mean", "conv"])
@pytest.mark.parametrize("padded", [False, True])
def test_segments_by_hand(projection: str, padded: bool):
    """Three tokens a slot; of the seven tokens the last slot has one."""
    layer, z = built(projection=projection), normal(2, 2, 7, 4)
    keep = torch.tensor([[True, False, True, False, False, False, True], [True] * 7])
    out, seen = by_segment(z, 9, 3, layer.e, keep if padded else None)
    for b in range(2):
        for m in range(3):
            real = [s for s in range(3 * m, min(3 * m + 3, 7)) if not padded or keep[b, s]]
            assert bool(seen[b, m]) == bool(real)
            rows = [z[b, :, s] * (1 if layer.e is None else layer.e[s - 3 * m]) for s in real]
            total = sum(rows, torch.zeros(2, 4).double())
            close(out[b, :, m].detach(), (total if layer.e is not None else total / max(len(real), 1)).detach())


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "mean", "conv"])
def test_padding_behind_is_not_there(projection: str):
    layer, x = built(projection=projection), normal(2, 9, 8)
    close(layer(x, mask=masks.padding(torch.arange(9)[None] < 4))[:, :4], layer(x[:, :4]))


def test_one_projection_for_all_layers():
    first, second = built(share="layer"), built(share="layer")
    regard.share(first, second)
    assert first.e is second.e
    first, second = built(), built()
    regard.share(first, second)
    assert first.e is not second.e


def test_dropout_of_slots():
    layer, x = built(dropout=0.5), normal(2, 9, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_starts_as_the_port():
    """Uniform up to 1 / sqrt(L)."""
    torch.manual_seed(0)
    layer = regard.create("linformer", dim=8, num_heads=2)
    assert layer.e.shape == layer.f.shape == (512, 256)
    for p in (layer.e, layer.f):
        assert 0.0624 < float(p.abs().max()) <= 1 / 16
        assert abs(float(p.std()) * 16 * 3**0.5 - 1) < 0.01
    assert built(projection="conv").e.shape == (3, 4)


def test_refusals():
    for options, words in (
        ({"max_length": 0}, r"max_length is too small \(got 0\); expected an int >= 1"),
        ({"rank": 0}, r"rank is too small \(got 0\)"),
        ({"share": "heads"}, r"share is unknown \(got 'heads'\); expected one of 'headwise', 'kv', 'layer'"),
        ({"projection": "max"}, r"projection is unknown \(got 'max'\)"),
        ({"projection": "mean", "rank": 5}, r"max_length is no multiple of rank = 5 \(got 9\)"),
        ({"dropout": 2.0}, "dropout is out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            Linformer(8, 2, **{"max_length": 9, "rank": 3, **options})
    with pytest.raises(ValueError, match="causal"):
        regard.create("linformer", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"x is too long \(got 10 tokens\); expected at most max_length = 9"):
        built()(normal(1, 10, 8))
    with pytest.raises(ValueError, match=r"context is too long \(got 10 tokens\)"):
        built()(normal(1, 2, 8), normal(1, 10, 8))
    q = normal(1, 2, 4, 3)
    with pytest.raises(ValueError, match=r"k is too long \(got 4 keys\); expected at most 3, the rows of e"):
        linformer_attention(q, q, q, normal(3, 2))

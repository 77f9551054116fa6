"""Longformer's layer against loops, whose author has read neither code nor test, and transformers' numbers."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from laws.measured import flops
from mixers.naive_longformer import longformer
from regard import masks
from regard.laws.agreement import close
from regard.mixers.longformer import LongformerAttention
from vision.shared import filled, normal

VECTORS = Path(__file__).parents[1] / "vectors" / "S-longformer.npz"
NAMES = ("q", "k", "v")


def maps(layer: LongformerAttention, side: str = "local") -> tuple[Tensor, ...]:
    projections = [layer.get_submodule(f"{name}_proj.{side}") for name in NAMES]
    return tuple(z for p in projections for z in (p.weight, p.bias))


def flags(T: int, *rows: tuple[int, ...]) -> Tensor:
    """True at the given places of each row."""
    return torch.stack(
        [torch.zeros(T, dtype=torch.bool).index_fill(0, torch.tensor(row, dtype=torch.long), True) for row in rows]
    )


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_gives_the_numbers_of_transformers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    layer = regard.create("longformer", dim=6, num_heads=2, window=int(z["window"]), dtype=torch.float64)
    state = {"o_proj.weight": torch.eye(6), "o_proj.bias": torch.zeros(6)}
    for ours, theirs in zip(NAMES, ("query", "key", "value"), strict=True):
        for kind in ("weight", "bias"):
            state[f"{ours}_proj.local.{kind}"] = z[f"{theirs}.{kind}"]
            state[f"{ours}_proj.globals.{kind}"] = z[f"{theirs}_global.{kind}"]
    layer.load_state_dict(state)
    x = z["x"].clone().requires_grad_()
    out = layer(x, global_at=z["global"].bool(), mask=masks.padding(~z["padded"].bool()))
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    close(layer.k_proj["local"].weight.grad, z["gkey"])
    if "gkey_global" in z:
        close(layer.k_proj["globals"].weight.grad, z["gkey_global"])


@pytest.mark.parametrize("share_global", [False, True])
@pytest.mark.parametrize("dilation", [1, [1, 3, 2]])
def test_equals_the_loops(share_global: bool, dilation: int | list[int]) -> None:
    T, heads = 11, 3
    options = {"window": 4, "dilation": dilation, "share_global": share_global}
    layer = filled(regard.create("longformer", dim=6, num_heads=heads, **options))
    x = normal(1, 2, T, 6).requires_grad_()
    at, padded = flags(T, (0, 7), (3,)), flags(T, (), (9, 10))
    got = layer(x, global_at=at, mask=~padded)
    want = longformer(
        x,
        maps(layer),
        None if share_global else maps(layer, "globals"),
        heads=heads,
        window=4,
        is_global=at,
        padded=padded,
        dilation=None if dilation == 1 else dilation,
        Wo=layer.o_proj.weight,
        bo=layer.o_proj.bias,
    )
    close(got, want)
    given = [x, *layer.parameters()]
    w = normal(2, 2, T, 6)
    for g, h in zip(*(torch.autograd.grad((y * w).sum(), given) for y in (got, want)), strict=True):
        close(g, h)


def test_far_tokens_are_reached_in_two_layers_through_a_global_one() -> None:
    layers = [filled(regard.create("longformer", dim=8, num_heads=2, window=4), seed) for seed in (1, 2)]
    x = normal(3, 1, 30, 8)
    moved = x.clone()
    moved[0, 25] += 1

    def differs(count: int, n_global: int) -> list[int]:
        ys = []
        for z in (x, moved):
            for layer in layers[:count]:
                z = layer(z, global_at=torch.arange(n_global).expand(1, -1))
            ys.append(z)
        return (ys[0] != ys[1]).any(-1)[0].nonzero()[:, 0].tolist()

    near = list(range(23, 28))
    assert differs(1, 0) == near
    assert differs(1, 1) == [0, *near]
    assert differs(2, 0) == list(range(21, 30))
    assert differs(2, 1) == list(range(30))


def test_without_global_tokens_it_is_window_attention_and_with_all_global_dense() -> None:
    layer = filled(regard.create("longformer", dim=8, num_heads=2, window=6, num_global=0, share_global=True))
    x = normal(4, 2, 17, 8)
    q, k, v = (layer.get_submodule(f"{n}_proj.local")(x).unflatten(-1, (2, 4)).transpose(1, 2) for n in NAMES)
    for mask, at in ((masks.window(4), None), (None, torch.ones(2, 17, dtype=torch.bool))):
        dense = regard.attention(q, k, v, mask=mask, kernel="eager")
        close(layer(x, global_at=at), layer.o_proj(dense.transpose(1, 2).flatten(2)))


def test_the_global_projections_start_as_the_ordinary_ones() -> None:
    layer = regard.create("longformer", dim=8, num_heads=2)
    for name in NAMES:
        ours, theirs = (layer.get_submodule(f"{name}_proj.{side}") for side in ("local", "globals"))
        assert torch.equal(ours.weight, theirs.weight)
        assert ours.weight is not theirs.weight
    shared = regard.create("longformer", dim=8, num_heads=2, share_global=True)
    assert len(list(shared.parameters())) == len(list(layer.parameters())) - 6


def test_places_do_for_flags_and_hidden_tokens_are_never_global() -> None:
    layer, x = filled(regard.create("longformer", dim=8, num_heads=2, window=4)), normal(5, 2, 14, 8)
    want = layer(x, global_at=flags(14, (1, 9), (6,)))
    for places in ([[9, 1], [6, -1]], [[1, 9, 9], [-1, 6, 6]]):
        close(layer(x, global_at=torch.tensor(places)), want)
    close(layer(x, global_at=flags(14, (0,), (0,))), layer(x))
    keep = ~flags(14, (0, 1), ())  # padded on the left: the first token is hidden
    close(layer(x, mask=keep)[0, 2:], layer(x[:1, 2:], global_at=torch.zeros(1, 0, dtype=torch.long))[0])


def test_packed_documents_have_global_tokens_of_their_own() -> None:
    layer, x = filled(regard.create("longformer", dim=8, num_heads=2, window=4)), normal(6, 1, 20, 8)
    at, borders = flags(20, (3, 8, 19)), torch.tensor([0, 8, 20])
    told = layer(x, global_at=at, mask=masks.packed(borders))
    for a, b in pairwise(borders.tolist()):
        close(told[:, a:b], layer(x[:, a:b], global_at=at[:, a:b]))
        close(layer(x, mask=masks.packed(borders))[:, a:b], layer(x[:, a:b]))


def test_cost_is_linear_in_length() -> None:
    layer = filled(regard.create("longformer", dim=8, num_heads=2, window=32))
    small, large = (flops(lambda n=n: layer(normal(0, 1, n, 8))) for n in (1024, 4096))
    assert large < 4.2 * small


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"window is odd \(got 5\); expected an even int"):
        LongformerAttention(8, 2, window=5)
    with pytest.raises(ValueError, match=r"window is too small \(got 0\)"):
        LongformerAttention(8, 2, window=0)
    with pytest.raises(ValueError, match=r"dilation is of another number of heads .* expected one for all, or 2"):
        LongformerAttention(8, 2, dilation=[1, 2, 3])
    with pytest.raises(ValueError, match=r"dilation is too small \(got 0\)"):
        LongformerAttention(8, 2, dilation=[1, 0])
    layer, x = LongformerAttention(8, 2), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"global_at has the wrong shape \(got \(2, 4\)\); expected \(B = 2, T = 5\)"):
        layer(x, global_at=torch.ones(2, 4, dtype=torch.bool))
    for wrong in ([[5], [0]], [[-2], [0]]):
        with pytest.raises(ValueError, match="global_at names no places of x"):
            layer(x, global_at=torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"global_at has the wrong dtype \(got torch.float32\)"):
        layer(x, global_at=torch.ones(2, 5))

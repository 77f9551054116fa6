"""Unidirectional block attention against loops, whose author saw the equations only, and the authors' numbers."""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision.unidirectional_block import (
    UnidirectionalBlockAttention,
    block_mask,
    unidirectional_block_attention,
)
from vision import naive_unidirectional_block as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def made(dim: int = 8, heads: int = 2, **options) -> UnidirectionalBlockAttention:
    return filled(regard.create("unidirectional_block", dim=dim, num_heads=heads, **options))


def oracle(layer: UnidirectionalBlockAttention, x: Tensor, **given) -> Tensor:
    qkv = (layer.q_proj, layer.k_proj, layer.v_proj)
    weights = (
        torch.cat([f.weight for f in qkv]),
        torch.cat([f.bias for f in qkv]),
        layer.o_proj.weight,
        layer.o_proj.bias,
    )
    norm = (layer.norm.weight, layer.norm.bias) if isinstance(layer.norm, torch.nn.LayerNorm) else None
    own = {"heads": layer.num_heads, "block": layer.block, "direction": layer.direction, "rope": layer.turn is not None}
    own |= {"R": layer.offsets, "ln": norm, "grid": tuple(x.shape[2:])}
    return naive.uniba(x.flatten(2).mT, *weights, **own, **given).mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((4, 6), {"block": 2}),
        ((4, 4), {"block": 2, "direction": "right-bottom"}),
        ((3, 6), {"block": 3, "block_position": False, "rotary": False, "qk_norm": False}),
        ((2, 3), {"block": 1, "direction": "right-bottom", "qk_norm": False}),
    ],
)
def test_is_the_definition(sizes: tuple[int, int], options: dict) -> None:
    layer, (x,) = made(**options), leaves(normal(1, 1, 8, *sizes))
    got, want = layer(x, origin=(5, 2)), oracle(layer, x, origin=(5, 2))
    close(got, want)
    inputs = [x, *layer.parameters()]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


@pytest.mark.parametrize(
    ("case", "sizes", "options"),
    [("lt", (6, 8), {"block": 2}), ("rb", (6, 3), {"block": 3, "direction": "right-bottom"})],
)
def test_gives_the_authors_numbers(case: str, sizes: tuple[int, int], options: dict) -> None:
    z = vectors("A103", case)
    layer = regard.create("unidirectional_block", dim=8, num_heads=2, **options).double()
    parts = zip("qkv", z["Wqkv"].chunk(3), z["bqkv"].chunk(3), strict=True)
    state = {f"{n}_proj.{kind}": t for n, w, b in parts for kind, t in (("weight", w), ("bias", b))}
    state |= {"o_proj.weight": z["Wd"], "o_proj.bias": z["bd"], "offsets": z["re"]}
    layer.load_state_dict(state | {"norm.weight": z["lnw"], "norm.bias": z["lnb"]})
    (x,) = leaves(z["x"])
    out = layer(x.mT.unflatten(2, sizes), origin=tuple(z["pos"][0, 0].long().tolist())).flatten(2).mT
    (out * z["w"]).sum().backward()
    weight = torch.cat([f.weight.grad for f in (layer.q_proj, layer.k_proj, layer.v_proj)])
    found = {"out": out, "grad_x": x.grad, "grad_re": layer.offsets.grad, "grad_Wqkv": weight}
    for name, got in found.items():
        assert (got - z[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("direction", ["left-top", "right-bottom"])
@pytest.mark.parametrize("block_position", [True, False])
def test_block_by_block_from_one_row_is_all_at_once(direction: str, block_position: bool) -> None:
    layer = made(block=2, direction=direction, block_position=block_position)
    x = normal(1, 2, 8, 8, 6)
    want, state = layer(x, origin=(3, 1)), layer.start((8, 6), origin=(3, 1))
    places = [(i, j) for i in range(4) for j in range(3)]
    for n, (i, j) in enumerate(places if direction == "left-top" else places[::-1]):
        at = (..., slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
        out, state = layer.step(x[at], state)
        close(out, want[at])
        assert state.k.shape == state.v.shape == (2, min(n + 1, 4), 2, 4, 4), "a row of 3 blocks, and one"
    with pytest.raises(ValueError, match="has all blocks already"):
        layer.step(x[at], state)


def test_a_state_is_a_value() -> None:
    layer, x = made(block=2), normal(1, 1, 8, 2, 6)
    _, state = layer.step(x[..., :2], layer.start((2, 6)))
    first = layer.step(x[..., 2:4], state)[0]
    layer.step(x[..., 4:], state)
    assert torch.equal(layer.step(x[..., 2:4], state)[0], first)


@pytest.mark.parametrize("direction", ["left-top", "right-bottom"])
def test_without_offsets_it_is_attention_with_a_mask(direction: str) -> None:
    """Duplicates at the border cancel."""
    mask = block_mask((4, 6), 2, direction)
    assert torch.equal(mask.dense(24)[0, 0], naive.allowed((4, 6), 2, direction))
    q, k, v = (normal(n, 1, 2, 4, 6, 3) for n in range(3))
    got = unidirectional_block_attention(q, k, v, block=2, direction=direction)
    for kernel in ("eager", "block_sparse"):
        want = regard.attention(*(z.flatten(2, 3) for z in (q, k, v)), mask=mask, kernel=kernel)
        close(got.flatten(2, 3), want)


def test_each_layer_reaches_one_block_further() -> None:
    layer = made(block=2)
    x = normal(1, 1, 8, 8, 8)
    other = x.clone()
    other[..., 0, 1] += 1
    for reach in (1, 2, 3):
        x, other = layer(x), layer(other)
        moved = (other - x).abs().amax(1)[0].unfold(0, 2, 2).unfold(1, 2, 2).amax((2, 3)) > 0
        assert moved.tolist() == [[max(i, j) <= reach for j in range(4)] for i in range(4)]


def test_starting_values() -> None:
    layer = regard.create("unidirectional_block", dim=8, num_heads=2)
    assert (layer.block, layer.direction, layer.norm.eps) == (32, "left-top", 1e-6)
    assert not layer.offsets.any()
    assert layer.offsets.shape == (4, 2, 4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"Y is no multiple of block = 2 \(got 3\)"):
        made(block=2)(normal(0, 1, 8, 3, 4))
    with pytest.raises(ValueError, match="direction is unknown"):
        made(direction="left")
    with pytest.raises(ValueError, match="head_dim is no multiple of four"):
        made(6, 3)
    with pytest.raises(ValueError, match="X is no multiple of block"):
        made(block=2).start((2, 3))
    with pytest.raises(TypeError, match="state has the wrong type"):
        made(block=2).step(normal(0, 1, 8, 2, 2), None)
    with pytest.raises(ValueError, match="x"):
        made(block=2).step(normal(0, 1, 8, 2, 4), made(block=2).start((2, 4)))
    _, state = made(block=2).step(normal(0, 1, 8, 2, 2), made(block=2).start((2, 4)))
    with pytest.raises(ValueError, match="state has another batch than x"):
        made(block=2).step(normal(0, 3, 8, 2, 2), state)

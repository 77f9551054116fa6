"""Bottleneck attention against loops, whose author saw the paper's account alone, neither code nor test, and timm's
numbers (A120)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision.botnet import BottleneckAttention, bottleneck_attention
from regard.vision.botnet_block import BottleneckBlock
from vision import naive_botnet
from vision.shared import filled, gradients, leaves, normal, vectors


def joint(layer: BottleneckAttention) -> tuple[Tensor, Tensor | None]:
    """The stacked projection."""
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    bias = None if layer.q_proj.bias is None else torch.cat([p.bias for p in parts])
    return torch.cat([p.weight for p in parts]), bias


def naive(layer: BottleneckAttention, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    weight, bias = joint(layer)
    return naive_botnet.botnet_attention(
        x,
        weight,
        *tables,
        layer.num_heads,
        layer.head_dim,
        qkv_bias=bias,
        scale_position=layer.scale_positions,
        pool=layer.stride == 2,
        absolute=layer.positions == "absolute",
    )


CASES = [
    {},
    {"scale_positions": False, "bias": True},
    {"positions": "absolute", "head_dim": 3},
    {"positions": "absolute", "scale_positions": False, "bias": True},
    {"stride": 2, "out_dim": 4, "head_dim": 5},
]


@pytest.mark.parametrize("options", CASES)
def test_is_the_definition(options: dict) -> None:
    layer = filled(BottleneckAttention(6, 2, size=(3, 4), **options))
    (x,) = leaves(normal(1, 2, 6, 3, 4))
    got, want = layer(x), naive(layer, x, (layer.height_table, layer.width_table))
    close(got, want)
    of = [x, *layer.parameters()]
    for a, b in zip(gradients(got, of), gradients(want, of), strict=True):
        close(a, b)


@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_smaller_maps_read_the_middle_of_the_tables(positions: str) -> None:
    layer = filled(BottleneckAttention(4, 2, size=(5, 4), positions=positions))
    x, tables = normal(2, 1, 4, 3, 4), (layer.height_table, layer.width_table)
    rows = layer.height_table[2:-2] if positions == "relative" else layer.height_table[:3]
    close(layer(x), naive(layer, x, (rows, tables[1])))


@pytest.mark.parametrize("case", ["bot", "botscaled", "botpool"])
def test_gives_timms_numbers(case: str) -> None:
    z = vectors("A120", case)
    H, D, stride, scaled = (int(n) for n in z["cfg"])
    weight, bias = z["p_qkv.weight"], z.get("p_qkv.bias")
    V = len(weight) - 2 * H * D
    layer = BottleneckAttention(
        weight.shape[1],
        H,
        head_dim=D,
        size=tuple(z["x"].shape[2:]),
        out_dim=V,
        stride=stride,
        scale_positions=bool(scaled),
        bias=bias is not None,
    ).double()
    with torch.no_grad():
        for kind, t in (("weight", weight), ("bias", bias)):
            for p, part in zip("qkv", () if t is None else t.split([H * D, H * D, V]), strict=False):
                getattr(getattr(layer, f"{p}_proj"), kind).copy_(part)
        layer.height_table.copy_(z["p_pos_embed.height_rel"])
        layer.width_table.copy_(z["p_pos_embed.width_rel"])
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


def norm(layer: nn.Module) -> tuple[Tensor, ...]:
    return layer.weight, layer.bias, layer.running_mean, layer.running_var


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"inner_dim": 4, "positions": "absolute"}])
def test_block_is_the_definition(options: dict, training: bool) -> None:
    block = filled(BottleneckBlock(8, 2, size=(2, 4), **options)).train(training)
    inner, x = block.attention, normal(3, 2, 8, 2, 4)
    weight, _ = joint(inner)
    how = {"absolute": inner.positions == "absolute"}
    attention = (weight, inner.height_table, inner.width_table, 2, inner.head_dim, how)
    shortcut = None
    if isinstance(block.shortcut, nn.Sequential):
        shortcut = (block.shortcut[0].weight, norm(block.shortcut[1]))
    want = naive_botnet.bot_block(
        x,
        block.in_proj.weight,
        norm(block.in_norm),
        attention,
        norm(block.norm),
        block.out_proj.weight,
        norm(block.out_norm),
        pool=inner.stride == 2,
        shortcut=shortcut,
        training=training,
    )
    close(block(x), want)


def test_block_starts_as_its_shortcut() -> None:
    x = normal(4, 2, 8, 4, 4)
    close(BottleneckBlock(8, 2).double()(x), x.relu())
    with pytest.raises(ValueError, match=r"BottleneckBlock: dim is no multiple of four = 4 \(got 6\)"):
        BottleneckBlock(6, 2)


def test_place_counts_by_rows_and_columns_apart() -> None:
    """Without tables it is attention of tokens. With equal queries and no keys, weights depend on how many rows and
    columns apart two pixels are, and on each by itself."""
    layer = regard.create("botnet", dim=6, num_heads=2, size=(4, 5), dtype=torch.float64)
    x = normal(5, 1, 6, 4, 5)
    tokens = [f(x).flatten(2).unflatten(1, (2, 3)).mT for f in (layer.q_proj, layer.k_proj, layer.v_proj)]
    plain = regard.attention(*tokens).mT.flatten(1, 2).view_as(x)
    assert (layer(x) - plain).abs().max() > 1e-3
    for table in (layer.height_table, layer.width_table):
        nn.init.zeros_(table)
    close(layer(x), plain)
    q = normal(6, 1, 1, 1, 1, 3).expand(1, 1, 4, 5, 3)
    each = torch.eye(20, dtype=torch.float64).view(1, 1, 4, 5, 20)
    tables = (normal(7, 7, 3), normal(8, 9, 3))
    z = bottleneck_attention(q, torch.zeros_like(q), each, tables)[0, 0].unflatten(-1, (4, 5)).log()
    own = torch.stack([torch.stack([z[y, x, y, x] for x in range(5)]) for y in range(4)])
    z = z - own[..., None, None]
    close(z[1:, :, 1:], z[:-1, :, :-1])
    close(z[:, 1:, :, 1:], z[:, :-1, :, :-1])
    close(z[0, 0], z[0, 0, :, :1] + z[0, 0, :1])
    assert z.std() > 0.3


def test_no_map_of_all_pairs_is_needed() -> None:
    """A map of 48 x 48 by the kernel of plain attention: nothing of N x N is made by the mechanism itself."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    layer = regard.create("botnet", dim=8, num_heads=1, size=(48, 48))
    with Watch(), torch.no_grad():
        layer(torch.randn(1, 8, 48, 48))
    assert largest < 48**4 / 4


def test_empty_batches() -> None:
    for options in ({}, {"stride": 2}, {"positions": "absolute"}):
        layer = BottleneckAttention(4, 2, size=(4, 4), **options)
        n = 4 // layer.stride
        assert layer(torch.zeros(0, 4, 4, 4)).shape == (0, 4, n, n)
        with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 4, 0, 4\)\)"):
            layer(torch.zeros(2, 4, 0, 4))


def test_what_is_refused() -> None:
    layer = BottleneckAttention(4, 2, size=(4, 4), stride=2)
    with pytest.raises(ValueError, match=r"x is larger than its tables \(got \(5, 4\)\); expected a map of at most"):
        layer(torch.zeros(1, 4, 5, 4))
    with pytest.raises(
        ValueError, match=r"x is too small a map \(got \(1, 4, 4, 1\)\); expected \(B, C, Y, X\) with both sides 2"
    ):
        layer(torch.zeros(1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(1, 5, 4, 4\)\)"):
        layer(torch.zeros(1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"stride is unknown \(got 3\)"):
        BottleneckAttention(4, 2, stride=3)
    with pytest.raises(ValueError, match=r"positions is unknown \(got 'none'\)"):
        BottleneckAttention(4, 2, positions="none")
    with pytest.raises(ValueError, match=r"size is too small \(got 0\)"):
        BottleneckAttention(4, 2, size=(0, 4))
    q = normal(1, 1, 2, 3, 4, 2)
    with pytest.raises(
        ValueError, match=r"the table of columns is not of this map \(got \(5, 2\)\); expected one for 4"
    ):
        bottleneck_attention(q, q, q, (normal(2, 5, 2), normal(2, 5, 2)))
    with pytest.raises(ValueError, match=r"'botnet' has no such option \(got 'stride'\)"):
        regard.create("botnet", dim=4, num_heads=2, stride=2)

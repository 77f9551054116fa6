"""SparseGSA and DLGSANet against loops, whose author saw only the paper's account, and the authors' numbers (A199)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import flops
from regard.laws.agreement import close, same
from regard.vision.dlgsanet import GatedConvFeedForward, HybridDynamicBlock, dlgsanet
from regard.vision.sparse_channel import SparseChannelAttention, sparse_channel_attention, tile_starts
from regard.vision.super_resolution import RGB_MEAN
from vision import naive_dlgsanet as naive
from vision.shared import filled, gradients, leaves, normal, vectors
from vision.test_dynamic_local import weights as local_weights


def made(dim: int, heads: int, seed: int = 0, **options) -> SparseChannelAttention:
    return filled(regard.create("sparse_channel", dim=dim, num_heads=heads, causal=False, **options), seed)


def looped(x: Tensor, layer: SparseChannelAttention, mask: Tensor | None = None) -> Tensor:
    biases = {"b_qkv": layer.qkv_proj.bias, "b_dw": layer.near.bias, "b_out": layer.o_proj.bias}
    parts = [layer.qkv_proj.weight, layer.near.weight, layer.temperature, layer.o_proj.weight]
    told = {"activation": layer.activation, "tile": layer.tile, "mask": mask}
    return naive.sparse_gsa(x, *parts, layer.num_heads, **biases, **told)


@pytest.mark.parametrize(
    ("dim", "heads", "sizes", "options"),
    [
        (4, 2, (3, 4), {}),
        (6, 2, (2, 3), {"activation": "gelu", "bias": True}),
        (3, 3, (1, 1), {"activation": "sigmoid"}),
        (4, 1, (2, 5), {"activation": "identity"}),
        (4, 2, (5, 4), {"tile": 3}),
        (4, 2, (2, 7), {"tile": 3, "bias": True}),
    ],
)
def test_equals_the_loops(dim: int, heads: int, sizes: tuple[int, int], options: dict) -> None:
    layer, (x,) = made(dim, heads, **options), leaves(normal(1, 2, dim, *sizes))
    got, want = layer(x), looped(x, layer)
    close(got, want)
    wanted = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


def test_masked_pixels_equal_the_loops() -> None:
    layer, keep = made(4, 2, activation="identity"), normal(2, 2, 3, 4) > -0.3
    qkv = normal(1, 2, 12, 3, 4) * keep[:, None]
    q, k, v = (z.flatten(2).unflatten(1, (2, 2)) for z in qkv.chunk(3, 1))
    got = sparse_channel_attention(q, k, v, layer.temperature, activation="identity")
    want = naive.channel_attention(*qkv.chunk(3, 1), layer.temperature, 2, activation="identity", mask=keep)
    close(got.flatten(1, 2).unflatten(2, (3, 4)), want)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_hidden_changes_nothing(tile: int | None, bias: bool) -> None:
    """A map that ends earlier is one whose rest is hidden; NaN there changes nothing."""
    layer, x = made(4, 2, tile=tile, bias=bias), normal(1, 2, 4, 4, 5)
    keep = torch.zeros(2, 4, 5, dtype=torch.bool)
    keep[:, :3, :4] = True
    got = layer(x, mask=keep)
    spoilt = layer(x.masked_fill(~keep[:, None], torch.nan), mask=keep)
    same(spoilt, got)
    for a, b in zip(*(gradients(out, list(layer.parameters())) for out in (got, spoilt)), strict=True):
        same(a, b)
    if tile is None:
        close(got[..., :3, :4], layer(x[..., :3, :4]))
    close(layer(x, mask=torch.ones_like(keep)), layer(x))
    nothing = layer(x, mask=torch.zeros_like(keep))
    close(nothing, torch.zeros_like(x) if not bias else layer.o_proj.bias[:, None, None].expand_as(x))
    with pytest.raises(ValueError, match=r"mask has the wrong shape"):
        layer(x, mask=keep[:, 1:])


@pytest.mark.parametrize("case", ["gsa", "gsab", "tlc"])
def test_gives_the_authors_numbers(case: str) -> None:
    z, of = vectors("A199", case), vectors("A199", "gsa" if case == "gsa" else "gsab")
    heads, tile = len(of["p_temperature"]), int(z["kernel"]) if case == "tlc" else None
    layer = SparseChannelAttention(z["x"].shape[1], heads, bias=case != "gsa", tile=tile).double()
    layer.train(case != "tlc")
    names = {"qkv": "qkv_proj", "qkv_dwconv": "near", "project_out": "o_proj"}
    given = {n[2:].partition("."): p for n, p in of.items() if n.startswith("p_")}
    layer.load_state_dict({f"{names.get(part, part)}{dot}{kind}": p for (part, dot, kind), p in given.items()})
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    if case == "tlc":
        whole = layer.train()(x)
        assert float((whole - out).detach().abs().max()) > 0.1, "tiles are another function"
        return
    found = torch.autograd.grad((out * z["w"]).sum(), [x, layer.temperature, layer.qkv_proj.weight])
    for got, name in zip(found, ("gx", "g_temperature", "g_qkv"), strict=True):
        close(got, z[name])


def test_the_block_equals_the_loops() -> None:
    block = filled(HybridDynamicBlock(4, 2, kernel_size=3, group_channels=2, mlp_ratio=1))
    (x,) = leaves(normal(1, 1, 4, 3, 4))
    local, first, sparse, second = block.branches
    want = naive.hdtb(
        x,
        [(norm.weight, norm.bias) for norm in block.norms],
        lambda z: naive.mhdlsa(z, *local_weights(local), 2),
        (first.up.weight, first.near.weight, first.down.weight),
        lambda z: looped(z, sparse),
        (second.up.weight, second.near.weight, second.down.weight),
    )
    got = block(x)
    close(got, want)
    wanted = [x, *block.parameters()]
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


def test_the_network_is_its_parts_in_a_row() -> None:
    net = dlgsanet(dim=4, num_heads=2, groups=2, blocks=1, kernel_size=3, group_channels=2, mlp_ratio=1, scale=2)
    net, image = filled(net), normal(1, 2, 3, 3, 4)
    mean = torch.tensor(RGB_MEAN, dtype=torch.float64)[:, None, None]
    f = z = nn.functional.conv2d(image - mean, net.first.weight, None, padding=1)
    for group in net.body:
        z = z + group.conv(group.blocks[0](z))
    large = nn.functional.pixel_shuffle(net.upsampler.steps[0](f + net.trunk(z)), 2)
    close(net(image), large + mean)
    assert net(image).shape == (2, 3, 6, 8)


def test_half_of_the_weights_are_nothing() -> None:
    torch.manual_seed(0)
    layer, x = regard.create("sparse_channel", dim=48, num_heads=6), torch.randn(4, 48, 24, 24)
    assert (layer.temperature == 1).all()
    weights = layer.weights(x)
    assert 0.4 < (weights == 0).double().mean() < 0.6
    q, k = torch.randn(2, 1, 6, 8, 576)
    one_hot = torch.eye(8, 576).expand(1, 6, 8, 576)
    weights = sparse_channel_attention(q, k, one_hot, layer.temperature)[..., :8]
    assert 0.4 < (weights == 0).double().mean() < 0.6
    assert (regard.create("sparse_channel", dim=48, num_heads=6, activation="sigmoid").weights(x) > 0).all()


def test_a_row_of_zeros_gives_zero() -> None:
    """Softmax has no such row."""
    q = torch.ones(1, 1, 2, 3, dtype=torch.float64)
    k = -q
    v, t = normal(0, 1, 1, 2, 3), torch.ones(1, 1, 1, dtype=torch.float64)
    assert (sparse_channel_attention(q, k, v, t) == 0).all()
    layer = made(2, 1)
    nn.init.zeros_(layer.temperature)
    assert (layer(normal(1, 1, 2, 3, 3)) == 0).all()


def test_knows_no_order_of_pixels() -> None:
    q, k, v = (normal(n, 2, 2, 3, 7) for n in range(3))
    t, order = normal(3, 2, 1, 1), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    got = sparse_channel_attention(*(z[..., order] for z in (q, k, v)), t)
    close(got, sparse_channel_attention(q, k, v, t)[..., order])


def test_tiles_cover_the_map_evenly() -> None:
    for size in range(1, 30):
        for tile in (1, 4, 7):
            starts = tile_starts(size, tile)
            assert starts == naive.tile_starts(size, tile)
            assert sorted({at for s in starts for at in range(s, min(s + tile, size))}) == list(range(size))


def test_cost_is_linear_in_pixels() -> None:
    for options in ({}, {"tile": 8}):
        layer = made(8, 2, **options)
        small, large = normal(0, 1, 8, 8, 8), normal(0, 1, 8, 16, 32)
        assert flops(lambda m=layer, x=large: m(x)) == 8 * flops(lambda m=layer, x=small: m(x)) > 0


def test_bad_input_and_empty_maps() -> None:
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 5 \(got 12\)"):
        SparseChannelAttention(12, 5)
    with pytest.raises(ValueError, match=r"activation is unknown \(got 'softmax'\)"):
        SparseChannelAttention(12, activation="softmax")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tile is too small \(got 0\)"):
        SparseChannelAttention(12, tile=0)
    with pytest.raises(ValueError, match="hidden is too small"):
        GatedConvFeedForward(4, 0)
    for tile in (None, 2):
        layer = SparseChannelAttention(12, tile=tile).eval()
        assert layer(torch.zeros(0, 12, 3, 3)).shape == (0, 12, 3, 3)
        with pytest.raises(ValueError, match=r"x has no pixels \(got \(1, 12, 0, 3\)\)"):
            layer(torch.zeros(1, 12, 0, 3))

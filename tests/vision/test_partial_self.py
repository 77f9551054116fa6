"""PATNet's attention and block against loops, whose author saw the account of the paper alone, neither code nor test,
and the authors' numbers (A002)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.positions import grid
from regard.vision.partial_self import EuclideanBias, PartialAttentionBlock, PartialSelfAttention, distance_bucket
from vision import naive_partial_attention as naive
from vision.shared import filled, gradients, leaves, normal, vectors
from vision.test_partial import NAMES, channel, load, norm, spatial, torchs_hard_sigmoid  # noqa: F401


def attending(layer: PartialSelfAttention) -> tuple:
    a = layer.attention
    qkv = torch.cat([p.weight for p in (a.q_proj, a.k_proj, a.v_proj)])
    table = torch.cat([a.position.table[:, 1:].flip(-1), a.position.table], -1)  # whatever negative distances have
    return (
        layer.conv.weight,
        layer.norm.weight,
        layer.norm.bias,
        qkv,
        a.o_proj.weight,
        a.o_proj.bias,
        table,
        a.num_heads,
    )


@pytest.mark.parametrize(("options", "distances"), [({}, (20, 40, 160)), ({"divide": 3, "max_distance": 2}, (1, 2, 8))])
def test_is_the_definition(options: dict, distances: tuple[int, int, int]) -> None:
    layer = filled(PartialSelfAttention(8 if not options else 6, 2, **options))
    (x,) = leaves(normal(1, 2, layer.dim, 4, 3))
    got = layer(x)
    want = naive.partial_self_attention(x, *attending(layer), **dict(zip(("alpha", "beta", "gamma"), distances)))
    close(got, want)
    of = [x, *layer.parameters()]
    for a, b in zip(gradients(got, of), gradients(want, of), strict=True):
        close(a, b)


@pytest.mark.parametrize("sizes", [(20, 40, 160), (3.5, 7, 28), (1, 4, 8)])
def test_buckets(sizes: tuple[float, int, float]) -> None:
    d = torch.arange(300)
    got = distance_bucket(d, **dict(zip(("alpha", "beta", "gamma"), sizes)))
    assert got.tolist() == [naive.distance_bucket(int(n), *sizes) for n in d]
    assert got.max() == sizes[1]


def test_bias_by_distance() -> None:
    part = EuclideanBias(3, alpha=2, beta=4, gamma=16)
    nn.init.normal_(part.table)
    layer = regard.Attention(6, 3, position=part).double()
    x, at = normal(2, 2, 20, 6), grid(4, 5)
    q, k, v = (f(x).unflatten(-1, (3, 2)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    table = torch.cat([torch.zeros(3, 4), part.table], -1)
    bias = naive.euclidean_bias(table, 4, 5, alpha=2, beta=4, gamma=16)[None]
    want = layer.o_proj(regard.attention(q, k, v, bias=bias).transpose(1, 2).flatten(2))
    close(layer(x, positions=at), want)
    layer.kernel = "chunked"
    close(layer(x, positions=at.expand(2, -1, -1)), want)
    with pytest.raises(ValueError, match=r"EuclideanBias: positions are no coordinates \(got none\)"):
        layer(x)


SELF = {
    "conv.weight": "partial_conv3.weight",
    "norm": "norm",
    "attention.o_proj": "attn.proj",
}


def load_self(layer: PartialSelfAttention, z: dict[str, Tensor], where: str = "p_") -> None:
    load(layer, z, SELF, where)
    a = layer.attention
    with torch.no_grad():
        for p, part in zip((a.q_proj, a.k_proj, a.v_proj), z[where + "attn.qkv.weight"].chunk(3), strict=True):
            p.weight.copy_(part)
        a.position.table.copy_(z[where + "attn.rpe_k.lookup_table_bias"][:, 40:])


def test_authors_numbers() -> None:
    z = vectors("A002", "sf")
    layer = PartialSelfAttention(16, 4).double().eval()
    load_self(layer, z)
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    a, table = layer.attention, z["g_attn.rpe_k.lookup_table_bias"]
    close(torch.cat([p.weight.grad for p in (a.q_proj, a.k_proj, a.v_proj)]), z["g_attn.qkv.weight"])
    close(a.position.table.grad, table[:, 40:])
    assert not table[:, :40].any(), "rows that nothing reads"


@pytest.mark.parametrize("kind", ["channel", "self"])
def test_authors_numbers_of_a_block(kind: str) -> None:
    z = vectors("A002", "block_ch" if kind == "channel" else "block_sf")
    block = PartialAttentionBlock(z["x"].shape[1], kind=kind).double().eval()
    (load_self if kind == "self" else lambda *a: load(a[0], a[1], NAMES["ch"], a[2]))(
        block.mixer, z, "p_spatial_mixing."
    )
    load(block.mlp, z, {n: f"mlp.{n}" for n in ("0", "1", "3")})
    load(block.mlp[4], z, NAMES["sp"], "p_mlp.4.")
    (x,) = leaves(z["x"])
    out = block(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    close(block.mlp[0].weight.grad, z["g_mlp.0.weight"])
    close(block.mlp[4].attend.weight.grad, z["g_mlp.4.conv_attn.weight"])


@pytest.mark.parametrize("kind", ["channel", "self"])
@pytest.mark.parametrize("options", [{}, {"spatial": False, "mlp_ratio": 1.5, "layer_scale": 0.5}])
def test_block_is_the_definition(kind: str, options: dict) -> None:
    block = filled(PartialAttentionBlock(8, kind=kind, num_heads=2, **options)).train()
    x = normal(3, 2, 8, 3, 4)
    mixing = channel(block.mixer) if kind == "channel" else attending(block.mixer)
    last = block.mlp[4]
    weights = (block.mlp[0].weight, norm(block.mlp[1]), block.mlp[3].weight)
    weights += (spatial(last),) if not isinstance(last, nn.Identity) else ()
    scale = None if block.scale is None else block.scale.flatten()
    want = naive.partial_attention_block(x, kind, mixing, weights, layer_scale=scale, training=True)
    close(block(x), want)


def test_images_go_without_their_mlp() -> None:
    torch.manual_seed(0)
    block = PartialAttentionBlock(8, drop_path=0.5, spatial=False)
    x = torch.randn(64, 8, 2, 2)
    alone = (block(x) == x).flatten(1).all(1)
    assert 16 < int(alone.sum()) < 48
    z = block.eval()(x) - x
    assert z.flatten(1).any(1).all()


def test_only_distance_tells_places_apart() -> None:
    """Turned by a right angle, the attending channels turn with the map; with other places they don't, if far pixels
    count less; and where distance counts for nothing, any order will do."""
    layer = filled(regard.create("partial_self", dim=8, num_heads=2))
    x = normal(4, 1, 8, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def apart(move) -> float:
        return float((layer(move(x)) - move(layer(x)))[:, 2:].abs().max())

    def shuffled(z: Tensor) -> Tensor:
        return z.flatten(2)[..., order].view_as(z)

    assert apart(lambda z: z.rot90(1, (2, 3))) < 1e-12
    assert apart(shuffled) > 1e-3
    nn.init.zeros_(layer.attention.position.table)
    assert apart(shuffled) < 1e-12
    (x,) = leaves(x)
    seen = torch.autograd.grad(layer(x)[0, 2:, 0, 0].square().sum(), x)[0]
    assert seen[:, 2:].abs().amin() > 0
    assert not seen[:, :2].any()


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = PartialSelfAttention(128, 4)
    assert not layer.attention.position.table.any()
    assert layer.attention.position.table.shape == (4, 41)
    assert not layer.attention.o_proj.bias.any()
    for p in (layer.attention.q_proj, layer.attention.o_proj, layer.conv):
        assert abs(float(p.weight.detach().std()) - 0.02) < 0.001


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PartialSelfAttention: rest is no multiple of num_heads = 4 \(got 6\)"):
        PartialSelfAttention(8, 4)
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 8, 3, 0\)\)"):
        PartialSelfAttention(8, 2)(torch.zeros(2, 8, 3, 0))
    assert PartialSelfAttention(8, 2)(torch.zeros(0, 8, 3, 2)).shape == (0, 8, 3, 2)
    with pytest.raises(ValueError, match=r"kind is unknown \(got 'spatial'\)"):
        PartialAttentionBlock(8, kind="spatial")
    with pytest.raises(ValueError, match=r"EuclideanBias: gamma is out of range \(got 20\)"):
        EuclideanBias(2, gamma=20)

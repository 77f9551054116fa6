"""Bi-level routing: loops over a map's tokens, the authors' numbers (B079), full attention, the block-sparse kernel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import BiLevelRouting
from regard.routing.biformer import region_affinity, region_attention, route_regions
from routing.naive_biformer import naive_biformer

VECTORS = Path(__file__).parents[1] / "vectors" / "B079.npz"


def filled(seed: int, dim: int, heads: int, **options) -> BiLevelRouting:
    layer = BiLevelRouting(dim, heads, **options).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return layer


def image(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(layer: BiLevelRouting, x: Tensor) -> Tensor:
    p = dict(layer.named_parameters())
    weight, bias = (torch.cat([p[f"{n}_proj.{kind}"] for n in "qkv"]) for kind in ("weight", "bias"))
    return naive_biformer(
        x, weight, bias, p.get("local.weight"), p.get("local.bias"), p.get("o_proj.weight"), p.get("o_proj.bias"),
        regions=layer.regions, topk=layer.topk, heads=layer.num_heads, soft=layer.routing == "soft",
        w_route=p.get("route_proj.weight"), b_route=p.get("route_proj.bias"), pool=layer.pool, pool_to=layer.pool_to,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("Y", "X", "regions", "topk", "kernel"),
    [(4, 4, 2, 2, 3), (6, 3, 3, 4, 0), (5, 4, 2, 1, 5), (4, 7, 3, 3, 3), (1, 1, 1, 1, 1)],
)
def test_is_the_definition(Y: int, X: int, regions: int, topk: int, kernel: int) -> None:
    same_as_loops(filled(Y + X, 6, 3, regions=regions, topk=topk, kernel=kernel), image(regions, 2, 6, Y, X))


@pytest.mark.parametrize(
    "options",
    [
        {"qk_dim": 3},
        {"qk_dim": 12, "routing": "soft"},
        {"routing": "soft", "route_proj": True},
        {"pool": "mean", "pool_to": 2},
        {"pool": "max", "pool_to": 1, "project": False},
        {"pool": "max", "pool_to": 2, "qk_dim": 9, "routing": "soft", "route_proj": True},
    ],
)
def test_variants_are_their_definitions(options: dict) -> None:
    same_as_loops(filled(7, 6, 3, regions=2, topk=2, kernel=3, **options), image(8, 2, 6, 5, 7))


@pytest.mark.parametrize(
    "options",
    [
        {"regions": 9, "topk": 20},
        {"regions": 7, "routing": "soft", "kernel": 5},
        {"regions": 2, "pool": "mean", "pool_to": 7},
        pytest.param({"regions": 2, "pool": "max", "pool_to": 11}, marks=pytest.mark.slow),
    ],
)
def test_more_regions_or_cells_than_there_are_tokens(options: dict) -> None:
    """They are laid out no more often than they differ, and count as often as they are asked for."""
    same_as_loops(filled(7, 6, 3, **{"topk": 2, "kernel": 3, **options}), image(8, 2, 6, 4, 5))


def same_as_loops(layer: BiLevelRouting, x: Tensor) -> None:
    x = x.requires_grad_()
    got, want = layer(x), oracle(layer, x)
    close(got, want, "out")
    g = image(9, *x.shape)
    wanted = [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), wanted) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("a", {"num_heads": 3, "regions": 2, "topk": 2}),
        ("b", {"num_heads": 3, "regions": 3, "topk": 4, "kernel": 5, "qk_dim": 12}),
        ("c", {"num_heads": 2, "regions": 3, "topk": 2, "routing": "soft", "qk_dim": 2}),
        ("d", {"num_heads": 2, "regions": 3, "topk": 3, "kernel": 0, "routing": "soft", "route_proj": True}),
        ("e", {"num_heads": 1, "regions": 2, "topk": 3, "pool": "mean", "pool_to": 2}),
        ("f", {"num_heads": 2, "regions": 2, "topk": 2, "pool": "max", "pool_to": 2, "project": False}),
        ("g", {"num_heads": 2, "regions": 2, "topk": 2, "pool": "mean", "pool_to": 3, "qk_dim": 6, "routing": "soft",
               "route_proj": True}),
    ],
)  # fmt: skip
def test_authors_numbers(case: str, options: dict) -> None:
    """Outputs and all gradients of the released module: b and g pad the map."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    dim = z["x"].shape[-1]
    layer = BiLevelRouting(dim, **{"kernel": 3, **options}).double()
    names = {"local": "lepe", "o_proj": "wo", "route_proj": "router.emb"}
    widths = [layer.qk_dim, layer.qk_dim, dim]

    def ours(letter: str) -> dict[str, Tensor]:
        found = {}
        for kind in ("weight", "bias"):
            parts = z[f"{letter}_qkv.qkv.{kind}"].split(widths)
            found |= {f"{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            found |= {f"{a}.{kind}": z[f"{letter}_{b}.{kind}"] for a, b in names.items() if f"P_{b}.{kind}" in z}
        return found

    layer.load_state_dict(ours("P"))
    x = z["x"].permute(0, 3, 1, 2).requires_grad_()
    y = layer(x)
    close(y, z["out"].permute(0, 3, 1, 2), "out")
    own = dict(layer.named_parameters())
    grads = torch.autograd.grad((y * z["w"].permute(0, 3, 1, 2)).sum(), [x, *own.values()])
    close(grads[0], z["gx"].permute(0, 3, 1, 2), "x")
    wanted = ours("G")
    for name, grad in zip(own, grads[1:], strict=True):
        close(grad, wanted[name], name)


def test_soft_routing_teaches_the_choice() -> None:
    """The means have a gradient through their shares, and none where the choice is hard."""
    q, k, v = (z.requires_grad_() for z in image(3, 3, 1, 2, 4, 4, 3))
    apart = image(4, 1, 2, 4, 4, 3)
    for soft in (False, True):
        affinity = region_affinity(q + apart, k)
        kept = affinity.topk(2)
        out = region_attention(q, k, v, kept.indices, weights=kept.values.softmax(-1) if soft else None)
        assert (torch.autograd.grad(out.sum(), affinity, allow_unused=True)[0] is not None) == soft


def test_all_regions_are_full_attention() -> None:
    layer, x = filled(1, 8, 2, regions=3, topk=9, kernel=3), image(2, 2, 8, 6, 9)
    tokens = x.flatten(2).mT
    q, k, v = (p(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    local = conv2d(
        layer.v_proj(tokens).mT.reshape(2, 8, 6, 9), layer.local.weight, layer.local.bias, padding=1, groups=8
    )
    close(layer(x), layer.o_proj(out + local.flatten(2).mT).mT.reshape(x.shape))


def test_is_what_the_block_sparse_kernel_gives_for_the_chosen_regions() -> None:
    q, k, v = image(3, 3, 2, 2, 9, 16, 4)
    chosen = route_regions(q, k, topk=2)
    tiles = torch.zeros(2, 9, 9, dtype=torch.bool).scatter(2, chosen, True)[:, None]
    flat = (z.flatten(2, 3) for z in (q, k, v))
    want = regard.attention(*flat, mask=masks.chosen(tiles, 144, 144, 16), kernel="block_sparse")
    close(region_attention(q, k, v, chosen).flatten(2, 3), want)


def test_a_query_reads_16_of_196_tokens() -> None:
    """14 x 14 map, 7 x 7 regions, 4 of them chosen."""
    layer, x = filled(4, 4, 1, regions=7, topk=4, kernel=0), image(5, 1, 4, 14, 14).requires_grad_()
    for y, z in ((0, 0), (6, 9), (13, 13)):
        grad = torch.autograd.grad(layer(x)[0, :, y, z].sum(), x)[0][0]
        read = grad.ne(0).any(0)
        read[y, z] = False
        own = x.new_zeros(14, 14, dtype=torch.bool)
        own[y // 2 * 2 : y // 2 * 2 + 2, z // 2 * 2 : z // 2 * 2 + 2] = True
        assert int(read.sum()) in (15, 16)
        assert int((read & own).sum()) in (0, 3)
        regions = read.unflatten(0, (7, 2)).unflatten(2, (7, 2)).any(3).any(1)
        assert int(regions.sum()) == 4


def test_regions_are_chosen_by_their_means() -> None:
    """Two kinds of regions: each attends to its own kind alone."""
    kind = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).flatten()
    q = 3 * torch.nn.functional.one_hot(kind, 4).double()[None, None, :, None] + 0.1 * image(6, 1, 1, 9, 5, 4)
    chosen = route_regions(q, q, topk=4)[0]
    assert torch.equal(kind[chosen], kind[:, None].expand(-1, 4))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"topk": 50}, ValueError, r"topk is too large \(got 50\); expected an int from 1 to 49"),
        ({"kernel": 4}, ValueError, r"kernel is even \(got 4\); expected an odd width, or 0"),
        ({"regions": 0}, ValueError, r"regions is too small \(got 0\); expected an int >= 1"),
        ({"topk": True}, TypeError, r"topk has the wrong type \(got True\); expected an int from 1 to 49"),
        ({"qk_dim": 3}, ValueError, r"qk_dim is no multiple of num_heads = 2 \(got 3\)"),
        ({"routing": "firm"}, ValueError, r"routing is unknown \(got 'firm'\); expected one of 'hard', 'soft'"),
        ({"pool": "sum"}, ValueError, r"pool is unknown \(got 'sum'\)"),
        ({"route_proj": True}, ValueError, r"route_proj has nothing to learn from \(got True\); expected routing="),
        ({"num_heads": 3}, ValueError, r"dim is no multiple of num_heads = 3 \(got 8\)"),
    ],
)
def test_refuses_options(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"BiLevelRouting: {words}"):
        BiLevelRouting(**{"dim": 8, "num_heads": 2, **options})


def test_refuses_other_shapes() -> None:
    layer = filled(0, 8, 2, regions=2, topk=1)
    for bad in ((2, 8, 5), (2, 7, 4, 4)):
        with pytest.raises(ValueError, match=r"x has the wrong shape \(got .*\); expected \(B, M = 8, Y, X\)"):
            layer(image(0, *bad))
    with pytest.raises(ValueError, match="causal"):
        regard.create("biformer", dim=8, num_heads=2, causal=True)

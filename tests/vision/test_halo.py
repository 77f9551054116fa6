"""Halo attention against loops over queries and keys, and the numbers of two public implementations (A041)."""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import HaloAttention, halo_attention
from vision.naive_halo import naive_halo
from vision.shared import filled, gradients, leaves, normal, vectors

CASES = [
    # Y, X, block, halo, stride, options
    (4, 6, 2, 1, 1, {}),
    (3, 3, 3, 0, 1, {}),
    (2, 4, 2, 2, 1, {"scale_positions": True}),
    (4, 4, 1, 1, 1, {"padding": "masked"}),
    (6, 3, 3, 2, 1, {"padding": "masked"}),
    (2, 4, 2, 1, 2, {}),
    (4, 4, 4, 1, 2, {"distances": "steps", "padding": "masked"}),
]


@pytest.mark.parametrize(("Y", "X", "block", "halo", "stride", "options"), CASES)
@pytest.mark.parametrize("positions", [True, False])
def test_equals_the_loops(Y: int, X: int, block: int, halo: int, stride: int, options: dict, positions: bool) -> None:
    B, H, D, V = 1, 2, 3, 2
    offsets = 2 * (block + 2 * halo) - 1
    shapes = ((B, H, Y // stride, X // stride, D), (B, H, Y, X, D), (B, H, Y, X, V), (offsets, D), (offsets, D))
    q, k, v, *tables = leaves(*(normal(n, *s) for n, s in enumerate(shapes)))
    inputs = [q, k, v, *tables] if positions else [q, k, v]
    got = halo_attention(q, k, v, block=block, halo=halo, tables=tuple(tables) if positions else None, **options)
    want = naive_halo(
        q,
        k,
        v,
        *(tables if positions else (None, None)),
        block=block,
        halo=halo,
        stride=stride,
        scale_positions=options.get("scale_positions", False),
        mask_padding=options.get("padding") == "masked",
        strided_offsets="timm" if options.get("distances") == "steps" else "pixels",
    )
    close(got, want)
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


def heads(x: Tensor, weight: Tensor, bias: Tensor | None, H: int) -> Tensor:
    """A 1x1 convolution's output by heads, (B, H, Y, X, d)."""
    return torch.nn.functional.conv2d(x, weight, bias).unflatten(1, (H, -1)).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize("case", ["halo", "halobias", "stride2"])
def test_gives_timms_numbers(case: str) -> None:
    z = vectors("A041", case)
    H, D, block, halo, stride, scaled = (int(n) for n in z["cfg"])
    (x,) = leaves(z["x"])
    q = heads(x[..., ::stride, ::stride], z["p_q.weight"], z.get("p_q.bias"), H)
    kv = heads(x, z["p_kv.weight"], z.get("p_kv.bias"), H)
    out = halo_attention(
        q,
        kv[..., :D],
        kv[..., D:],
        block=block,
        halo=halo,
        tables=(z["p_pos_embed.height_rel"], z["p_pos_embed.width_rel"]),
        distances="steps",
        scale_positions=bool(scaled),
    )
    out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


def test_gives_lucidrains_numbers() -> None:
    """Keys beyond the border are masked there, and both terms scaled."""
    z = vectors("A041", "masked")
    H, _, block, halo, _, _ = (int(n) for n in z["cfg"])
    (x,) = leaves(z["x"])
    key, value = z["p_to_kv.weight"].chunk(2)
    q, k, v = (heads(x, w[..., None, None], None, H) for w in (z["p_to_q.weight"], key, value))
    out = halo_attention(
        q,
        k,
        v,
        block=block,
        halo=halo,
        tables=(z["p_rel_pos_emb.rel_height"], z["p_rel_pos_emb.rel_width"]),
        padding="masked",
        scale_positions=True,
    )
    out = out.permute(0, 2, 3, 1, 4).flatten(3) @ z["p_to_out.weight"].T + z["p_to_out.bias"]
    out = out.permute(0, 3, 1, 2)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": "masked", "head_dim": 5, "bias": True}])
def test_layer_equals_the_loops(options: dict) -> None:
    layer = filled(HaloAttention(6, 2, block=2, halo=1, **options))
    x, s = normal(1, 2, 6, 4, 4), layer.stride
    q, k, v = (
        heads(z, f.weight, f.bias, 2)
        for z, f in ((x[..., ::s, ::s], layer.q_proj), (x, layer.k_proj), (x, layer.v_proj))
    )
    want = naive_halo(
        q,
        k,
        v,
        layer.height_table,
        layer.width_table,
        2,
        1,
        s,
        mask_padding="padding" in options,
        strided_offsets="pixels",
    )
    close(layer(x), want.permute(0, 1, 4, 2, 3).flatten(1, 2))


def test_without_a_halo_blocks_are_alone_and_the_halo_widens_the_view_at_no_parameters() -> None:
    x = normal(2, 1, 4, 8, 8)
    for halo in (0, 1, 2):
        layer = filled(HaloAttention(4, 1, block=4, halo=halo))
        (source,) = leaves(x)
        seen = torch.autograd.grad(layer(source)[0, :, 0, 0].sum(), source)[0].ne(0).any(1)[0]
        assert seen.nonzero().max() == 3 + halo
        projections = sum(p.numel() for name, p in layer.named_parameters() if "proj" in name)
        assert projections == 3 * 4 * 4
        assert layer.height_table.shape == (2 * (4 + 2 * halo) - 1, 4)


def test_equivariant_to_moving_by_whole_blocks_only() -> None:
    layer = filled(HaloAttention(4, 2, block=2, halo=1))
    x = normal(3, 1, 4, 12, 12)

    def moved(by: int) -> Tensor:
        """How far the middle is from moving along."""
        y, z = layer(x), layer(x.roll(by, 3))
        return (y.roll(by, 3) - z)[..., 4:-4, 4:-4].abs().max()

    assert moved(2) < 1e-12
    assert moved(1) > 1e-3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"block is no multiple of stride = 2 \(got 3\)"):
        HaloAttention(4, 2, block=3, stride=2)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 5\)"):
        HaloAttention(5, 2)
    with pytest.raises(ValueError, match=r"padding is unknown \(got 'none'\); expected one of 'zeros', 'masked'"):
        HaloAttention(4, 2, padding="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"distances is unknown \(got 'miles'\); expected one of 'pixels', 'steps'"):
        HaloAttention(4, 2, distances="miles")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Y is no multiple of block = 4 \(got 6\)"):
        HaloAttention(4, 2, block=4)(normal(0, 1, 4, 6, 8))
    with pytest.raises(ValueError, match=r"halo is too small \(got -1\)"):
        HaloAttention(4, 2, halo=-1)
    with pytest.raises(ValueError, match=r"halo reaches beyond the whole map \(got 9\); expected at most 8"):
        HaloAttention(4, 2, block=4, halo=9)(normal(0, 1, 4, 4, 8))
    for option in ("stride", "distances"):
        with pytest.raises(ValueError, match=rf"'halo' has no such option \(got '{option}'\)"):
            regard.create("halo", dim=4, num_heads=2, **{option: 1})

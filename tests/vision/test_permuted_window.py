"""Permuted self-attention against loops, whose author saw only the paper's account, and the authors' numbers."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

import regard
from laws.measured import flops, largest
from regard.laws.agreement import close
from regard.vision.permuted_window import PermutedSelfAttention, cells, permuted_window_attention
from regard.vision.srformer import ConvFeedForward, SRFormerBlock, srformer
from regard.vision.super_resolution import RGB_MEAN, DropPath, PixelShuffle
from vision import naive_permuted_window as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def made(dim: int, heads: int, seed: int = 0, **options) -> PermutedSelfAttention:
    return filled(regard.create("permuted_window", dim=dim, num_heads=heads, causal=False, **options), seed)


def weights(layer: PermutedSelfAttention) -> list[Tensor]:
    """As the loops take them."""
    joined = [torch.cat([getattr(p, kind) for p in (layer.k_proj, layer.v_proj)]) for kind in ("weight", "bias")]
    own = [layer.q_proj.weight, layer.q_proj.bias, *joined, layer.o_proj.weight, layer.o_proj.bias]
    return [*own, layer.table.flatten(1).T]


def agree(got: Tensor, want: Tensor, wanted: list[Tensor]) -> None:
    close(got, want)
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("dim", "heads", "window", "shift", "sizes", "reduction"),
    [
        (4, 1, 4, 0, (4, 8), 2),
        (8, 4, 4, 0, (4, 4), 2),
        (12, 3, 4, 2, (8, 8), 2),  # heads that straddle pixels of a cell
        (4, 2, 2, 0, (4, 2), 1),
        (9, 3, 6, 3, (12, 6 + 6), 3),
    ],
)
def test_equals_the_loops(dim: int, heads: int, window: int, shift: int, sizes, reduction: int) -> None:
    layer = made(dim, heads, window=window, shift=shift, reduction=reduction)
    (x,) = leaves(normal(1, 1, dim, *sizes))
    told = {"window": window, "shift": shift, "reduction": reduction, "mask_value": -math.inf}
    if window == 6:  # loops take their time: values alone
        close(layer(x), naive.permuted_self_attention(x, *weights(layer), heads, **told))
    else:
        want = naive.permuted_self_attention(x, *weights(layer), heads, **told)
        agree(layer(x), want, [x, *layer.parameters()])


def test_cells_lie_side_by_side() -> None:
    z = normal(0, 2, 4, 6, 3)
    close(cells(z, 2), torch.stack([naive.permute_cell(one) for one in z]))


NAMES = (
    (r"(^|attn\.)relative_position_bias_table", r"\1table"),
    (r"(^|attn\.)q\.", r"\1q_proj."),
    (r"(^|attn\.)proj\.", r"\1o_proj."),
    (r"attn\.", "attention."),
    (r"norm1", "norms.0"),
    (r"norm2", "norms.1"),
    (r"mlp\.fc1", "feed_forward.up"),
    (r"mlp\.fc2", "feed_forward.down"),
    (r"mlp\.dwconv\.depthwise_conv\.0", "feed_forward.near"),
    (r"conv_first", "first"),
    (r"patch_embed\.norm", "body.0"),
    (r"layers\.0\.residual_group\.", "body.1."),
    (r"layers\.0\.conv", "body.1.conv"),
    (r"^norm\.", "body.2."),
    (r"conv_after_body", "trunk"),
    (r"upsample\.0", "upsampler.steps.0"),
)


def ours(theirs: dict[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """The authors' parameters, or their gradients, by our names and in our shapes."""
    found: dict[str, Tensor] = {}
    for name, z in theirs.items():
        both = re.sub(r"kv\.(\w+)$", r"*_proj.\1", name)
        for pattern, replaced in NAMES:
            both = re.sub(pattern, replaced, both)
        if "*" in both:
            found |= {both.replace("*", part): half for part, half in zip("kv", z.chunk(2), strict=True)}
        else:
            found[both] = z.T if both.endswith("table") else z
    shapes = dict(layer.named_parameters())
    assert found.keys() == shapes.keys()
    return {name: z.reshape(shapes[name].shape) for name, z in found.items()}


@pytest.mark.parametrize("case", ["psa", "psah", "psanb", "block", "blocks", "light"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Theirs are windows as rows of tokens, and maps as tokens."""
    z = vectors("A148", case)
    sizes = {"psa": (4, 4), "psah": (4, 4), "psanb": (2, 2)}.get(case, (8, 12))
    if case == "light":
        layer: nn.Module = srformer(dim=4, num_heads=2, window=4, depths=(2,), scale=2, span=2.0, drop_path=0.0)
    elif case.startswith("block"):
        layer = SRFormerBlock(8, 2, window=4, shift=2 * (case == "blocks"))
    else:
        heads = {"psa": 4, "psah": 3, "psanb": 2}[case]
        layer = PermutedSelfAttention(z["x"].shape[-1], heads, window=sizes[0], bias=case != "psanb")
    layer = layer.double()
    named = {kind: {n[2:]: p for n, p in z.items() if n.startswith(kind)} for kind in ("p_", "g_")}
    layer.load_state_dict(ours(named["p_"], layer))
    (x,) = leaves(z["x"])
    out = layer(x) if case == "light" else layer(x.mT.unflatten(2, sizes)).flatten(2).mT
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    given = ours(named["g_"], layer)
    for name, p in layer.named_parameters():
        close(p.grad, given[name])


def test_the_network_in_steps_equals_the_loops() -> None:
    torch.manual_seed(0)
    net = srformer(dim=4, num_heads=2, window=4, depths=(1,), mlp_ratio=1, scale=4, upsampler="steps", drop_path=0.0)
    net = filled(net)
    for p in net.upsampler.parameters():
        p.data.mul_(0.1)
    (image,) = leaves(normal(1, 1, 3, 3, 4))
    group, pairs = net.body[1], lambda part: (part.weight, part.bias)
    block = group.blocks[0]
    ffn = [t for part in (block.feed_forward.up, block.feed_forward.near, block.feed_forward.down) for t in pairs(part)]
    parts = [(pairs(block.norms[0]), weights(block.attention), pairs(block.norms[1]), ffn)]
    convs = [pairs(m) for m in net.upsampler.steps if isinstance(m, nn.Conv2d)]
    want = naive.srformer(
        image,
        4,
        pairs(net.first),
        [(parts, *pairs(group.conv))],
        pairs(net.body[2]),
        pairs(net.trunk),
        convs[:-1],
        2,
        window=4,
        embed_norm=pairs(net.body[0]),
        last=convs[-1],
        mean=RGB_MEAN,
    )
    got = net(image)
    close(got, want)
    close(*(torch.autograd.grad(out.square().sum(), image)[0] for out in (got, want)))


def test_a_pixel_is_read_by_the_heads_of_its_phase_alone() -> None:
    """With as many heads as pixels of a cell."""
    layer, x = made(8, 4, window=4), normal(2, 1, 8, 4, 4)
    nn.init.eye_(layer.o_proj.weight)
    for y, i in ((1, 2), (0, 0), (2, 3)):
        moved = x.clone()
        moved[..., y, i] += 1
        changed = (layer(moved) != layer(x)).unflatten(1, (4, 2)).any(2)[0]
        changed[:, y, i] = False  # its own query is another
        assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [2 * (y % 2) + i % 2]


def test_is_attention_to_every_other_pixel() -> None:
    q, k, v = normal(0, 4, 4, 8), normal(1, 4, 4, 2), normal(2, 4, 4, 2)
    got = permuted_window_attention(
        q.unflatten(-1, (4, 2)).permute(2, 0, 1, 3)[None],
        *(cells(z[None], 2).unflatten(-1, (4, 2)).movedim(3, 1) for z in (k, v)),
        window=4,
    )
    close(got[0].permute(1, 2, 0, 3).flatten(2), naive.strided_head_attention(q, k, v, 4))


def test_windows_cost_a_quarter() -> None:
    dim, heads, w = 16, 4, 8
    x = normal(0, 1, dim, 16, 16)
    permuted, full = (
        filled(regard.create(name, dim=dim, num_heads=heads, window=w, shift=0)) for name in ("permuted_window", "swin")
    )

    def scores(layer: nn.Module) -> int:
        projections = sum(p.weight.numel() for p in layer.modules() if isinstance(p, nn.Linear))
        return flops(lambda: layer(x)) - 2 * 256 * projections

    assert 4 * scores(permuted) == scores(full) > 0
    assert sum(p.numel() for p in permuted.parameters()) == 5 * dim**2 // 2 + 5 * dim // 2 + (w - 1) ** 2 * heads
    assert sum(p.numel() for p in full.parameters()) == 4 * dim**2 + 4 * dim + (2 * w - 1) ** 2 * heads


def test_windows_meet_through_the_shift() -> None:
    plain, shifted = (made(4, 2, window=4, shift=s) for s in (0, 2))
    x = normal(2, 1, 4, 8, 8)
    moved = x.clone()
    moved[..., 0, 0] += 1

    def reached(*layers: nn.Module) -> Tensor:
        a, b = x, moved
        for layer in layers:
            a, b = layer(a), layer(b)
        return (a != b).any(1)[0]

    for layers, side in (((plain,), 4), ((shifted,), 2), ((plain, shifted), 6)):
        want = torch.zeros(8, 8, dtype=torch.bool)
        want[:side, :side] = True
        assert torch.equal(reached(*layers), want)


def test_maps_of_any_size() -> None:
    """What windows don't divide is padded; a short side is one window without shift, made of whole cells."""
    layer, x = made(4, 2, window=4, shift=2), normal(3, 2, 4, 6, 9)
    close(layer(x), layer(nn.functional.pad(x, (0, 3, 0, 2)))[..., :6, :9])
    small, state = made(4, 2, window=2), layer.state_dict()
    small.load_state_dict(state | {"table": state["table"][:, 1:-1, 1:-1]})
    close(layer(x[..., :2, :1]), small(nn.functional.pad(x[..., :2, :1], (0, 1)))[..., :1])


def test_scores_are_not_kept_whole() -> None:
    layer, x = regard.create("permuted_window", dim=32, num_heads=8, window=16).eval(), torch.randn(1, 32, 64, 64)
    with torch.no_grad():
        assert 4 * largest(lambda: layer(x)) <= 16 * 8 * 256 * 64


def test_starting_values() -> None:
    layer = PermutedSelfAttention(60, 6, window=16)
    assert layer.table.shape == (6, 15, 15)
    drawn = [layer.table, *(p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))]
    assert all(float(p.detach().std()) == pytest.approx(0.02, rel=0.2) for p in drawn)
    assert all((p.bias == 0).all() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    inner = ConvFeedForward(60, 120)
    assert float(inner.up.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    rates = [b.drop_path.rate for g in list(srformer(depths=(2, 2)).body)[1:-1] for b in g.blocks]
    assert rates == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])
    shifts = [b.attention.shift for b in srformer(depths=(4,)).body[1].blocks]
    assert shifts == [0, 8, 0, 8]


def test_weights_and_outputs_are_dropped_in_training() -> None:
    layer, x = made(8, 2, window=4, dropout=0.5), normal(1, 2, 8, 8, 8)
    plain = made(8, 2, window=4)
    close(layer(x), plain(x))
    torch.manual_seed(0)
    out = layer.train()(x)
    assert 0.4 < (out == 0).double().mean() < 0.6
    kept = out != 0
    assert (out[kept] - 2 * plain(x)[kept]).abs().max() > 0.1, "weights are dropped, too"
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - plain(x)).abs().mean() < 0.1 * plain(x).abs().mean()


def test_paths_are_dropped_by_sample() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 1, 1)
    out = drop(x)
    assert set(out[:, 0].unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert torch.equal(out[:, 0], out[:, 1])
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_bad_input() -> None:
    for options, said in (
        ({"window": 5}, r"window splits cells \(got 5\); expected a multiple of reduction = 2"),
        ({"window": 6, "shift": 3}, r"shift splits cells \(got 3\); expected a multiple of reduction = 2"),
        ({"window": 4, "shift": 4}, r"shift is too large \(got 4\)"),
        (
            {"reduction": 3, "window": 3},
            r"dim is no multiple of the pixels of a cell \(got 8\); expected",
        ),
        ({"dropout": 1.0}, "dropout is out of range"),
    ):
        with pytest.raises(ValueError, match=said):
            PermutedSelfAttention(8, 2, **options)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 3 \(got 8\)"):
        PermutedSelfAttention(8, 3)
    q, k = normal(0, 1, 2, 4, 4, 3), normal(0, 1, 2, 2, 2, 3)
    with pytest.raises(ValueError, match=r"k has another map than q \(got \(1, 2, 2, 1, 3\)\)"):
        permuted_window_attention(q, k[..., :1, :], k[..., :1, :], window=2)
    with pytest.raises(ValueError, match=r"window does not fit \(got \(3, 3\)\); expected sides that divide \(4, 4\)"):
        permuted_window_attention(q, k, k, window=3)
    with pytest.raises(ValueError, match="upsampler is unknown"):
        srformer(upsampler="many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"SuperResolution: image is too small \(got \(1, 3, 7, 40\)\)"):
        srformer(depths=(1,))(torch.zeros(1, 3, 7, 40))
    with pytest.raises(ValueError, match="ConvFeedForward: kernel_size is even"):
        ConvFeedForward(4, 8, kernel_size=4)
    assert PermutedSelfAttention(8, 2)(torch.zeros(0, 8, 5, 5)).shape == (0, 8, 5, 5)
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(1, 8, 0, 5\)\)"):
        PermutedSelfAttention(8, 2)(torch.zeros(1, 8, 0, 5))
    assert PixelShuffle(4, scale=6, hidden=5)(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 12, 12)

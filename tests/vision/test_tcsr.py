"""TCSR's block and feed-forward against loops, whose author saw only the paper's account."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision.shift import shift
from regard.vision.tcsr import ShiftFeedForward, TCSRBlock, shift_feed_forward, tcsr
from vision import naive_tcsr as naive
from vision.shared import filled, gradients, leaves, normal

OURS = ("left", "right", "up", "down")
"""The order of groups that move."""


def made(name: str, dim: int, heads: int = 1, seed: int = 0, **options) -> nn.Module:
    return filled(regard.create(name, dim=dim, num_heads=heads, causal=False, **options), seed)


def agree(got: Tensor, want: Tensor, wanted: list[Tensor]) -> None:
    close(got, want)
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


def ffn(layer: ShiftFeedForward) -> list[Tensor | None]:
    return [layer.up.weight.flatten(1), layer.down.weight.flatten(1), layer.up.bias, layer.down.bias]


def block_weights(block: TCSRBlock) -> tuple:
    a = block.attention
    projections = [getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj) for kind in ("weight", "bias")]
    norms = [(norm.weight, norm.bias) for norm in block.norms]
    return norms[0], projections, norms[1], ffn(block.feed_forward)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {"n_div": 5}),
        ({"n_div": 4, "step": 2}, {"n_div": 4, "step": 2}),
        ({"step": 9}, {"n_div": 5, "step": 9}),
        ({"ratio": 3, "bias": True}, {"n_div": 5, "shift_at": "before"}),  # the same as after it,
        ({"activations": 2, "bias": True}, {"n_div": 5, "second_activation": True}),
    ],
)
def test_the_feed_forward_equals_the_loops(options: dict, told: dict) -> None:
    layer, (x,) = made("shift_feed_forward", 4, **options), leaves(normal(1, 2, 4, 3, 4))
    want = naive.shift_feed_forward(x, *ffn(layer), directions=OURS, **told)
    agree(layer(x), want, [x, *layer.parameters()])


@pytest.mark.parametrize("relative", [True, False])
def test_the_block_equals_the_loops(relative: bool) -> None:
    block, (x,) = made("tcsr", 4, 2, window=3, relative=relative, n_div=8), leaves(normal(1, 1, 4, 4, 5))
    told = {"table": block.attention.table, "directions": OURS, "n_div": 8}
    agree(block(x), naive.tcsr_block(x, *block_weights(block), 2, 3, **told), [x, *block.parameters()])


def test_the_network_equals_the_loops() -> None:
    net = filled(tcsr(dim=4, num_heads=2, window=3, blocks=2, scale=2, channels=1))
    (image,) = leaves(normal(1, 1, 1, 3, 4))

    def looped(block: TCSRBlock):
        told = {"table": block.attention.table, "directions": OURS, "n_div": 5}
        return lambda z: naive.tcsr_block(z, *block_weights(block), 2, 3, **told)

    first, trunk, last = ((part.weight, part.bias) for part in (net.first, net.trunk, net.upsampler.steps[0]))
    want = naive.small_host(image, first, [looped(block) for block in net.body], trunk, last, 2)
    agree(net(image), want, [image, *net.parameters()])


def test_a_large_window_costs_few_weights() -> None:
    """Each layer sees w // 2 pixels and `step` further; at corners the window moves inward."""
    block, (x,) = made("tcsr", 4, 2, window=5, n_div=4), leaves(normal(1, 1, 4, 12, 12))

    def seen(y: int, i: int) -> Tensor:
        return torch.autograd.grad(block(x)[0, :, y, i].sum(), x)[0].ne(0).any(1)[0]

    middle = torch.zeros(12, 12, dtype=torch.bool)
    middle[3:10, 4:9] = True  # through neighbours above and below, and left and right
    middle[4:9, 3:10] = True
    assert torch.equal(seen(6, 6), middle)
    corner = torch.zeros(12, 12, dtype=torch.bool)
    corner[:5, :5] = True
    assert torch.equal(seen(0, 0), corner)
    counts = {}
    for window in (3, 7, 13):
        for relative in (False, True):
            layer = TCSRBlock(32, 4, window=window, relative=relative)
            counts[window, relative] = sum(p.numel() for p in layer.attention.parameters())
            assert counts[window, relative] == naive.parameter_counts(32, 4, window, 2, relative=relative)[0]
    assert {counts[w, False] for w in (3, 7, 13)} == {4224}
    assert counts[13, True] == 6724
    convolutions = [sum(p.numel() for p in nn.Conv2d(32, 32, w).parameters()) for w in (3, 7, 13)]
    assert convolutions == [9248, 50208, 173088]


def test_a_pixel_reaches_its_neighbours_without_parameters() -> None:
    for n_div, reached in ((4, 4), (5, 5), (8, 5)):
        layer, x = made("shift_feed_forward", 4, n_div=n_div), normal(1, 1, 4, 7, 7)
        moved = x.clone()
        moved[..., 3, 3] += 1
        changed = (layer(moved) != layer(x)).any(1)[0].nonzero() - 3
        assert len(changed) == reached
        assert set(changed.abs().sum(1).tolist()) == ({1} if n_div == 4 else {0, 1})
        assert sum(p.numel() for p in layer.parameters()) == 2 * 2 * 4 * 4


def test_a_second_activation_differs() -> None:
    first, second = (made("shift_feed_forward", 4, activations=n) for n in (1, 2))
    x = normal(1, 1, 4, 5, 5)
    up, down = ((part.weight, None) for part in (first.up, first.down))
    close(shift_feed_forward(x, up, down), first(x))
    assert (first(x) - second(x)).abs().max() > 0.01


def test_steps_of_a_shift() -> None:
    x = normal(0, 1, 8, 3, 5)
    for step in (1, 2, 4, 9):
        close(shift(x, n_div=5, step=step), naive.shift(x, n_div=5, step=step, directions=OURS))


def test_starting_values() -> None:
    block = TCSRBlock(32, 4)
    assert block.attention.table.shape == (4, 25, 25)
    assert [norm.eps for norm in block.norms] == [1e-6, 1e-6]
    assert block.feed_forward.up.bias is None


def test_bad_input_and_empty_maps() -> None:
    for options, said in (
        ({"n_div": 3}, r"n_div is too small \(got 3\)"),
        ({"n_div": 9}, r"n_div is too large \(got 9\); expected an int from 4 to 8"),
        ({"step": 0}, r"step is too small \(got 0\)"),
        ({"activations": 3}, "activations is unknown"),
    ):
        with pytest.raises(ValueError, match=said):
            ShiftFeedForward(4, **options)
    with pytest.raises(ValueError, match="eps is out of range"):
        TCSRBlock(4, 2, eps=0.0)
    with pytest.raises(ValueError, match="NeighborhoodAttention"):
        TCSRBlock(4, 2, window=4)
    with pytest.raises(ValueError, match="neighborhood"):
        TCSRBlock(4, 2)(torch.zeros(1, 4, 5, 5))
    assert TCSRBlock(4, 2, small_maps="pad")(torch.zeros(1, 4, 5, 5)).shape == (1, 4, 5, 5)
    assert TCSRBlock(4, 2, window=3)(torch.zeros(0, 4, 5, 5)).shape == (0, 4, 5, 5)
    assert ShiftFeedForward(4)(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    for layer in (ShiftFeedForward(4), TCSRBlock(4, 2, small_maps="pad")):
        with pytest.raises(ValueError, match=r"x has no pixels \(got \(1, 4, 0, 3\)\)"):
            layer(torch.zeros(1, 4, 0, 3))

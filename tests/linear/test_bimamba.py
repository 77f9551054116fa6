"""Bidirectional Mamba against loops, whose author has read neither code nor test, and the authors' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_mamba import bimamba
from regard import masks
from regard.laws.agreement import close
from regard.linear import BiMamba, Mamba, segment_first

VECTORS = Path(__file__).parents[1] / "vectors" / "A172.npz"
OWN = {
    "taps": "conv1d{}.weight",
    "taps_bias": "conv1d{}.bias",
    "select_weight": "x_proj{}.weight",
    "dt_weight": "dt_proj{}.weight",
    "dt_bias": "dt_proj{}.bias",
    "log_rate": "A_log{}",
    "skip": "D{}",
}
SHARED = {"in_proj.weight": "in_proj.weight", "o_proj.weight": "out_proj.weight"}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int = 1, **options) -> BiMamba:
    options = {"state_dim": 3, "dt_rank": 2, **options}
    layer = regard.create("bimamba", dim=5, num_heads=1, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: BiMamba, x: Tensor, merge: str, keep: Tensor | None = None) -> Tensor:
    both, held = [], dict(layer.named_parameters())
    for way in ("ahead", "back"):
        given = {theirs.format(""): held.get(f"{way}.{own}") for own, theirs in OWN.items()}
        given |= {theirs.replace("weight", kind): held.get(own.replace("weight", kind))
                  for own, theirs in SHARED.items() for kind in ("weight", "bias")}  # fmt: skip
        given["conv1d.weight"] = given["conv1d.weight"][:, None]
        both.append(given)
    return bimamba(x, *both, layer.ahead.state_dim, merge, keep)


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({}, 0, 0),
        ({"merge": "sum", "expand": 1, "conv_size": 2, "chunk": 2}, 2, 0),
        ({"bias": True, "conv_bias": False, "dt_rank": 1, "state_dim": 1}, 0, 0),
        ({"merge": "mean"}, 1, 2),
    ],
)
def test_equals_the_loops(options: dict, left: int, right: int) -> None:
    layer, x, direction = filled(**options), normal(1, 2, 6, 5).requires_grad_(), normal(2, 2, 6, 5)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, :left], keep[1, 6 - right :] = False, False
    keep = keep if left + right else None
    got, want = layer(x, mask=keep), naive(layer, x, options.get("merge", "mean"), keep)
    shown = torch.ones(2, 6, dtype=torch.bool) if keep is None else keep
    close(got[shown].detach(), want[shown].detach())
    leaves = [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction)[shown].sum(), leaves) for out in (got, want)]
    for g, w in zip(*grads, strict=True):
        close(g, w)


def test_gives_the_authors_numbers() -> None:
    with np.load(VECTORS) as file:
        z = {k: torch.from_numpy(file[k]) for k in file}
    given = {own: z[theirs] for own, theirs in SHARED.items()}
    for way, end in (("ahead", ""), ("back", "_back")):
        given |= {f"{way}.{own}": z[theirs.format(end)] for own, theirs in OWN.items()}
        given[f"{way}.taps"] = given[f"{way}.taps"][:, 0]
    layer = BiMamba(5, state_dim=3, dt_rank=2).double()
    layer.load_state_dict(given)
    x = z["x"].requires_grad_()
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    gx, ga = torch.autograd.grad((out * z["w"]).sum(), [x, layer.back.log_rate])
    assert (gx - z["gx"]).abs().max() < 1e-10
    assert (ga - z["gA_log_back"]).abs().max() < 1e-10


@torch.no_grad()
def test_each_direction_is_mamba() -> None:
    """With one of them silent the other is the causal layer, of the tokens as they come or turned round."""
    x = normal(4, 2, 9, 5)
    for way, other in (("ahead", "back"), ("back", "ahead")):
        layer, one = filled(merge="sum"), Mamba(5, state_dim=3, dt_rank=2).double()
        own = {name.removeprefix(f"{way}."): p for name, p in layer.state_dict().items() if not name.startswith(other)}
        one.load_state_dict(own)
        getattr(layer, other).skip.zero_()
        getattr(layer, other).select_weight.zero_()
        close(layer(x), one(x) if way == "ahead" else one(x.flip(1)).flip(1))


@torch.no_grad()
def test_a_long_step_is_a_wall_to_both_sides() -> None:
    """The first channel of a token says how long its step is, as in the test of Mamba."""
    layer = filled(3, conv_size=1)
    layer.in_proj.weight[:10] = 0
    layer.in_proj.weight[:5] = torch.diag(torch.tensor([100.0, 1, 1, 1, 1]))
    for way in (layer.ahead, layer.back):
        way.taps.fill_(1.0)
        way.taps_bias.zero_()
        way.select_weight[:2] = 0
        way.select_weight[0, 0] = 1.0
        way.dt_weight[:, 0] = 1.0
        way.dt_bias.fill_(-60.0)
        way.log_rate.zero_()
    x = normal(4, 2, 9, 5)
    x[..., 0] = 0.6
    for length, walled in ((0.6, False), (1.6, True)):
        x[:, 4, 0] = length
        for changed, beyond in ((slice(0, 4), slice(5, 9)), (slice(5, 9), slice(0, 4))):
            other = x.clone()
            other[:, changed, 1:] = normal(5, 2, 4, 4)
            off = (layer(other) - layer(x)).abs()
            assert off[:, changed].max() > 1e-2
            assert off[:, beyond].max() < 1e-12 if walled else off[:, beyond].max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"merge": "sum", "bias": True}])
def test_hidden_tokens_are_not_there(options: dict) -> None:
    """Wherever they stand, whatever they hold: neither scan nor convolution of either direction reads them."""
    layer, x = filled(**options), normal(6, 1, 9, 5)
    for hidden in ([0, 1], [7, 8], [0, 4, 5, 8]):
        keep = torch.ones(1, 9, dtype=torch.bool)
        keep[0, hidden] = False
        out = layer(torch.where(keep[..., None], x, torch.nan), mask=masks.padding(keep))
        close(out[keep], layer(x[keep][None])[0])


@torch.no_grad()
def test_documents_do_not_meet() -> None:
    """Each begins anew from its first and from its last token; tokens within may be hidden, and behind the last one."""
    layer, x = filled(bias=True), normal(6, 2, 12, 5)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, 3] = keep[1, 4] = False
    mask = masks.packed(torch.tensor([0, 4, 4, 5, 10]))
    for given in (mask, mask & masks.padding(keep)):
        shown = keep if given is not mask else torch.ones_like(keep)
        out = layer(x, mask=given)
        for first, end in ((0, 4), (4, 5), (5, 10)):
            own = layer(x[:, first:end], mask=shown[:, first:end])
            close(out[:, first:end][shown[:, first:end]], own[shown[:, first:end]])


def page() -> tuple[Tensor, Tensor]:
    """Two columns of two lines, two words each, as a scan row by row would give them."""
    words, segments = [], []
    for y, lines in ((10, (7, 2)), (20, (5, 9))):
        for line, x in zip(lines, (0, 60), strict=True):
            for n in range(2):
                words.append([x + 20 * n, y + n, x + 20 * n + 15, y + 8 + n])
                segments.append(line)
    return torch.tensor(words), torch.tensor(segments)


def test_segments_come_first() -> None:
    boxes, segments = page()
    shuffled = torch.tensor([6, 0, 4, 2, 7, 5, 1, 3])  # words of a segment as they come, whatever stands between
    order = segment_first(boxes[shuffled], segments[shuffled])
    assert shuffled[order].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    lines = torch.tensor([[0, 0, 9, 9], [10, 0, 19, 9], [0, 0, 9, 9], [10, 0, 19, 9]])
    assert segment_first(lines, torch.tensor([1, 0, 1, 0])).tolist() == [0, 2, 1, 3]
    same = torch.zeros(4, 4)
    assert segment_first(same, torch.tensor([5, 3, 5, 3])).tolist() == [0, 2, 1, 3], "one centre: as they come"


def test_the_segments_box_counts_not_the_words() -> None:
    """A tall first word lies higher than another line's, its line as a whole lower."""
    boxes = torch.tensor([[0.0, 0, 5, 40], [6, 30, 9, 40], [20, 5, 25, 15], [26, 5, 29, 15]])
    assert segment_first(boxes, torch.tensor([1, 1, 2, 2])).tolist() == [2, 3, 0, 1]
    whole = torch.tensor([[0.0, 0, 9, 40]] * 2 + [[20, 5, 29, 15]] * 2)
    assert segment_first(whole, torch.tensor([1, 1, 2, 2])).tolist() == [2, 3, 0, 1]


def test_order_of_a_batch() -> None:
    """Rows are apart; hidden words come last and don't stretch a segment's box; and there is a way back."""
    boxes, segments = page()
    both, keep = torch.stack([boxes, boxes.flip(0)]), torch.ones(2, 8, dtype=torch.bool)
    ids = torch.stack([segments, segments.flip(0)])
    assert torch.equal(segment_first(both, ids)[0], segment_first(boxes, segments))
    assert torch.equal(segment_first(both, ids)[1], segment_first(boxes.flip(0), segments.flip(0)))
    keep[0, 1] = False
    both[0, 1] = torch.tensor([0, 900, 9, 999])
    order = segment_first(both, ids, keep=keep)
    assert order[0].tolist() == [0, 2, 3, 4, 5, 6, 7, 1]
    x = normal(1, 2, 8, 5)
    sorted_ = x.gather(1, order[..., None].expand_as(x))
    assert torch.equal(sorted_.gather(1, order.argsort(-1)[..., None].expand_as(x)), x)
    assert segment_first(boxes[:0], segments[:0]).shape == (0,)


def test_starting_values() -> None:
    layer = regard.create("bimamba", dim=40, num_heads=4)
    for way in (layer.ahead, layer.back):
        torch.testing.assert_close(way.log_rate.detach().exp(), torch.arange(1.0, 17.0).expand(80, 16))
        steps = torch.nn.functional.softplus(way.dt_bias.detach())
        assert 0.00099 < steps.min() < steps.max() < 0.101
        assert way.dt_rank == 3
        assert way.taps.shape == (80, 4)
        assert way.skip.eq(1).all()
    assert layer.share == 0.5
    assert layer.in_proj.bias is None
    causal = sum(p.numel() for p in Mamba(40).parameters())
    assert sum(p.numel() for p in layer.parameters()) == 2 * causal - 40 * 80 * 3, "projections are shared"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="merge is unknown"):
        BiMamba(5, merge="max")
    with pytest.raises(ValueError, match=r"dt_rank is too small \(got 0\)"):
        filled(dt_rank=0)
    with pytest.raises(
        ValueError, match=r"bimamba: x has the wrong shape \(got \(2, 3, 4\)\); expected \(B, T, M = 5\)"
    ):
        filled()(normal(1, 2, 3, 4))
    with pytest.raises(ValueError, match="segment_first: segments has the wrong shape"):
        segment_first(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="causal"):
        regard.create("bimamba", dim=8, num_heads=2, causal=True)

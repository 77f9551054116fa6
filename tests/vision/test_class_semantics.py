"""Class semantics-based attention against loops, and what it has from its second input.

The loops' author saw only an account of the equations, neither code nor tests.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision import ChannelSemantics, ClassSemanticsGate
from regard.vision.class_semantics import SemanticsDetector
from vision import naive_class_semantics as naive
from vision.shared import filled, gradients, leaves, normal

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0]], dtype=torch.bool)


def weights(gate: nn.Module) -> tuple[Tensor, ...]:
    return gate.squeeze.weight, gate.squeeze.bias, gate.excite.weight, gate.excite.bias


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"axis": "channel"}, {"axis": "time", "kernel_size": 5}, {"fuse": "mean", "kernel_size": 1},
     {"fuse": "concat", "reduction": 2}, {"length": 6, "reduction": 3}, {"length": 6, "axis": "time"}],
)  # fmt: skip
def test_equals_the_loops(options: dict, masked: bool) -> None:
    layer = filled(ClassSemanticsGate(4, semantics_dim=5, **options))
    x, r = leaves(normal(1, 2, 4, 6), normal(2, 2, 5, 6))
    mask = MASK if masked else None
    channel, time = (None if gate is None else weights(gate) for gate in (layer.channel, layer.time))
    given = {name: options[name] for name in ("axis", "fuse", "length") if name in options}
    if layer.mix is not None:
        given |= {"w_fuse": layer.mix.weight[..., 0], "b_fuse": layer.mix.bias}
    got, want = layer(x, r, mask), naive.class_semantics_gate(x, r, channel, time, mask=mask, **given)
    close(got, want)
    inputs = [x, r, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


def test_with_squeeze_and_excitation_beside_it() -> None:
    layer, se = filled(ClassSemanticsGate(4, semantics_dim=5)), filled(ChannelSemantics(4, 4, reduction=2), 1)
    x, r = normal(1, 2, 4, 6), normal(2, 2, 5, 6)
    want = naive.with_se(x, r, weights(se), weights(layer.channel), weights(layer.time))
    close(layer(x * se(x)[..., None], r), want)


def test_starts_as_it_was() -> None:
    """Both gates at 1/2, summed; and gradients reach what is behind them."""
    torch.manual_seed(0)
    layer = regard.create("class_semantics", dim=8, num_heads=2, semantics_dim=6, reduction=1).double()
    x, r = normal(1, 2, 8, 7), normal(2, 2, 6, 7)
    assert torch.equal(layer(x, r), x)
    layer(x, r).square().sum().backward()
    assert layer.channel.excite.weight.grad.abs().max() > 0
    assert layer.time.excite.weight.grad.abs().max() > 0


@torch.no_grad()
def test_hidden_steps_change_nothing_and_give_0() -> None:
    for options in ({}, {"length": 6}, {"fuse": "concat"}):
        layer = filled(ClassSemanticsGate(4, semantics_dim=5, **options))
        x, r = normal(1, 2, 4, 6), normal(2, 2, 5, 6)
        hidden = ~MASK[:, None]
        out = layer(x.masked_fill(hidden, torch.nan), r.masked_fill(hidden, torch.inf), MASK)
        assert torch.equal(out, layer(x, r, MASK))
        assert not out.masked_select(hidden).any()
    layer = filled(ClassSemanticsGate(4, semantics_dim=5))
    short = layer(x[:1, :, :4], r[:1, :, :4])
    padded = layer(x[:1], r[:1], torch.arange(6)[None] < 4)
    close(padded[:, :, :4], short)
    assert not layer(x, r, torch.zeros(2, 6, dtype=torch.bool)).any()
    assert layer(x[:, :, :0], r[:, :, :0]).shape == (2, 4, 0)


@torch.no_grad()
def test_channels_know_no_order_and_steps_do() -> None:
    x, r, order = normal(1, 2, 4, 6), normal(2, 2, 5, 6), torch.tensor([3, 1, 0, 5, 2, 4])
    channel, time = (filled(ClassSemanticsGate(4, semantics_dim=5, axis=axis)) for axis in ("channel", "time"))
    close(channel(x[..., order], r[..., order]), channel(x, r)[..., order])
    assert (time(x[..., order], r[..., order]) - time(x, r)[..., order]).abs().max() > 1e-3


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 16, 24) with the true interval in 4 channels, those of its class, and others in the 12 beside; r with
    the interval in the class's own channel; where it is."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(24)

    def intervals(*shape: int) -> Tensor:
        start = torch.randint(2, 14, shape, generator=generator)
        long = torch.randint(4, 9, shape, generator=generator)
        return ((at >= start[..., None]) & (at < (start + long)[..., None])).float()

    classes, truth = torch.randint(4, (count,), generator=generator), intervals(count)
    x, r = intervals(count, 16), torch.zeros(count, 16, 24)
    for n, c in enumerate(classes.tolist()):
        x[n, 4 * c : 4 * c + 4] = truth[n]
        r[n, c] = truth[n]
    noise = [0.2 * torch.randn(z.shape, generator=generator) for z in (x, r)]
    return x + noise[0], r + noise[1], truth


def overlap(semantic: bool) -> float:
    """Of found and true intervals, with gates from r or from x itself: the head sees one channel's sum over classes."""
    torch.manual_seed(1)
    gate = regard.create("class_semantics", dim=16, num_heads=1, axis="channel", reduction=1)
    head = nn.Sequential(nn.Conv1d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 1, 1))
    x, r, truth = sequences(256, 0)
    optimiser = torch.optim.Adam([*gate.parameters(), *head.parameters()], 0.02)
    for _ in range(120):
        loss = F.binary_cross_entropy_with_logits(head(gate(x, r if semantic else x))[:, 0], truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, r, truth = sequences(128, 1)
    with torch.no_grad():
        found = head(gate(x, r if semantic else x))[:, 0] > 0
    both = (found & (truth > 0)).sum(1) / (found | (truth > 0)).sum(1)
    return both.mean().item()


def test_the_recogniser_tells_which_channels_count() -> None:
    ours, others = overlap(True), overlap(False)
    assert ours > 0.75
    assert others < ours - 0.2


def test_a_detector_around_it() -> None:
    torch.manual_seed(0)
    detector = SemanticsDetector(5, 8, ClassSemanticsGate(8, semantics_dim=5, reduction=1))
    plain = SemanticsDetector(5, 8, None)
    plain.load_state_dict({n: p for n, p in detector.state_dict().items() if not n.startswith("gate")})
    r = torch.randn(2, 5, 12)
    assert detector(r).shape == (2, 3, 12)
    torch.testing.assert_close(detector(r), plain(r))  # as it starts
    detector(r).square().sum().backward()
    assert detector.gate.channel.excite.weight.grad.abs().max() > 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is even \(got 4\); expected an odd number of steps"):
        ClassSemanticsGate(4, kernel_size=4)
    with pytest.raises(ValueError, match="axis is unknown"):
        ClassSemanticsGate(4, axis="space")  # type: ignore[arg-type]
    layer = ClassSemanticsGate(4, length=6)
    with pytest.raises(ValueError, match=r"r is of another length \(got 5\); expected length = 6"):
        layer(torch.zeros(1, 4, 5), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="semantics has the wrong shape"):
        layer(torch.zeros(1, 4, 6), torch.zeros(1, 4, 5))

"""PATNet's gates against loops, whose author saw the account of the paper alone, neither code nor test, and the
authors' numbers (A002)."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision.partial import PartialChannelAttention, PartialSpatialAttention, channel_statistics
from vision import naive_partial_attention as naive
from vision.shared import filled, gradients, leaves, normal, vectors


@pytest.fixture(autouse=True)
def torchs_hard_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward holds 1/6 as a float32 number, as the authors' code has it: 3e-8 off the exact slope."""
    monkeypatch.setattr(naive, "hard_sigmoid", nn.functional.hardsigmoid)


def norm(layer: nn.Module) -> tuple[Tensor, ...]:
    return layer.weight, layer.bias, layer.running_mean, layer.running_var


def channel(layer: PartialChannelAttention) -> tuple:
    pair = torch.stack([layer.mean_mix.weight, layer.deviation_mix.weight], -1)[:, :, None]
    return layer.conv.weight, pair, norm(layer.gate_norm), norm(layer.norm)


def spatial(layer: PartialSpatialAttention) -> tuple:
    return layer.attend.weight, layer.conv.weight, norm(layer.attend_norm), norm(layer.conv_norm)


KINDS = {
    PartialChannelAttention: (naive.partial_channel_attention, channel),
    PartialSpatialAttention: (naive.partial_spatial_attention, spatial),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PartialChannelAttention, {}),
        (PartialChannelAttention, {"divide": 3}),
        (PartialSpatialAttention, {}),
        (PartialSpatialAttention, {"partial": 0.3}),
    ],
)
def test_is_the_definition(kind: type, options: dict, training: bool) -> None:
    layer = filled(kind(7, **options)).train(training)
    naively, weights = KINDS[kind]
    (x,) = leaves(normal(1, 3, 7, 3, 4))
    want = naively(x, *weights(layer), training=training)
    got = layer(x)
    close(got, want)
    of = [x, *layer.parameters()]
    for a, b in zip(gradients(got, of), gradients(want, of), strict=True):
        close(a, b)


NAMES = {
    "ch": {
        "conv.weight": "partial_conv3.weight",
        "gate_norm": "attn.bn",
        "norm": "norm",
    },
    "sp": {
        "conv.weight": "conv.weight",
        "attend.weight": "conv_attn.weight",
        "attend_norm": "norm",
        "conv_norm": "norm2",
    },
}


def load(layer: nn.Module, z: dict[str, Tensor], names: dict[str, str], where: str = "p_") -> None:
    """Their numbers, whose names start with `where`."""
    ours = layer.state_dict()
    for name, theirs in names.items():
        for key in ours:
            if key == name or key.startswith(name + "."):
                held = z.get(where + theirs + key.removeprefix(name))
                if held is not None:
                    ours[key] = held.view_as(ours[key])
    if isinstance(layer, PartialChannelAttention):
        pair = z[where + "attn.cfc1.weight"][:, :, 0]
        ours["mean_mix.weight"], ours["deviation_mix.weight"] = pair.unbind(-1)
    layer.load_state_dict(ours)


@pytest.mark.parametrize(("case", "kind"), [("ch", PartialChannelAttention), ("sp", PartialSpatialAttention)])
def test_authors_numbers(case: str, kind: type) -> None:
    z = vectors("A002", case)
    layer = kind(z["x"].shape[1]).double().eval()
    load(layer, z, NAMES[case])
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    close(layer.conv.weight.grad, z["g_partial_conv3.weight" if case == "ch" else "g_conv.weight"])
    if case == "ch":
        pair = z["g_attn.cfc1.weight"][:, :, 0]
        close(layer.mean_mix.weight.grad, pair[..., 0])
        close(layer.deviation_mix.weight.grad, pair[..., 1])
    else:
        close(layer.attend.weight.grad, z["g_conv_attn.weight"])


def test_statistics_of_a_channel() -> None:
    x = normal(2, 2, 3, 4, 5)
    mean, deviation = channel_statistics(x)
    close(mean, x.mean((2, 3)))
    close(deviation, ((x - x.mean((2, 3), keepdim=True)).square().sum((2, 3)) / 19).sqrt())
    (flat,) = leaves(torch.ones(1, 2, 2, 2, dtype=torch.float64))
    channel_statistics(flat)[1].sum().backward()
    assert flat.grad.isfinite().all(), "a channel of one value has a slope, 0"


def test_parameters_and_who_reads_whom() -> None:
    """A fifth of a 3 x 3 convolution's parameters; the groups never meet, and pixels of the second have no place."""
    for dim, count in ((64, 7104), (128, 28032), (256, 111360)):
        layer = PartialChannelAttention(dim)
        assert sum(p.numel() for p in layer.parameters()) == count < 9 * dim * dim / 5
    layer = filled(regard.create("partial_channel", dim=8, num_heads=1))
    (x,) = leaves(normal(3, 1, 8, 3, 4))
    for group, other in ((slice(0, 2), slice(2, 8)), (slice(2, 8), slice(0, 2))):
        seen = torch.autograd.grad(layer(x)[:, group].square().sum(), x)[0]
        assert seen[:, group].abs().min() > 0
        assert not seen[:, other].any()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., order].view_as(x)
    want = layer(x).flatten(2)[..., order].view_as(x)
    close(layer(moved)[:, 2:], want[:, 2:])
    assert (layer(moved)[:, :2] - want[:, :2]).abs().max() > 1e-3


def test_a_pixel_is_kept_or_dropped_as_a_whole() -> None:
    """By what its own first channels say; the last ones are mixed whatever these say."""
    layer = regard.create("partial_spatial", dim=6, num_heads=1, dtype=torch.float64).eval()
    nn.init.ones_(layer.attend.weight)
    x = torch.ones(1, 6, 1, 3, dtype=torch.float64)
    x[:, :3, 0, 1], x[:, :3, 0, 2] = -1.5, 2.0
    gate = layer.gate(x[:, :3])[0, 0, 0]
    assert gate[1] == 0
    assert gate[2] == 1
    assert gate[0] == 1
    out = layer(x) * (1 + layer.conv_norm.eps) ** 0.5
    close(out[:, :3, 0, 1], torch.zeros(1, 3).double())
    close(out[:, :3, 0, 2], x[:, :3, 0, 2])
    close(out[:, 3:, 0, 1], out[:, 3:, 0, 2])
    assert out[:, 3:].abs().min() > 0


def test_starting_values() -> None:
    torch.manual_seed(0)
    for layer in (PartialChannelAttention(128), PartialSpatialAttention(128)):
        for name, p in layer.named_parameters():
            if "norm" not in name and p.numel() > 1000:
                assert abs(float(p.detach().std()) - 0.02) < 0.001


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has no deviation \(got \(2, 8, 1, 1\)\); expected .* two pixels or more"):
        PartialChannelAttention(8)(torch.zeros(2, 8, 1, 1))
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 8, 0, 3\)\)"):
        PartialSpatialAttention(8)(torch.zeros(2, 8, 0, 3))
    with pytest.raises(ValueError, match=r"divide is too large \(got 4\); expected an int from 2 to 3"):
        PartialChannelAttention(3)
    with pytest.raises(ValueError, match=r"divide is too small \(got 1\)"):
        PartialChannelAttention(3, divide=1)
    for partial in (0.1, 1.0):
        with pytest.raises(ValueError, match=r"partial is out of range"):
            PartialSpatialAttention(4, partial=partial)
    for kind in (PartialChannelAttention, PartialSpatialAttention):
        assert kind(8).eval()(torch.zeros(0, 8, 2, 2)).shape == (0, 8, 2, 2)

"""MEDUSA against loops, whose author saw an account of the paper alone, neither code nor test."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision.medusa import GlobalAttentionBody, Medusa, MultiScaleGate, ScaleHead
from vision import naive_medusa as naive
from vision.shared import filled, gradients, leaves, normal


def level(part: nn.Module) -> tuple:
    n = part.norm
    return part.conv.weight, part.conv.bias, (n.weight, n.bias, n.running_mean, n.running_var)


def body_of(body: GlobalAttentionBody) -> tuple:
    return [level(p) for p in body.encoder], [level(p) for p in body.decoder], body.out.weight, body.out.bias


def heads_of(gate: MultiScaleGate) -> list:
    return [[(head.conv.weight, head.conv.bias)] for head in gate.heads]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("widths", [(3,), (3, 4), (2, 3, 4)])
def test_the_body_is_its_definition(widths: tuple[int, ...], training: bool) -> None:
    body = filled(GlobalAttentionBody(2, widths=widths, out_channels=3)).train(training)
    image = normal(1, 2, 2, 9, 6)
    close(body(image), naive.global_attention_body(image, *body_of(body), training=training))


OPTIONS = [{}, {"channels": True, "residual": True}, {"resize": "area", "kernel": 1}]


@pytest.mark.parametrize("options", OPTIONS)
def test_is_the_definition(options: dict) -> None:
    body = GlobalAttentionBody(2, widths=(3, 4), out_channels=2)
    gate = filled(MultiScaleGate(body, (4, 3), global_channels=2, **options))
    given = leaves(normal(1, 2, 2, 7, 6), normal(2, 2, 4, 7, 6), normal(3, 2, 3, 3, 2))
    got = gate(given[0], given[1:])
    how = {key: options[key] for key in ("resize", "residual") if key in options}
    want = naive.multi_scale_gate(given[0], given[1:], body_of(body), heads_of(gate), **how)
    of = [*given, *gate.parameters()]
    for a, b in zip(got, want, strict=True):
        close(a, b)
    sums = [torch.cat([z.flatten() for z in out]) for out in (got, want)]
    for a, b in zip(*(gradients(out, of) for out in sums), strict=True):
        close(a, b)


def test_the_layer_is_one_scale() -> None:
    layer = filled(Medusa(4, width=3, levels=2, global_channels=2, channels=True))
    x = normal(4, 2, 4, 5, 6)
    want = naive.multi_scale_gate(x, [x], body_of(layer.gate.body), heads_of(layer.gate))[0]
    close(layer(x), want)


class Counted(nn.Module):
    """A body that counts its calls."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return self.body(image)


def test_one_body_feeds_all_scales() -> None:
    """It runs once an image, its parameters learn from every scale, and so much of it is there once: heads that differ
    in weights alone are all that a scale adds."""
    layer = filled(regard.create("medusa", dim=3, num_heads=1, width=3, levels=2, global_channels=2))
    body = Counted(layer.gate.body)
    gate = filled(MultiScaleGate(body, (3, 4, 5), global_channels=2))
    image, sizes = normal(5, 2, 3, 8, 8), ((8, 8), (4, 4), (2, 2))
    gates = gate.prepare(image, sizes)
    assert body.calls == 1
    assert [tuple(z.shape) for z in gates] == [(2, 1, 8, 8), (2, 1, 4, 4), (2, 1, 2, 2)]
    for n, z in enumerate(gates):
        of = [*body.parameters(), *(head.conv.weight for head in gate.heads)]
        *learns, a, b, c = torch.autograd.grad(z.square().sum(), of, allow_unused=True, retain_graph=True)
        assert all(g is not None and g.any() for g in learns)
        assert [g is not None for g in (a, b, c)] == [m == n for m in range(3)]
    alone = MultiScaleGate(GlobalAttentionBody(3, widths=(3, 6), out_channels=2), (3,), global_channels=2)
    three, one = (sum(p.numel() for p in m.parameters()) for m in (gate, alone))
    assert three - one == 2 * sum(p.numel() for p in gate.heads[0].parameters())
    x = normal(6, 1, 3, 8, 8)
    out = layer(x)
    close(out / x, layer.gate.prepare(x, [(8, 8)])[0].expand_as(x))
    moved = x.clone()
    moved[..., 3, 3] += 1
    changed = (layer(moved) / moved - out / x).abs().amax(1)[0] > 1e-9
    assert changed.sum() > 20, "a pixel moves the gates of all that the body sees it from"


def test_gates_depend_on_the_image_alone() -> None:
    """Whatever the maps hold: twice the map is twice the output, and hidden places of it can be told."""
    gate = filled(MultiScaleGate(GlobalAttentionBody(3, widths=(3, 4)), (3, 5)))
    layer = filled(regard.create("medusa", dim=3, num_heads=1, width=3, levels=2))
    image, maps = normal(7, 2, 3, 8, 8), [normal(8, 2, 3, 8, 8), normal(9, 2, 5, 4, 4)]
    for a, b in zip(gate(image, [2 * m for m in maps]), gate(image, maps), strict=True):
        close(a, 2 * b)
    assert (gate(2 * image, maps)[1] - gate(image, maps)[1]).abs().max() > 1e-4
    ratio = layer(image) / image
    close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.min() > 0
    assert ratio.max() < 1


def test_with_heads_of_zero_half_passes() -> None:
    for residual, share in ((False, 0.5), (True, 1.5)):
        gate = MultiScaleGate(GlobalAttentionBody(2, widths=(3, 4)), (3,), residual=residual).double()
        for p in gate.heads.parameters():
            nn.init.zeros_(p)
        x = normal(10, 2, 3, 4, 4)
        close(gate(normal(11, 2, 2, 8, 8), [x])[0], share * x)


def test_area_reads_what_bilinear_passes_over() -> None:
    seen = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    seen[..., 0, 0] = 8.0
    found = {}
    for resize in ("bilinear", "area"):
        head = ScaleHead(1, kernel=1, resize=resize).double()
        nn.init.ones_(head.conv.weight)
        nn.init.zeros_(head.conv.bias)
        found[resize] = head(seen, (2, 2))[0, 0, 0, 0]
    close(found["bilinear"], torch.tensor(0.5).double())
    close(found["area"], torch.tensor(0.125).double().sigmoid())


def test_what_is_refused() -> None:
    body = GlobalAttentionBody(2)
    with pytest.raises(
        ValueError, match=r"x is too small a map \(got \(1, 2, 3, 8\)\); expected .* both sides 4 or more"
    ):
        body(torch.zeros(1, 2, 3, 8))
    gate = MultiScaleGate(body, (3, 4))
    with pytest.raises(ValueError, match=r"maps are of another number of scales \(got 1\); expected 2"):
        gate(torch.zeros(1, 2, 8, 8), [torch.zeros(1, 3, 8, 8)])
    with pytest.raises(ValueError, match=r"maps\[1\] has the wrong shape \(got \(1, 5, 4, 4\)\)"):
        gate(torch.zeros(1, 2, 8, 8), [torch.zeros(1, 3, 8, 8), torch.zeros(1, 5, 4, 4)])
    with pytest.raises(ValueError, match=r"sizes are of another number of scales \(got 1\)"):
        gate.prepare(torch.zeros(1, 2, 8, 8), [(2, 2)])
    with pytest.raises(ValueError, match=r"kernel is even \(got 2\)"):
        Medusa(4, kernel=2)
    with pytest.raises(ValueError, match=r"levels is too small \(got 0\)"):
        Medusa(4, levels=0)
    with pytest.raises(ValueError, match=r"resize is unknown \(got 'nearest'\)"):
        Medusa(4, resize="nearest")
    layer = Medusa(4).eval()
    assert layer(torch.zeros(0, 4, 8, 8)).shape == (0, 4, 8, 8)

"""Advance spatial attention and its neurons against loops and the authors' numbers.

The loops' author saw only an account of the equations, neither code nor tests.
"""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision import AdvanceSpatialAttention, LeakyIntegrateFire
from regard.vision.spiking_host import SpikingNet
from regard.vision.spiking_spatial import _largest
from vision import naive_spiking_spatial as naive
from vision.shared import gradients, leaves, normal, vectors

AS_CODE = {"per_sample": False, "selection": "exactly_one"}


def drawn(steps: int, seed: int = 0, **options) -> AdvanceSpatialAttention:
    layer = regard.create("spiking_spatial", dim=6, num_heads=2, steps=steps, **options).double()
    with torch.no_grad():
        for n, p in enumerate([*layer.mixes(), layer.important_kernel, layer.rest_kernel]):
            p.copy_(normal(100 * seed + n, *p.shape))
        layer.alpha.fill_(0.7)
        layer.beta.fill_(0.2)
    return layer


def loops(layer: AdvanceSpatialAttention, x: Tensor, **options) -> Tensor:
    mixes = layer.mixes()
    args = (layer.alpha, layer.beta, mixes[0] if len(mixes) == 1 else mixes)
    return naive.asa(x, *args, layer.important_kernel, layer.rest_kernel, **options)


@pytest.mark.parametrize(("case", "ratio"), [("two", 0.5), ("batch", 0.5), ("lam3", 0.3)])
def test_gives_the_authors_numbers(case: str, ratio: float) -> None:
    z = vectors("A167", case)
    layer = AdvanceSpatialAttention(steps=z["x"].shape[1], ratio=ratio, **AS_CODE).double()
    names = {"alpha": "alpha", "beta": "beta", "mix0": "fc.weight", "important_kernel": "conv1.weight"}
    names["rest_kernel"] = "conv2.weight"
    layer.load_state_dict({ours: z["p_" + theirs] for ours, theirs in names.items()})
    (x,) = leaves(z["x"])
    assert torch.equal(layer.important(x), z["important"].bool())
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    of = {"gx": x, "g_conv1.weight": layer.important_kernel, "g_conv2.weight": layer.rest_kernel}
    found = torch.autograd.grad((out * z["w"]).sum(), list(of.values()))
    for name, ours in zip(of, found, strict=True):
        if name in z:  # one case holds a single kernel's
            assert (ours - z[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("how", [{}, AS_CODE, {"per_sample": False}, {"selection": "exactly_one"}])
@pytest.mark.parametrize("options", [{}, {"ratio": 0.3, "reduction": 2}, {"ratio": 0.8}])
def test_equals_the_loops(how: dict, options: dict) -> None:
    layer, (x,) = drawn(4, **options, **how), leaves(normal(1, 3, 4, 5, 3, 2))
    given = {"ratio": options.get("ratio", 0.5), **how}
    got, want = layer(x), loops(layer, x, **given)
    close(got, want)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


def test_of_equals_the_earlier_go_first() -> None:
    s = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert _largest(s, 2, 1).tolist() == [[False, True, True, False, False]]
    assert not _largest(s, 0, 1).any()


@torch.no_grad()
def test_a_pixel_has_two_gates_and_neurons_fire_less() -> None:
    layer, x = drawn(6), normal(1, 2, 6, 8, 4, 4)
    gates = layer(x) / x
    assert ((gates > 0) & (gates < 1)).all()
    for b in range(2):
        p = layer.important(x)[b]
        for chosen in (p, ~p):
            assert chosen.any()
            of = gates[b][chosen]
            close(of, of[:1].expand_as(of))
    assert (gates[0].amax((0, 1)) - gates[0].amin((0, 1))).min() > 1e-3, "and they differ"
    neurons = LeakyIntegrateFire()
    assert neurons(layer(x)).mean() < 0.9 * neurons(x).mean()
    for kernel in (layer.important_kernel, layer.rest_kernel):
        kernel.zero_()
    close(layer(x), x / 2)


@torch.no_grad()
def test_a_sample_depends_on_its_batch_in_the_codes_form_alone() -> None:
    x = normal(1, 4, 6, 8, 3, 3)
    for how, alone in (({}, True), ({"per_sample": False}, False)):
        layer = drawn(6, **how)
        assert torch.equal(layer(x)[:1], layer(x[:1])) is alone
    assert layer.important(x).sum() > drawn(6).important(x).sum()


def test_the_choice_has_no_gradient() -> None:
    layer = drawn(4)
    assert {name for name, _ in layer.named_parameters()} == {"important_kernel", "rest_kernel"}
    assert set(layer.state_dict()) == {"alpha", "beta", "mix0", "important_kernel", "rest_kernel"}
    assert sum(p.numel() for p in layer.parameters()) == 36


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5, "decay": 0.6, "reset": 0.2, "bias": -0.1, "width": 0.4}])
def test_neurons_equal_the_loops(options: dict) -> None:
    neurons, (y,) = LeakyIntegrateFire(**options), leaves(0.6 * normal(1, 3, 7, 4, 2))
    got, want = neurons(y), naive.lif(y, **options)
    assert torch.equal(got, want)
    assert set(got.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(*(gradients(out, [y])[0] for out in (got, want)))
    state, steps = None, []
    for t in range(7):
        spikes, state = neurons.step(y[:, t], state)
        steps.append(spikes)
    assert torch.equal(torch.stack(steps, 1), got)
    assert neurons(y[:, :0]).shape == (3, 0, 4, 2)


def test_a_neuron_learns_near_its_threshold_alone() -> None:
    y = torch.tensor([[0.3, 0.06, 0.54, 0.04, 0.56]], dtype=torch.float64).mT[:, :, None].requires_grad_()
    spikes = LeakyIntegrateFire()(y)
    assert spikes.flatten().tolist() == [1, 0, 1, 0, 1]
    (grad,) = torch.autograd.grad(spikes.sum(), y)
    assert grad.flatten().tolist() == [2, 2, 2, 0, 0]


@pytest.mark.parametrize("gated", [True, False])
def test_the_host_equals_the_loops(gated: bool) -> None:
    torch.manual_seed(0)
    net = SpikingNet(2, 3, size=4, steps=4, widths=(3, 4), pools=(1, 2), hidden=5, gated=gated).double().train()
    x = normal(1, 2, 4, 2, 4, 4)
    convs = []
    for layer in net.layers:
        gate = (lambda z, g=layer.gate: loops(g, z)) if gated else None
        norm = (layer.norm.weight, layer.norm.bias)
        convs.append((layer.conv.weight, layer.conv.bias, norm, gate, layer.pool))
    linears = [(f.weight, f.bias) for f in (net.hidden, net.out)]
    want, rates = naive.small_host(x, convs, linears)
    got = net(x)
    close(got.classes, want)
    close(torch.stack(got.rates), torch.stack(rates))
    assert 0 < got.rates[0] < 1


def test_the_host_fires_less_with_gates_and_learns() -> None:
    torch.manual_seed(0)
    net = SpikingNet(1, 2, size=4, steps=4, widths=(6,), pools=(1,), hidden=8)
    plain = SpikingNet(1, 2, size=4, steps=4, widths=(6,), pools=(1,), hidden=8, gated=False)
    plain.load_state_dict({n: p for n, p in net.state_dict().items() if ".gate." not in n})
    labels = torch.arange(32) % 2
    x = torch.rand(32, 4, 1, 4, 4) * 0.3
    x[labels == 1, :, :, :2] += 1
    x[labels == 0, :, :, 2:] += 1
    assert net(x).rates[0] < plain(x).rates[0]
    optimiser, losses, moved = torch.optim.Adam(net.parameters(), 0.01), [], 0.0
    for _ in range(40):
        loss = (net(x).classes - torch.nn.functional.one_hot(labels, 2)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        moved = max(moved, net.layers[0].gate.important_kernel.grad.abs().max().item())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert moved > 0


def test_starting_values_and_what_is_refused() -> None:
    layer = regard.create("spiking_spatial", dim=6, num_heads=2, steps=8, reduction=4)
    assert (layer.alpha, layer.beta) == (0.5, 0.5)
    assert [tuple(m.shape) for m in layer.mixes()] == [(2, 8), (8, 2)]
    assert all(0 < m.abs().max() <= m.shape[1] ** -0.5 for m in layer.mixes())
    with pytest.raises(ValueError, match="x has the wrong shape"):
        layer(torch.zeros(1, 7, 6, 2, 2))
    with pytest.raises(ValueError, match="ratio is out of range"):
        AdvanceSpatialAttention(ratio=1.0)
    with pytest.raises(ValueError, match="steps is no multiple of reduction"):
        AdvanceSpatialAttention(steps=5, reduction=2)
    with pytest.raises(ValueError, match="pools has another number of layers"):
        SpikingNet(2, 3, size=4, widths=(3,), pools=(1, 2))
    for shape in ((0, 8, 6, 2, 2), (2, 8, 0, 2, 2)):
        assert layer(torch.zeros(shape)).shape == shape

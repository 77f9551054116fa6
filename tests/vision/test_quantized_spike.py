"""Quantised spike-driven attention against loops, the authors' numbers, and its spikes one by one."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision.quantized_spike import (
    IntegerSpike,
    LSQConv2d,
    QuantizedSpikeAttention,
    RepConv,
    attention_distillation,
    integer_spike,
    lsq,
    lsq_step,
    spike_attention,
    to_spikes,
)
from vision import naive_quantized_spike as naive
from vision.shared import filled, gradients, leaves, normal, vectors

PARTS = {
    "point": "0.body.0",
    "norm": "0.body.1.bn",
    "depth": "0.body.2.0",
    "mix": "0.body.2.1",
    "inner_norm": "0.body.2.2",
    "outer_norm": "1",
}
BRANCHES = {"q": "q", "k": "k", "v": "v", "o": "proj"}


def theirs(name: str) -> str:
    """The authors' name of one of our parameters or statistics."""
    proj, part, kind = name.split(".")
    return f"{BRANCHES[proj[0]]}_conv.{PARTS[part]}.{'alpha' if kind == 'step' else kind}"


def loaded(z: dict[str, Tensor]) -> QuantizedSpikeAttention:
    layer = QuantizedSpikeAttention(6, 2).double()
    state = layer.state_dict()
    for name, p in state.items():
        if not name.endswith("num_batches_tracked"):
            p.copy_(z["p_" + theirs(name)].reshape(p.shape))
    layer.load_state_dict(state)
    return layer


def branch(rep: RepConv) -> dict:
    def bn(norm: torch.nn.BatchNorm2d) -> tuple[Tensor, ...]:
        return norm.weight, norm.bias, norm.running_mean.clone(), norm.running_var.clone()

    return {
        "conv1": rep.point.weight[:, :, 0, 0], "step1": rep.point.step, "bn1": bn(rep.norm),
        "depth": rep.depth.weight[:, 0], "step_depth": rep.depth.step,
        "conv2": rep.mix.weight[:, :, 0, 0], "step2": rep.mix.step, "bn2": bn(rep.inner_norm),
        "bn3": bn(rep.outer_norm),
    }  # fmt: skip


def random(dim: int = 6, heads: int = 2, seed: int = 0, **options) -> QuantizedSpikeAttention:
    """Weights and norms drawn, with steps near where they would start."""
    layer = filled(regard.create("quantized_spike", dim=dim, num_heads=heads, **options), seed)
    with torch.no_grad():
        for n, conv in enumerate(m for m in layer.modules() if isinstance(m, LSQConv2d)):
            conv.step.copy_(lsq_step(conv.weight, conv.bits) * (1 + 0.3 * normal(n, len(conv.step)).tanh()))
    return layer


@pytest.mark.parametrize("case", ["eval", "train"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("quantized_spike", case)
    layer = loaded(z).train(case == "train")
    (x,) = leaves(z["x"])
    out = layer(x)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    assert (x.grad - z["gx"]).abs().max() < 1e-10
    ours = {"g_" + theirs(name): p for name, p in layer.named_parameters()}
    for name in (n for n in z if n.startswith("g_")):
        assert (ours[name].grad - z[name].reshape(ours[name].shape)).abs().max() < 1e-10, name
    after = {"after_" + theirs(n): b for n, b in layer.named_buffers() if not n.endswith("tracked")}
    for name in (n for n in z if n.startswith("after_")):
        assert (after[name] - z[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("heads", "options"), [(2, {}), (3, {"bits": 2}), (1, {"levels": 2, "scale": 0.1}), (2, {"bits": 8, "levels": 7})]
)
def test_equals_the_loops(heads: int, options: dict, training: bool) -> None:
    layer = random(6, heads, **options).train(training)
    x = (normal(3, 2, 6, 2, 3) * 0.7).requires_grad_()
    given = [branch(getattr(layer, f"{n}_proj")) for n in "qkvo"]
    want, after = naive.attention(x, *given, heads, training=training, **options)
    got = layer(x)
    close(got, want, "out")
    of = [x, *layer.parameters()]
    for g, w in zip(gradients(got, of), gradients(want, of), strict=True):
        close(g, w, "gradient")
    for name, ours in (("q", layer.q_proj), ("proj", layer.o_proj)):
        for key, norm in (("bn1", ours.norm), ("bn2", ours.inner_norm), ("bn3", ours.outer_norm)):
            close(norm.running_mean, after[name][key][0], "mean")
            close(norm.running_var, after[name][key][1], "var")


@pytest.mark.parametrize(("levels", "gain"), [(4, 1.0), (4, 2.0), (1, 1.0), (3, 0.5)])
def test_neurons_round_halves_up_and_pass_gradients_inside(levels: int, gain: float) -> None:
    edges = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    x = torch.cat([normal(0, 50) * 2, edges, torch.tensor([0.0, 1.0, -3.0, 9.0, math.inf, -math.inf]).double()])
    x.requires_grad_()
    got, want = IntegerSpike(levels, gain)(x), naive.integer_spike(x[:-2], levels, gain)
    close(got[:-2], want)
    assert got[-2:].tolist() == [gain, 0]
    exact = (torch.arange(levels) + 1) * gain / levels
    assert torch.allclose(got[50 : 50 + levels].float(), exact, atol=1e-6), "up"
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert torch.equal(grad, gain * ((x > 0) & (x < 1)).double())
    spikes = to_spikes(x.detach(), levels)
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    close(gain / levels * spikes.sum(0), got)
    assert integer_spike(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_have_few_values(bits: int) -> None:
    weight, step = leaves(normal(1, 5, 4, 3, 3), 0.1 + 0.2 * normal(2, 5).abs())
    got, want = lsq(weight, step, bits), naive.lsq(weight, step, bits)
    close(got, want)
    for g, w in zip(gradients(got, [weight, step]), gradients(want, [weight, step]), strict=True):
        close(g, w)
    assert all(len(channel.unique()) <= 2**bits for channel in got.detach())
    close(lsq_step(weight, bits), naive.lsq_initial_step(weight, bits))


def test_the_end_of_the_range_has_a_gradient_and_beyond_has_none() -> None:
    weight, step = leaves(torch.tensor([[7.0, 7.1, -8.0, -8.5, 2.5]]).double(), torch.ones(1).double())
    out = lsq(weight, step)
    assert out.tolist() == [[7, 7, -8, -8, 2]], "halves go to even numbers"
    grads = torch.autograd.grad(out.sum(), [weight, step])
    assert grads[0].tolist() == [[1, 0, 1, 0, 1]]
    close(grads[1], torch.tensor([7 - 8 - 0.5 + 0.0 + 0.0]).double() / math.sqrt(5 * 7))


def by_steps(spike: IntegerSpike, x: Tensor) -> Iterator[Tensor]:
    return (spike.gain / spike.levels * train for train in to_spikes(x, spike.levels))


@torch.no_grad()
def test_spikes_may_come_one_by_one() -> None:
    """Each first convolution, and each product, is a sum over binary trains: what the rest sees is the same."""
    layer, x = random(8, 2), normal(5, 2, 8, 4, 3)

    def rest(rep: RepConv, pointed: Tensor) -> Tensor:
        z = rep.norm(pointed)
        frame = rep.border()[None, :, None, None].expand(len(z), -1, z.shape[2] + 2, z.shape[3] + 2).clone()
        frame[:, :, 1:-1, 1:-1] = z
        return rep.outer_norm(rep.inner_norm(rep.mix(rep.depth(frame))))

    trains = {}
    for n, rep in (("q", layer.q_proj), ("k", layer.k_proj), ("v", layer.v_proj)):
        z = rest(rep, sum(rep.point(step) for step in by_steps(layer.spike, x)))
        trains[n] = [s.flatten(2).unflatten(1, (2, 4)).mT for s in by_steps(layer.spike, z)]
    context = sum(k.mT @ v for k in trains["k"] for v in trains["v"])
    o = 0.25 * sum(q @ context for q in trains["q"])
    o = o.mT.reshape(2, 8, 4, 3)
    y = rest(layer.o_proj, sum(layer.o_proj.point(step) for step in by_steps(layer.out_spike, o)))
    close(layer(x), y)
    assert layer(x).std() > 0.01


@torch.no_grad()
def test_products_know_no_order_and_need_values() -> None:
    q, k, v = (integer_spike(normal(n, 2, 2, 6, 3)) for n in range(3))
    order = torch.randperm(6)
    assert torch.equal(spike_attention(*(z[:, :, order] for z in (q, k, v))), spike_attention(q, k, v)[:, :, order])
    assert not spike_attention(q, k, 0 * v).any()
    close(spike_attention(q, k, v, scale=0.5), naive.attention_core(q, k, v, 0.5))


@torch.no_grad()
def test_the_border_is_what_the_norm_makes_of_nothing() -> None:
    rep, x = random().q_proj, torch.zeros(1, 6, 3, 4).double()
    out = rep(x)
    assert torch.allclose(out, out[:, :, :1, :1].expand_as(out), atol=1e-12), "no pixel sees an edge"


def test_distils_maps() -> None:
    ours, maps = [[normal(n + s, 2, 3, 4).requires_grad_() for n in range(2)] for s in (0, 9)]
    loss = attention_distillation(ours, maps)
    close(loss, naive.attention_distillation(ours, maps))
    loss.backward()
    close(ours[0].grad, (ours[0] - maps[0]).detach() / 24)
    assert maps[0].grad is None
    assert attention_distillation(maps, maps) == 0


def test_starting_values() -> None:
    layer = regard.create("quantized_spike", dim=32, num_heads=4)
    conv = layer.k_proj.point
    assert torch.equal(conv.step, (2 * conv.weight.detach().abs().mean() / 7**0.5).expand(32))
    assert 0.9 * 32**-0.5 < conv.weight.detach().abs().max().item() <= 32**-0.5
    norm = layer.o_proj.outer_norm
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
    assert (layer.scale, layer.spike.levels, layer.spike.gain, layer.out_spike.gain) == (0.25, 4, 1.0, 2.0)
    assert {m.bits for m in layer.modules() if isinstance(m, LSQConv2d)} == {4}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"bits": 1}, "bits is too small"), ({"levels": 0}, "levels is too small"), ({"scale": 0.0}, "scale "),
     ({"num_heads": 5}, "num_heads")],
)  # fmt: skip
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regard.create("quantized_spike", **{"dim": 6, "num_heads": 2, **wrong})


def test_refuses_other_inputs() -> None:
    with pytest.raises(ValueError, match="x has the wrong shape"):
        QuantizedSpikeAttention(6, 2)(torch.ones(1, 5, 2, 2))
    with pytest.raises(ValueError, match="another number of layers"):
        attention_distillation([], [])
    with pytest.raises(ValueError, match="another shape"):
        attention_distillation([torch.ones(2)], [torch.ones(3)])

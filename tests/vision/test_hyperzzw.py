"""HyperZZW's parts against loops, whose author has read neither code nor test, and the author's numbers (A116)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.laws.agreement import close
from regard.vision.coordinate_kernel import CoordinateKernel, standardised
from regard.vision.hyper_gates import HyperChannelGate, HyperInteraction, twice
from regard.vision.hyperzzw import GlobalHyperZZW, RecursiveGate, hyper_product
from regard.vision.hyperzzw_block import HyperZZWBlock, slow_loss
from regard.vision.hyperzzw_local import LocalHyperZZW
from vision import naive_hyperzzw as naive
from vision.shared import filled, gradients, leaves, normal, vectors

C = 3


def built(name: str, **options: Any) -> Any:
    return filled(regard.create(name, dim=C, num_heads=1, **options))


def pairs(projs: Any) -> list[tuple[Tensor, Tensor]]:
    return [(p.weight, p.bias) for p in projs]


def of(slow: CoordinateKernel) -> dict[str, Any]:
    """Its parameters, as the loops take them."""
    parts = {"filters": slow.filters, "linears": slow.mixes, "fast": slow.contexts}
    return {n: pairs(p) for n, p in parts.items()} | {"output": (slow.out.weight, slow.out.bias), "bias": slow.beta}


def wanted(slow: CoordinateKernel) -> Tensor:
    return naive.slow_network(naive.grid_coordinates(*slow.sizes), of(slow))


def same_with_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    close(got, want)
    for mine, theirs in zip(*(gradients(y, inputs) for y in (got, want)), strict=True):
        close(mine, theirs)


# --- loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gated", "mixed", "channels"])
def test_the_global_branch_is_the_definition(source: str) -> None:
    layer, (x,) = built("hyperzzw", grid=3, hidden=4, source=source), leaves(normal(1, 2, C, 3, 3))
    kernel = wanted(layer.slow)
    if source == "gated":
        gates = [(*pairs((g.o_proj, g.k_proj, g.q_proj, g.v_proj)), g.bias) for g in (layer.slow_gate, layer.fast_gate)]
        z = naive.rgu(x * kernel, *gates[0]) + naive.rgu(x, *gates[1])
    elif source == "mixed":
        z = naive.one_by_one(x, layer.mixer.weight, layer.mixer.bias)
    else:
        z = naive.channel_gate(x, wanted(layer.gate.slow)[0])
    want = naive.global_branch(x, naive.per_map(z), kernel)
    same_with_gradients(layer(x), want, [x, *layer.parameters()])


@pytest.mark.parametrize("K", [3, 5])
def test_the_local_branch_is_the_definition(K: int) -> None:
    layer = built("hyperzzw_local", kernel_size=K, hidden=4, layers=1)
    x, z = leaves(normal(1, 2, C, 4, 3), normal(2, 2, C, 4, 3))
    given = of(layer.slow) | {"reduce": pairs([layer.reduce])[0], "fc1": pairs([layer.inner])[0]}
    want = naive.local_branch(z, naive.local_kernel(x, K, given), pairs([layer.mixer])[0], layer.bias)
    same_with_gradients(layer(x, z), want, [x, z, *layer.parameters()])


def test_the_gates_are_the_definition() -> None:
    gate, (x,) = built("hyper_channel_gate", hidden=4), leaves(normal(1, 2, C, 3, 4))
    same_with_gradients(gate(x), naive.channel_gate(x, wanted(gate.slow)[0]), [x, *gate.parameters()])
    meeting, (y,) = built("hyper_interaction", grid=3, hidden=4, channel_hidden=5), leaves(normal(2, 2, C, 3, 3))
    kernels = wanted(meeting.channels)[0], wanted(meeting.places)[0]
    x = x[..., :3]
    same_with_gradients(meeting(y, x), naive.hyper_interaction(y, x, *kernels), [y, x, *meeting.parameters()])
    close(meeting(y), meeting(y, y))


def test_the_block_joins_ten_maps_and_earlier_ones() -> None:
    """Each is what the parts give; the last ones are the caller's, repeated."""
    sizes = (1, 3, 1, 3)
    layer: Any = filled(HyperZZWBlock(C, grid=3, hidden=4, kernel_sizes=sizes, earlier=(1, 3), expansion=2))
    x, a, b = (normal(n, 2, c, 3, 3) for n, c in ((1, C), (2, 1), (3, 3)))
    K = x * wanted(layer.branch.slow)
    fast = standardised(layer.branch.slow_gate(K) + layer.branch.fast_gate(x))
    mixed, gated = standardised(layer.mixer(x)), standardised(layer.gate(x))
    out = K @ fast
    close(out, layer.branch(x))
    one, two, three, four = layer.locals
    local = one(x, gated), two(gated, x), three(mixed, x), four(x, mixed)
    sums = [out, local[1], fast, K @ mixed, local[0], out.sigmoid() * out, local[2], K @ gated, local[3]]
    sums += [layer.interaction(out, x), a.repeat(1, 3, 1, 1), b]
    for got, want in zip(layer.maps(x, a, b), sums, strict=True):
        close(got, want)
    close(layer(x, a, b), F.gelu(standardised(layer.join(torch.cat(sums, 1)))) + layer.bias)
    assert layer(x, a, b).shape == (2, 2 * C, 3, 3)
    close(layer.with_kernel(x, a, b).kernel, wanted(layer.branch.slow))


# --- the author's numbers ------------------------------------------------------------------------------------


def loaded(slow: CoordinateKernel, z: dict[str, Tensor], prefix: str = "") -> CoordinateKernel:
    names = {"out": "output_linear"}
    names |= {f"filters.{i}": f"filters_{i}_linear" for i in range(3)}
    names |= {f"mixes.{i}": f"linears_{i}" for i in range(2)}
    names |= {f"contexts.{i}": f"fast_linears_x_{i}" for i in range(len(slow.contexts))}
    state = {f"{n}.{p}": z[f"{prefix}{t}_{p}"] for n, t in names.items() for p in ("weight", "bias")}
    state["beta"] = z[f"{prefix}bias_pk" if slow.contexts else f"{prefix}bias_p"].reshape(slow.beta.shape)
    slow.load_state_dict({n: p.reshape(slow.state_dict()[n].shape) for n, p in state.items()})
    return slow


def agree(got: Tensor, want: Tensor) -> None:
    assert (got.reshape(want.shape) - want).abs().max() < 1e-10


def test_gives_the_authors_numbers() -> None:
    """g: kernel and product of the global branch; c and s: gates."""
    z = vectors("A116", "g")
    slow, (x,) = loaded(CoordinateKernel(3, (5, 5), hidden=4).double(), z), leaves(z["x"])
    agree(slow(), z["hk"])
    out = hyper_product(x * slow(), z["z"])
    agree(out, z["y"])
    gx, weight = torch.autograd.grad((out * z["w"]).sum(), [x, slow.out.weight])
    agree(gx, z["gx"])
    agree(weight, z["g_output_linear_weight"])
    z = vectors("A116", "c")
    gate, (x,) = HyperChannelGate(5, hidden=4).double(), leaves(z["x"])
    loaded(gate.slow, z)
    agree(gate.slow(), z["hk"])
    agree(gate(x), z["y"])
    agree(torch.autograd.grad((gate(x) * z["w"]).sum(), x)[0], z["gx"])
    z = vectors("A116", "s")
    meeting, (y,) = HyperInteraction(5, grid=4, hidden=4, channel_hidden=4).double(), leaves(z["y"])
    loaded(meeting.channels, z, "c_")
    loaded(meeting.places, z, "s_")
    agree(meeting(y, z["x"]), z["out"])
    agree(torch.autograd.grad((meeting(y, z["x"]) * z["w"]).sum(), y)[0], z["gy"])


def test_gives_the_authors_numbers_of_the_local_branch() -> None:
    """With its stopped gradients."""
    z = vectors("A116", "l")
    layer, (x1,) = LocalHyperZZW(3, hidden=4).double(), leaves(z["x1"])
    loaded(layer.slow, z)
    with torch.no_grad():
        parts = {"fast_reduce": layer.reduce, "fast_fc1": layer.inner, "conv_channel_mixer": layer.mixer}
        for name, proj in parts.items():
            proj.weight.copy_(z[f"{name}_weight"].reshape(proj.weight.shape))
            proj.bias.copy_(z[f"{name}_bias"])
    agree(layer.kernel(x1), z["hk"])
    out = layer(x1, z["x2"])
    agree(out, z["y"])
    first = layer.slow.filters[0].weight
    gx, weight = torch.autograd.grad((out * z["w"]).sum(), [x1, first])
    agree(gx, z["gx1"])
    agree(weight, z["g_filters_0_linear_weight"])


# --- what is true of them ------------------------------------------------------------------------------------


def test_the_product_sees_a_row_and_a_column() -> None:
    """For the map at hand as kernel and another one as z; and inside, what it meets has mean 0."""
    layer, (x, z) = built("hyperzzw", grid=5, hidden=4), leaves(normal(1, 1, C, 5, 5), normal(2, 1, C, 5, 5))
    out = hyper_product(layer.kernel(x), z)
    of_x, of_z = (g[0, 1].ne(0) for g in torch.autograd.grad(out[0, 1, 3, 2], [x, z]))
    assert of_x.nonzero()[:, 0].unique().tolist() == [3]
    assert of_z.nonzero()[:, 1].unique().tolist() == [2]
    assert of_x.sum() == of_z.sum() == 5
    x = 5 + normal(3, 1, C, 5, 5)
    gates = standardised(layer.slow_gate(layer.kernel(x)) + layer.fast_gate(x))
    assert gates.mean((2, 3)).abs().max() < 1e-14
    close(layer(x), hyper_product(layer.kernel(x), gates))
    assert layer(x).square().sum((2, 3)).sqrt().le(layer.kernel(x).square().sum((2, 3)).sqrt() * 5).all()


def test_a_local_kernel_is_the_batchs() -> None:
    """With one of the maps twice as large, the other's output changes, as if the kernel alone were another."""
    layer, x = built("hyperzzw_local", hidden=4), normal(1, 2, C, 6, 5)
    close(layer.kernel(x), layer.kernel(x.flip(0)))
    other = torch.stack([x[0], 2 * x[1]])
    assert (layer.kernel(other) - layer.kernel(x)).abs().max() > 1e-3
    assert (layer(other) - layer(x))[0].abs().max() > 1e-3
    u = layer.mixer(F.conv2d(x, layer.kernel(x)[:, None], padding=1, groups=C))
    normed = standardised(u, (0, 2, 3))
    assert normed.mean((0, 2, 3)).abs().max() < 1e-14
    close(layer(x), F.gelu(normed) + layer.bias)


def test_the_gate_is_even_in_the_mean() -> None:
    gate, x = built("hyper_channel_gate", hidden=4), 1 + normal(1, 2, C, 4, 4)
    close(gate(-x), -gate(x))
    centred = x - x.mean((2, 3), keepdim=True)
    close(gate(centred), centred / 2)
    kernel, y = normal(2, 4), normal(3, 4)
    close(twice(kernel, y), kernel * y.square())


def test_the_interaction_gates_pixels() -> None:
    layer = built("hyper_interaction", grid=4, hidden=4, channel_hidden=4)
    y, x = 1 + normal(1, 2, C, 4, 4), normal(2, 2, C, 4, 4)
    close(layer(-y), -layer(y))
    close(layer(y, 3 * x), 3 * layer(y, x))
    gates = layer(y, torch.ones_like(x))
    assert ((gates > 0) & (gates < 1)).all()
    assert gates.flatten().unique().numel() > 90


def test_blocks_without_residuals_keep_the_size() -> None:
    """Ten, one behind another, on maps that begin a hundred times too small or too large."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(HyperZZWBlock(8, grid=6, hidden=8) for _ in range(10)))
    for size in (0.01, 1, 100):
        y = blocks(size * normal(1, 2, 8, 6, 6).float())
        assert 0.3 < float(y.detach().square().mean().sqrt()) < 1
        assert float(y.detach().std((2, 3)).min()) > 0.3, "no map dies"


def test_other_sizes() -> None:
    """A grid of another size samples the same sines; beta and bias maps are interpolated."""
    slow = CoordinateKernel(2, (3, 3), hidden=4).double()
    finer = slow(sizes=(5, 5))
    close(finer[:, ::2, ::2], slow())
    with torch.no_grad():
        slow.beta.copy_(normal(1, 3, 3))
    close(slow(sizes=(5, 5))[:, ::2, ::2], slow())
    layer = built("hyperzzw", grid=3, hidden=4)
    assert layer(normal(1, 2, C, 5, 5)).shape == (2, C, 5, 5)
    assert layer(normal(1, 0, C, 3, 3)).shape == (0, C, 3, 3)
    assert filled(HyperZZWBlock(C, grid=4, hidden=4))(normal(1, 2, C, 1, 1)).isfinite().all()


def test_slow_loss() -> None:
    shallow, deep = normal(1, 2, 3, 3), normal(2, 4, 3, 3)
    third = normal(3, 4, 3, 3)
    apart = ((shallow.repeat(2, 1, 1) - z).square().mean() for z in (deep, third))
    close(slow_loss([shallow, deep, third]), sum(apart) + (deep - third).square().mean())
    assert float(slow_loss([shallow])) == 0
    with pytest.raises(ValueError, match="slow_loss: kernels are no multiples"):
        slow_loss([deep, normal(1, 6, 3, 3)])


def test_starting_values() -> None:
    torch.manual_seed(0)
    slow = CoordinateKernel(64, (8, 8), hidden=256, layers=2, frequency=2.0)
    for layer, sines in enumerate(slow.filters):
        assert not sines.bias.any()
        mean = float(sines.weight.detach().abs().mean())  # of a uniform, times 6 / (layer + 1) on average
        assert mean == pytest.approx(2 * torch.pi * 2 * 6 / (layer + 1) / 8**0.5, rel=0.15)
    assert all((m.bias == 1).all() for m in slow.mixes)
    assert float(slow.mixes[0].weight.detach().std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(slow.out.weight.detach().std()) == pytest.approx(1 / 16 / 8, rel=0.05)
    assert not slow.beta.any()
    gate = RecursiveGate(64, 4)
    assert float(gate.k_proj.weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    assert not gate.bias.any()
    local = regard.create("hyperzzw_local", dim=64, num_heads=1)
    assert float(local.mixer.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert (local.slow.contexts[0].bias == 1).all()


@pytest.mark.parametrize(
    ("build", "wrong", "told"),
    [
        (GlobalHyperZZW, {"grid": 0}, "grid is too small"),
        (GlobalHyperZZW, {"source": "x"}, "source is unknown"),
        (LocalHyperZZW, {"kernel_size": 4}, "kernel_size is even"),
        (HyperChannelGate, {"frequency": 0.0}, "frequency is out of range"),
        (HyperInteraction, {"channel_hidden": 0}, "channel_hidden is too small"),
        (HyperZZWBlock, {"kernel_sizes": (3, 3)}, "kernel_sizes are not four"),
        (HyperZZWBlock, {"earlier": (2,)}, "earlier does not divide dim"),
        (HyperZZWBlock, {"dropout": 2.0}, "dropout is out of range"),
    ],
)
def test_refuses(build: Any, wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(C, **wrong)


def test_refuses_other_maps() -> None:
    with pytest.raises(ValueError, match="x is no square"):
        built("hyperzzw", grid=3)(normal(1, 1, C, 3, 4))
    with pytest.raises(ValueError, match="earlier are other maps"):
        filled(HyperZZWBlock(C, grid=3))(normal(1, 1, C, 3, 3), normal(1, 1, C, 3, 3))
    with pytest.raises(ValueError, match="x has the wrong shape"):
        built("hyper_interaction", grid=3)(normal(1, 1, C, 3, 3), normal(1, 1, C, 3, 4))

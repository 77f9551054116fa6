"""A2N against loops, whose author saw only the paper's account, and the authors' numbers (A066)."""

import pytest
import torch
from torch import Tensor

import regard
from laws.measured import flops
from regard.laws.agreement import close
from regard.vision.attention_in_attention import AttentionInAttention, a2n
from regard.vision.pixel_attention import PixelAttention
from vision import naive_attention_in_attention as naive
from vision.shared import filled, gradients, leaves, normal, vectors
from vision.test_pixel_attention import both, stage_weights


def made(dim: int, seed: int = 0, **options) -> AttentionInAttention:
    return filled(regard.create("attention_in_attention", dim=dim, num_heads=1, causal=False, **options), seed)


def block_weights(block: AttentionInAttention) -> list[Tensor]:
    inner = block.attention
    blend = [block.first.weight, block.squeeze.weight, block.choose.weight]
    gated = [inner.before.weight, *both(inner.gate_proj), inner.inner.weight, inner.outer.weight]
    return [*blend, *gated, block.plain.weight, block.last.weight]


def agree(got: Tensor, want: Tensor, wanted: list[Tensor]) -> None:
    close(got, want)
    for ours, theirs in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"plain_kernel": 1, "temperature": 1.0}, {"reduction": 2, "slope": 0.0}]
)
def test_equals_the_loops(options: dict) -> None:
    layer, (x,) = made(4, **options), leaves(normal(1, 2, 4, 3, 4))
    told = {name: options[name] for name in ("temperature", "slope") if name in options}
    weights = block_weights(layer)
    agree(layer(x), naive.attention_in_attention(x, *weights, **told), [x, *layer.parameters()])
    close(layer.branch_weights(x), naive.branch_weights(x, *weights[:3], **told))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_network_equals_the_loops(scale: int) -> None:
    net, (image,) = filled(a2n(dim=4, up_dim=3, blocks=2, scale=scale, channels=2)), leaves(normal(1, 1, 2, 2, 3))
    for p in net.parameters():
        p.data.mul_(0.5)  # else gates come to where the loops' exponential overflows
    stages, last = stage_weights(net.upsampler[0]), both(net.upsampler[1])
    want = naive.a2n(
        image, scale, *both(net.first), [block_weights(b) for b in net.body], *both(net.trunk), stages, *last
    )
    agree(net(image), want, [image, *net.parameters()])


NAMES = {
    "conv_first": "first",
    "conv_last": "last",
    "ADM.0": "squeeze",
    "ADM.2": "choose",
    "attention.k1": "attention.before",
    "attention.k2": "attention.gate_proj",
    "attention.k3": "attention.inner",
    "attention.k4": "attention.outer",
    "non_attention": "plain",
    "conv": "gate_proj",
}


def ours(name: str) -> str:
    part, _, kind = name[2:].rpartition(".")
    return f"{NAMES[part]}.{kind}"


@pytest.mark.parametrize("case", ["aab", "aab_t1", "a2nm", "pa"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("A066", case)
    if case == "aab":
        z = {name: values for name, values in z.items() if not name.startswith("t1_")}
    dim, how = (
        z["x"].shape[1],
        {"temperature": 1.0 if case == "aab_t1" else 30.0, "plain_kernel": 3 - 2 * (case == "a2nm")},
    )
    layer = (PixelAttention(dim) if case == "pa" else AttentionInAttention(dim, **how)).double()
    layer.load_state_dict({ours(n): p for n, p in z.items() if n.startswith("p_")})
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    given = {ours(n): g for n, g in z.items() if n.startswith("g_")}
    assert given
    for name, g in given.items():
        close(layer.get_parameter(name).grad, g)
    if case != "pa":
        close(layer.branch_weights(x), z["branch_weights"])


def test_the_weights_follow_the_sample() -> None:
    layer, x = made(8, temperature=1.0, reduction=2), normal(1, 6, 8, 5, 4)
    weights = layer.branch_weights(x)
    close(weights.sum(1), torch.ones(6, dtype=x.dtype))
    assert float(weights.detach()[:, 0].std()) > 0.01
    h = torch.nn.functional.leaky_relu(layer.first(x), 0.2)
    parts = (layer.attention(h), layer.plain(h))
    both = sum(w[:, None, None, None] * part for w, part in zip(weights.unbind(1), parts, strict=True))
    close(layer(x), x + layer.last(torch.nn.functional.leaky_relu(both, 0.2)))
    field = normal(2, 1, 8, 14, 14).requires_grad_()
    (far,) = torch.autograd.grad(layer(field)[0, :, -1, -1].sum(), field)
    assert (far[0, :, 0, 0] != 0).any(), "convolutions don't reach as far: the weights do"
    blend = sum(p.numel() for part in (layer.squeeze, layer.choose) for p in part.parameters())
    assert blend == 8 * 8 // 2 + 2 * 8 // 2


def test_without_a_say_both_branches_count_alike() -> None:
    layer, x = made(8), normal(1, 2, 8, 5, 4)
    torch.nn.init.zeros_(layer.choose.weight)
    h = torch.nn.functional.leaky_relu(layer.first(x), 0.2)
    mean = (layer.attention(h) + layer.plain(h)) / 2
    close(layer(x), x + layer.last(torch.nn.functional.leaky_relu(mean, 0.2)))


def test_the_networks_have_the_authors_parameters() -> None:
    told = ({}, 1_047_459), ({"plain_kernel": 1}, 842_659), ({"scale": 2}, 1_036_443)
    for options, n in told:
        assert sum(p.numel() for p in a2n(**options).parameters()) == n == naive.parameter_counts(**options)


def test_cost_is_linear_in_pixels() -> None:
    layer = made(8)
    small, large, own = normal(0, 1, 8, 8, 8), normal(0, 1, 8, 16, 32), 2 * (8 * 2 + 2 * 2)
    assert flops(lambda: layer(large)) - own == 8 * (flops(lambda: layer(small)) - own) > 0


def test_bad_input_and_empty_batches() -> None:
    with pytest.raises(ValueError, match=r"reduction leaves no channel \(got 5\); expected an int from 1 to dim = 4"):
        AttentionInAttention(4, reduction=5)
    with pytest.raises(ValueError, match=r"temperature is out of range \(got 0.0\)"):
        AttentionInAttention(4, temperature=0.0)
    with pytest.raises(ValueError, match=r"plain_kernel is unknown \(got 5\); expected one of 1, 3"):
        AttentionInAttention(4, plain_kernel=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 4, 0, 3\)\)"):
        AttentionInAttention(4)(torch.zeros(2, 4, 0, 3))
    assert AttentionInAttention(4)(torch.zeros(0, 4, 5, 5)).shape == (0, 4, 5, 5)

"""ConViT's attention against loops, whose author saw the equations alone, and the authors' numbers (A010)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision.gpsa import (
    GatedPositionalSelfAttention,
    axis_weights,
    by_place,
    gated_positional_attention,
    local_places,
)
from vision import naive_gpsa
from vision.shared import normal, vectors


def as_map(tokens: Tensor, side: int) -> Tensor:
    return tokens.mT.unflatten(-1, (side, side))


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def naive(layer: GatedPositionalSelfAttention, x: Tensor) -> Tensor:
    """The loops with the layer's parameters. b_pos is any number: it cancels."""
    joined = torch.cat([layer.q_proj.weight, layer.k_proj.weight])
    biases = {}
    if layer.q_proj.bias is not None:
        biases = {"qk_bias": torch.cat([layer.q_proj.bias, layer.k_proj.bias]), "v_bias": layer.v_proj.bias}
    o, any_ = layer.o_proj, normal(7, layer.num_heads)
    matrices = (joined, layer.v_proj.weight, o.weight, o.bias, layer.places, any_, layer.gate)
    return as_map(naive_gpsa.gpsa(as_tokens(x), *matrices, **biases)[0], x.shape[-1])


@pytest.mark.parametrize(("heads", "bias", "side"), [(4, False, 3), (2, True, 4), (1, False, 1)])
def test_is_the_definition(heads: int, bias: bool, side: int) -> None:
    layer = regard.create("gpsa", dim=8, num_heads=heads, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(10 + n, *p.shape))
    x = normal(1, 2, 8, side, side).requires_grad_()
    got, want = layer(x), naive(layer, x)
    close(got, want)
    of = [x, *layer.parameters()]
    g = normal(2, *got.shape)
    mine, theirs = (torch.autograd.grad((z * g).sum(), of) for z in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


def loaded(z: dict[str, Tensor]) -> GatedPositionalSelfAttention:
    heads, M = len(z["gating_param"]), z["v_weight"].shape[0]
    layer = GatedPositionalSelfAttention(M, heads, bias="qk_bias" in z).double()
    state = {"places": z["pos_proj_weight"], "gate": z["gating_param"]}
    for kind in ("weight", "bias"):
        state[f"o_proj.{kind}"] = z[f"proj_{kind}"]
        if f"qk_{kind}" in z:
            state[f"q_proj.{kind}"], state[f"k_proj.{kind}"] = z[f"qk_{kind}"].chunk(2)
            state[f"v_proj.{kind}"] = z[f"v_{kind}"]
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize(("case", "side"), [("h4", 3), ("h5bias", 2)])
def test_authors_numbers(case: str, side: int) -> None:
    z = vectors("A010", case)
    layer = loaded(z)
    x = z["x"].requires_grad_()
    out = as_tokens(layer(as_map(x, side)))
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["grad_x"])
    close(layer.gate.grad, z["grad_gating"])
    close(layer.places.grad, z["grad_pos_proj_weight"])
    q, k = (
        f(x[:1]).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).unflatten(2, (side, side))
        for f in (layer.q_proj, layer.k_proj)
    )
    each = torch.eye(side * side, dtype=torch.float64).unflatten(0, (side, side)).expand(1, layer.num_heads, -1, -1, -1)
    weights = gated_positional_attention(q, k, each, layer.places, layer.gate)[0]
    close(weights.flatten(1, 2), z["attn_batch0"])


@pytest.mark.parametrize("heads", [4, 5, 9])
def test_authors_start(heads: int) -> None:
    z = vectors("A010", "init")
    want = z[f"pos_proj_weight_H{heads}"]
    part = GatedPositionalSelfAttention(3 * heads, heads, locality=1.5).double()
    taps = int(heads**0.5) ** 2
    close(part.places[:taps].detach(), want[:taps])
    close(local_places(heads, 1.5).double(), naive_gpsa.local_init(heads, 1.5))
    if heads == 9:
        each = torch.eye(25, dtype=torch.float64).unflatten(0, (5, 5)).expand(1, 9, -1, -1, -1)
        close(by_place(each, local_places(9, 3.0).double())[0, :, 2, 2], z["pos_attn_center_H9_5x5_strength3"])


def test_starting_values() -> None:
    torch.manual_seed(0)
    layer = regard.create("gpsa", dim=100, num_heads=5)
    assert torch.equal(layer.gate, torch.ones(5))
    assert torch.equal(layer.v_proj.weight, torch.eye(100))
    assert not layer.o_proj.bias.any()
    assert layer.q_proj.bias is None
    for linear in (layer.q_proj, layer.k_proj, layer.o_proj):
        assert abs(float(linear.weight.detach().std()) - 0.02) < 0.001
    last = [regard.create("gpsa", dim=10, num_heads=5, locality=100.0).places[4] for _ in range(30)]
    assert 1.4 < float(torch.stack(last).detach().std()) < 2.6, "the fifth head's is random, times the locality"
    plain = regard.create("gpsa", dim=100, num_heads=4, locality=None)
    assert abs(float(plain.v_proj.weight.detach().std()) - 0.02) < 0.001
    assert plain.places.abs().max() < 0.1


def test_is_a_convolution_or_attention_by_its_gates() -> None:
    """Sharp places and gates that let nothing else through: a 3 x 3 convolution where pixels have all neighbours. Gates
    the other way round, and it is softmax attention."""
    torch.manual_seed(0)
    layer = regard.create("gpsa", dim=18, num_heads=9, locality=50.0, dtype=torch.float64)
    torch.nn.init.normal_(layer.o_proj.weight)
    x = normal(3, 2, 18, 6, 7)
    torch.nn.init.constant_(layer.gate, 50.0)
    kernel = torch.zeros(18, 18, 3, 3, dtype=torch.float64)
    for channel in range(18):  # head h sees two channels, and one tap of the kernel: dy runs fastest
        head = channel // 2
        kernel[:, channel, head % 3, head // 3] = layer.o_proj.weight[:, channel].detach()
    close(layer(x)[:, :, 1:-1, 1:-1], F.conv2d(x, kernel))
    torch.nn.init.constant_(layer.gate, -50.0)
    plain = regard.Attention(18, 9).double()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(plain, name).weight = getattr(layer, name).weight
    close(layer(x), plain(as_tokens(x)).mT.unflatten(-1, (6, 7)))


def test_maps_of_other_sides() -> None:
    """Places are what the offsets say, on maps of any sides; those of a row are a map of one row."""
    places, v = normal(1, 3, 3), normal(2, 2, 3, 4, 6, 5)
    y, x = (z.flatten().double() for z in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    dx, dy = x - x[:, None], y - y[:, None]
    logits = torch.einsum("hf,fij->hij", places, torch.stack([dx, dy, dx**2 + dy**2]))
    want = (logits.softmax(-1) @ v.flatten(2, 3)).unflatten(2, (4, 6))
    close(by_place(v, places), want)
    row = v[:, :, :1]
    close(by_place(row, places)[:, :, 0], axis_weights(6, places[:, 0], places[:, 2]) @ row[:, :, 0])


def test_heads_may_be_learned_away_from_their_places() -> None:
    """Gates take gradients, also where they are nearly shut."""
    layer = regard.create("gpsa", dim=8, num_heads=4)
    layer(torch.randn(2, 8, 5, 4)).square().sum().backward()
    assert layer.gate.grad.abs().min() > 0
    assert layer.places.grad.abs().min() > 0


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GatedPositionalSelfAttention: locality is out of range \(got 0.0\)"):
        regard.create("gpsa", dim=8, num_heads=4, locality=0.0)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 3 \(got 8\)"):
        regard.create("gpsa", dim=8, num_heads=3)
    with pytest.raises(ValueError, match=r"by_place: places has the wrong shape \(got \(2, 2\)\); expected"):
        by_place(normal(1, 1, 2, 3, 3, 4), normal(2, 2, 2))
    with pytest.raises(ValueError, match=r"GatedPositionalSelfAttention: x has the wrong shape"):
        GatedPositionalSelfAttention(8, 4)(torch.zeros(2, 9, 8))

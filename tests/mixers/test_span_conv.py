"""Span-based dynamic convolution and ConvBERT's mixed attention: loops, transformers, and its numbers (A122)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import regard
from mixers.naive_span_conv import naive_span_conv
from regard.laws.agreement import close, same
from regard.mixers.convbert import MixedAttention
from regard.mixers.span_conv import SpanConvolution, SpanHeads, dynamic_convolution

VECTORS = Path(__file__).parents[1] / "vectors" / "A122.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(layer: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))


def mixed(seed: int, dim: int = 12, num_heads: int = 4, **options) -> MixedAttention:
    layer = MixedAttention(dim, num_heads, **{"kernel_size": 5, **options}).double().eval()
    fill(layer, seed)
    return layer


def span(seed: int, dim: int = 6, num_heads: int = 2, **options) -> SpanConvolution:
    layer = SpanConvolution(dim, num_heads, **{"kernel_size": 5, **options}).double().eval()
    fill(layer, seed)
    return layer


def naive(layer: MixedAttention | SpanConvolution, x: Tensor, **options) -> Tensor:
    """The oracle's 2 H D outputs (attention first) for the layer's weights; what the layer lacks is the query's."""
    p = dict(layer.named_parameters())

    def linear(name: str) -> tuple[Tensor, Tensor]:
        return p[name + ".weight"], p[name + ".bias"]

    q = linear("q_proj")
    k, v = (linear(name) if name + ".weight" in p else q for name in ("k_proj", "v_proj"))
    depthwise = p["heads.depthwise.weight"][:, 0]
    rest = (*linear("heads.pointwise"), *linear("heads.kernel_proj"))
    return naive_span_conv(
        x, *q, *k, *v, *linear("heads.u_proj"), depthwise, *rest, num_heads=layer.heads.num_heads, **options
    )


def compare(layer: nn.Module, x: Tensor, want: Tensor, keep: Tensor | None) -> None:
    shown = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    got, want = layer(x, mask=keep)[shown], layer.o_proj(want)[shown]
    close(got.detach(), want.detach())
    direction, leaves = normal(9, *got.shape), [x, *layer.parameters()]
    grads = [torch.autograd.grad((out * direction).sum(), leaves, materialize_grads=True) for out in (got, want)]
    for (name, _), g, w in zip([("x", x), *layer.named_parameters()], *grads, strict=True):
        close(g, w, name)


KEEP = torch.tensor([[True] * 7, [False, True, True, False, True, False, False]])


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "hidden"])
@pytest.mark.parametrize(("num_heads", "kernel_size"), [(4, 5), (6, 3), (1, 9), (4, 1)])
def test_mixed_equals_the_loops(num_heads: int, kernel_size: int, keep: Tensor | None) -> None:
    layer, x = mixed(num_heads, num_heads=num_heads, kernel_size=kernel_size), normal(2, 2, 7, 12).requires_grad_()
    compare(layer, x, naive(layer, x, keep=keep, padding="everywhere"), keep)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "hidden"])
@pytest.mark.parametrize(("num_heads", "kernel_size"), [(2, 5), (3, 3), (1, 9)])
def test_convolution_equals_the_loops(num_heads: int, kernel_size: int, keep: Tensor | None) -> None:
    layer, x = span(num_heads, num_heads=num_heads, kernel_size=kernel_size), normal(2, 2, 7, 6).requires_grad_()
    compare(layer, x, naive(layer, x, keep=keep, padding="everywhere")[..., 6:], keep)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "heads.u_proj": "conv_out_layer",
    "heads.kernel_proj": "conv_kernel_layer",
}


def load(layer: MixedAttention, theirs: dict[str, Tensor]) -> None:
    """Copy a ConvBertSelfAttention's weights in. It has no output projection: ours becomes the identity."""
    state = {f"{own}.{kind}": theirs[f"{name}.{kind}"] for own, name in NAMES.items() for kind in ("weight", "bias")}
    state["heads.depthwise.weight"] = theirs["key_conv_attn_layer.depthwise.weight"]
    state["heads.pointwise.weight"] = theirs["key_conv_attn_layer.pointwise.weight"][..., 0]
    state["heads.pointwise.bias"] = theirs["key_conv_attn_layer.bias"][:, 0]
    weight = layer.o_proj.weight
    layer.load_state_dict({**state, "o_proj.weight": torch.eye(len(weight)), "o_proj.bias": torch.zeros(len(weight))})


@pytest.mark.parametrize(("case", "num_heads", "ratio"), [("c1", 4, 2), ("c2", 6, 2), ("c3", 4, 8)])
def test_gives_the_librarys_numbers(case: str, num_heads: int, ratio: int) -> None:
    """c2 hides keys from attention only: the released code lets hidden tokens into the convolutions."""
    z = vectors(case)
    layer = MixedAttention(z["x"].shape[-1], num_heads, head_ratio=ratio, kernel_size=int(z["K"])).double()
    load(layer, {k.removeprefix("P_"): v for k, v in z.items() if k.startswith("P_")})
    x = z["x"].requires_grad_()
    q = layer.q_proj(x)
    y = torch.cat([layer.attend(x, q, ~z["pad"] if "pad" in z else None), layer.heads(x, q)], -1)
    close(y.detach(), z["out"])
    close(torch.autograd.grad((y * z["w"]).sum(), x)[0], z["gx"])
    if "pad" not in z:
        close(layer(x).detach(), z["out"])


@pytest.mark.parametrize("num_heads", [2, 4, 12])
def test_equals_transformers(num_heads: int) -> None:
    convbert = pytest.importorskip("transformers.models.convbert.modeling_convbert")
    config = convbert.ConvBertConfig(hidden_size=24, num_attention_heads=num_heads, conv_kernel_size=7, head_ratio=2)
    theirs = convbert.ConvBertSelfAttention(config).double().eval()
    fill(theirs, 3)
    layer = regard.convert_layer(theirs)
    x = normal(4, 2, 11, 24)
    close(layer(x).detach(), theirs(x)[0].detach())


def test_a_convolution_sees_its_neighbourhood_only() -> None:
    layer, x = span(5), normal(6, 1, 11, 6)
    y = layer(x)
    for s in range(11):
        changed = x.clone()
        changed[:, s] += 1
        near = (torch.arange(11) - s).abs() <= 2
        out = layer(changed)
        same(out[:, ~near], y[:, ~near])
        assert out[:, near].ne(y[:, near]).any(-1).all()


def test_constant_kernels_are_a_plain_convolution() -> None:
    u, kernel = normal(1, 2, 9, 3, 2), normal(2, 3, 5)
    got = dynamic_convolution(u, kernel.expand(2, 9, 3, 5))
    flat = u.flatten(2).mT
    want = nn.functional.conv1d(flat, kernel.repeat_interleave(2, 0)[:, None], padding=2, groups=6)
    close(got.flatten(2), want.mT)


def test_fewer_parameters_than_plain_attention_and_half_of_its_pairs() -> None:
    """Half of the heads attend, in half of the width: so does the work that grows with the square of the length."""
    mixed = regard.create("convbert", dim=256, num_heads=4)
    plain = regard.create("softmax", dim=256, num_heads=4, bias=True)
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in (mixed, plain)]
    assert parameters[0] < 0.95 * parameters[1]

    def work(length: int) -> int:
        with FlopCounterMode(display=False) as counter:
            mixed(torch.randn(1, length, 256))
        return counter.get_total_flops()

    scores_and_values = 2 * 2 * 256  # flops of plain attention for a pair of tokens
    assert work(64) - 2 * work(32) == (64**2 - 2 * 32**2) * scores_and_values // 2


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is even \(got 4\); expected an odd int"):
        span(1, kernel_size=4)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        span(1, dim=7)
    with pytest.raises(ValueError, match=r"dim is no multiple of heads of both kinds = 4 \(got 10\)"):
        mixed(1, dim=10)
    with pytest.raises(
        ValueError, match=r"dropout is out of range \(got -0.1\); expected a finite number >= 0 and <= 1"
    ):
        mixed(1, dropout=-0.1)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 5\)\); expected \(B, T, M = 6\)"):
        span(1)(normal(1, 2, 3, 5))
    for name in ("span_conv", "convbert"):
        with pytest.raises(ValueError, match="causal"):
            regard.create(name, dim=24, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"head_dim is none of its options \(got 3\)"):
        regard.create("convbert", dim=24, num_heads=2, head_dim=3)
    with pytest.raises(TypeError, match="num_heads"):
        SpanHeads(4, 2.0, 2, 3)

"""Attentive convolution against loops over places, whose author read neither code nor test, and the authors' code."""

import pytest
import torch
from torch import Tensor

import regard
from laws.measured import flops
from regard.laws.agreement import close, same
from regard.vision.attentive_conv import AttentiveConv, attentive_convolution, cell_means
from vision import naive_attentive_conv as naive
from vision.shared import filled, gradients, leaves, normal, vectors


def made(dim: int, seed: int = 0, **options) -> AttentiveConv:
    return filled(regard.create("attentive_conv", dim=dim, num_heads=1, causal=False, **options), seed)


def parts(layer: AttentiveConv) -> dict[str, Tensor | None]:
    named = {"wk": layer.k_proj, "wg": layer.taps, "wv": layer.v_proj, "wo": layer.o_proj}
    weights = {name: part.weight.flatten(1) for name, part in named.items()}
    return {**weights, **{name.replace("w", "b"): part.bias for name, part in named.items()}, "d": layer.inhibition}


@pytest.mark.parametrize(
    ("dim", "sizes", "options"),
    [
        (2, (4, 3), {}),
        (1, (5, 4), {"pool": "grid", "activation": "gelu_tanh"}),
        (2, (2, 2), {"bias": False}),
        (1, (4, 4), {"kernel_size": 5}),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_equals_the_loops(dim: int, sizes: tuple[int, int], options: dict, hidden: bool) -> None:
    layer = made(dim, **options)
    (x,) = leaves(normal(1, 2, dim, *sizes))
    keep = normal(2, 2, *sizes) > -0.3 if hidden else None
    if keep is not None:
        keep[0, 0] = False  # the first cells of the row hold nothing real
    how = {"form": "tanh" if "activation" in options else "erf", "pool": options.get("pool", "raster"), "keep": keep}
    want, kernels = naive.attentive_conv(x, parts(layer), layer.kernel_size, **how)
    got = layer(x, mask=keep)
    close(layer.kernels(x, mask=keep), kernels)
    close(got, want)
    leaves_ = [x, *layer.parameters()]
    for ours, theirs in zip(gradients(got, leaves_), gradients(want, leaves_), strict=True):
        close(ours, theirs)


NAMES = {"kernel_proj": "k_proj", "x_proj": "v_proj", "proj": "o_proj", "kernel_gen": "taps"}


@pytest.mark.parametrize("case", ["c1", "c2", "c3", "c4"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("attnet_kernels", case)
    size, bias = z["kernels"].shape[-1], "p_proj.bias" in z
    layer = AttentiveConv(z["x"].shape[1], kernel_size=size, bias=bias).double()
    owned = {}
    for name, _ in layer.named_parameters():
        part, _, kind = name.partition(".")
        there = {ours: theirs for theirs, ours in NAMES.items()}.get(part, "difference_control")
        owned[name] = f"{there}.{kind}" if kind else there
    assert len(owned) == sum(k.startswith("p_") for k in z)
    layer.load_state_dict({name: z[f"p_{theirs}"] for name, theirs in owned.items()})
    (x,) = leaves(z["x"])
    close(layer.kernels(x), z["kernels"])
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    for name, p in layer.named_parameters():
        close(p.grad, z[f"g_{owned[name]}"])


def test_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    layer = AttentiveConv(64)
    assert all(abs(p.std() - 0.02) < 1e-3 for p in (layer.k_proj.weight, layer.v_proj.weight, layer.o_proj.weight))
    assert all((p.bias == 0).all() for p in (layer.k_proj, layer.v_proj, layer.o_proj, layer.taps))
    C, K = 64, 9
    assert sum(p.numel() for p in layer.parameters()) == 3 * (C * C + C) + K * K + K + C
    layer = made(3)
    torch.nn.init.zeros_(layer.inhibition)
    x = normal(1, 2, 3, 5, 5)
    free = layer.kernels(x)
    torch.nn.init.constant_(layer.inhibition, -100.0)
    uninhibited = layer.kernels(x)
    close(free, uninhibited - uninhibited.mean((2, 3), keepdim=True) / 2)


@torch.no_grad()
def test_full_inhibition_leaves_differences() -> None:
    """Kernels sum to 0: even values give nothing but at the border, where zeros come in."""
    layer = made(3)
    torch.nn.init.constant_(layer.inhibition, 100.0)
    torch.nn.init.zeros_(layer.o_proj.bias)
    x = normal(1, 2, 3, 6, 5)
    close(layer.kernels(x).sum((2, 3)), torch.zeros(2, 3, dtype=torch.float64))
    even = normal(2, 2, 3, 1, 1).expand(2, 3, 6, 5)
    out = layer(even)
    assert out[..., 1:-1, 1:-1].abs().max() < 1e-12 * out.abs().max()
    assert out.abs().max() > 0.01


def test_the_whole_picture_sets_the_sign_of_a_filter() -> None:
    """Bright pictures want the slope to the right, dark ones the slope to the left."""
    torch.manual_seed(0)
    layer = regard.create("attentive_conv", dim=1, num_heads=1, causal=False)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    sign = torch.randint(2, (256, 1, 1, 1)) * 2.0 - 1
    x = (torch.randn(256, 1, 6, 6) + sign).requires_grad_()
    wanted = (sign * (x[..., 2:] - x[..., :-2]))[:, :, 1:-1]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x)[:, :, 1:-1, 1:-1] - wanted.detach()).square().mean()
        loss.backward()
        optimizer.step()
    patches = torch.nn.functional.unfold(x.detach(), 3).mT.flatten(0, 1)
    target = wanted.detach().flatten()[:, None]
    fixed = (patches @ torch.linalg.lstsq(patches, target).solution - target).square().mean()
    assert loss < 0.1 * fixed, (float(loss), float(fixed))


def test_pictures_of_a_batch_do_not_meet() -> None:
    layer, x = made(3), normal(1, 4, 3, 5, 6)
    for b in range(4):
        close(layer(x)[b], layer(x[b : b + 1])[0])


def test_cost_is_linear_in_places() -> None:
    layer = made(4)
    small, large = normal(0, 1, 4, 8, 8), normal(0, 1, 4, 16, 32)
    taps = 2 * 4 * 9 * 9
    assert flops(lambda: layer(large)) - taps == 8 * (flops(lambda: layer(small)) - taps) > 0


@pytest.mark.parametrize("pool", ["raster", "grid"])
def test_hidden_places_are_left_out(pool: str) -> None:
    """Whatever they hold; a picture without real ones gives the bias."""
    layer, x = made(2, pool=pool), normal(1, 3, 2, 5, 4)
    keep = normal(2, 3, 5, 4) > 0
    keep[2] = False
    got = layer(x, mask=keep)
    again = layer(x.masked_fill(~keep[:, None], torch.nan), mask=keep)
    same(again, got)
    for a, b in zip(*(gradients(out, list(layer.parameters())) for out in (again, got)), strict=True):
        same(a, b)
    close(got[2], layer.o_proj.bias[:, None, None].expand(2, 5, 4))
    close(layer(x, mask=torch.ones_like(keep)), layer(x))
    with pytest.raises(ValueError, match=r"mask has the wrong shape \(got \(3, 4, 4\)\); expected \(B = 3, Y = 5,"):
        layer(x, mask=keep[:, 1:])
    with pytest.raises(TypeError, match=r"mask has the wrong dtype"):
        layer(x, mask=keep.double())


def test_cells() -> None:
    """Bands of the row, not squares; squares of the picture; overlap where nothing divides."""
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    close(cell_means(x, 3), torch.arange(1.5, 36, 4)[None, None])
    close(cell_means(x, 3, pool="grid")[0, 0], torch.tensor([3.5, 5.5, 7.5, 15.5, 17.5, 19.5, 27.5, 29.5, 31.5]))
    close(cell_means(torch.tensor([[[[0.0, 4.0]]]]), 3)[0, 0], torch.tensor([0.0] * 4 + [2.0] + [4.0] * 4))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is even \(got 4\); expected an odd int"):
        AttentiveConv(4, kernel_size=4)
    with pytest.raises(ValueError, match=r"activation is unknown \(got 'relu'\); expected one of 'gelu', 'gelu_tanh'"):
        AttentiveConv(4, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pool is unknown \(got 'max'\); expected one of 'raster', 'grid'"):
        AttentiveConv(4, pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has no pixels \(got \(2, 4, 0, 3\)\)"):
        AttentiveConv(4)(torch.zeros(2, 4, 0, 3))
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 4, Y, X\)"):
        AttentiveConv(4)(torch.zeros(2, 3, 5, 3))
    x = torch.zeros(2, 4, 5, 5)
    with pytest.raises(ValueError, match=r"kernels are of even size \(got 2\)"):
        attentive_convolution(x, torch.zeros(2, 4, 2, 2))
    with pytest.raises(
        ValueError, match=r"kernels has the wrong shape \(got \(1, 4, 3, 3\)\); expected \(B = 2, C = 4"
    ):
        attentive_convolution(x, torch.zeros(1, 4, 3, 3))
    assert AttentiveConv(4)(torch.zeros(0, 4, 5, 5)).shape == (0, 4, 5, 5)

"""DaViT's two attentions against loops, the authors' numbers (A062) and Florence-2's layers in transformers."""

import pytest
import torch
from torch import Tensor
from transformers.models.florence2 import modeling_florence2 as florence
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

import regard
from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import ChannelAttention, WindowAttention, channel_attention, window_attention
from vision.naive_davit import naive_davit_channels, naive_davit_window
from vision.shared import filled, gradients, leaves, normal, vectors


@pytest.mark.parametrize(("B", "G", "N", "C"), [(2, 3, 5, 4), (1, 1, 1, 3), (2, 2, 7, 1)])
def test_channels_equal_the_loops(B: int, G: int, N: int, C: int) -> None:
    q, k, v = leaves(*(normal(n, B, G, N, C) for n in range(3)))
    got = channel_attention(q, k, v)
    want = naive_davit_channels(*(z.transpose(1, 2) for z in (v, q, k))).transpose(1, 2)
    close(got, want)
    for g, w in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        close(g, w)


@pytest.mark.parametrize(("Y", "X", "window"), [(4, 6, 2), (3, 3, 3), (2, 3, 1)])
def test_windows_equal_the_loops(Y: int, X: int, window: int) -> None:
    q, k, v = leaves(*(normal(n, 2, 2, Y, X, 3) for n in range(3)))
    got, want = window_attention(q, k, v, window=window), naive_davit_window(q, k, v, window)
    close(got, want)
    for g, w in zip(gradients(got, [q, k, v]), gradients(want, [q, k, v]), strict=True):
        close(g, w)


def load(layer: torch.nn.Module, qkv: tuple[Tensor, Tensor], proj: tuple[Tensor, Tensor], names: str) -> None:
    """Copy a joint projection, cut in the order of `names`, and the output's."""
    parts = zip(names, qkv[0].chunk(3), qkv[1].chunk(3), strict=True)
    state = {f"{n}_proj.{kind}": z for n, w, b in parts for kind, z in (("weight", w), ("bias", b))}
    layer.load_state_dict(state | {"o_proj.weight": proj[0], "o_proj.bias": proj[1]})


@pytest.mark.parametrize("case", ["channel", "window"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Their channel attention calls q what is multiplied last."""
    z = vectors("A062", case)
    M = z["x"].shape[-1]
    layer = ChannelAttention(M, int(z["groups"])) if case == "channel" else WindowAttention(M, 2, window=int(z["size"]))
    layer = layer.double()
    qkv, proj = ((z[f"p_{n}.weight"], z[f"p_{n}.bias"]) for n in ("qkv", "proj"))
    load(layer, qkv, proj, "vqk" if case == "channel" else "qkv")
    (x,) = leaves(z["x"])
    out = layer(x.movedim(-1, 1)).movedim(1, -1)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


@pytest.mark.parametrize("kind", ["Channel", "Window"])
def test_gives_florences_numbers(kind: str) -> None:
    """Its channel attention divides by the root of the number of tokens, and has the usual names."""
    config = Florence2VisionConfig(embed_dim=(12,), num_heads=(3,), num_groups=(3,), window_size=3, qkv_bias=True)
    config._attn_implementation = "eager"
    theirs = filled(getattr(florence, f"Florence2Vision{kind}Attention")(config, 0))
    ours = regard.convert_layer(theirs)
    x = normal(5, 2, 4, 5, 12)
    want = theirs(x.flatten(1, 2) if kind == "Channel" else x)
    torch.testing.assert_close(ours(x.movedim(-1, 1)).flatten(2).mT, want.reshape(2, 20, 12), rtol=1e-5, atol=1e-6)


def test_channels_see_the_whole_image_and_windows_only_their_own() -> None:
    for layer, everything in ((ChannelAttention(6, 2), True), (WindowAttention(6, 2, window=2), False)):
        layer = filled(layer)
        (x,) = leaves(normal(6, 1, 6, 4, 4))
        seen = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)[0].ne(0).any(1)[0]
        want = torch.ones(4, 4, dtype=torch.bool)
        want[2:], want[:, 2:] = everything, everything
        want[:2, :2] = True
        assert torch.equal(seen, want)


def test_channels_know_no_order_of_pixels_and_one_channel_alone_is_its_value() -> None:
    layer = filled(ChannelAttention(6, 3))
    x, order = normal(7, 2, 6, 20), torch.randperm(20)
    close(layer(x[..., order]), layer(x)[..., order])
    q, k, v = (normal(n, 2, 6, 20, 1) for n in range(3))
    close(channel_attention(q, k, v), v)


@pytest.mark.parametrize("kind", ["channel", "window"])
def test_cost_is_linear_in_pixels(kind: str) -> None:
    layer = filled(ChannelAttention(8, 2) if kind == "channel" else WindowAttention(8, 2, window=4))
    small, large = normal(0, 1, 8, 8, 8), normal(0, 1, 8, 16, 32)
    assert flops(lambda: layer(large)) == 8 * flops(lambda: layer(small)) > 0


@pytest.mark.parametrize(("Y", "X", "window"), [(3, 5, 7), (3, 5, 4), (6, 2, 3)])
def test_windows_wider_than_the_map_hold_its_zeros(Y: int, X: int, window: int) -> None:
    layer, (x,) = filled(WindowAttention(6, 2, window=window)), leaves(normal(0, 2, 6, Y, X))
    laid_out = torch.nn.functional.pad(x, (0, -X % window, 0, -Y % window))
    got, want = layer(x), layer(laid_out)[..., :Y, :X]
    close(got, want)
    wanted = [x, *layer.parameters()]
    for g, w in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        close(g, w)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        ChannelAttention(7, 2)
    with pytest.raises(ValueError, match=r"window is too small \(got 0\)"):
        WindowAttention(6, 2, window=0)
    with pytest.raises(ValueError, match=r"scale is unknown \(got 'none'\); expected one of 'channels', 'tokens'"):
        ChannelAttention(6, 2, scale="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 6, 5\)\); expected \(B, M = 6, Y, X\)"):
        WindowAttention(6, 2)(normal(0, 2, 6, 5))
    for shape in ((2, 6), (2, 5, 4)):
        with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, M = 6, X, \*sizes\)"):
            ChannelAttention(6, 2)(normal(0, *shape))

"""Polarized self-attention against loops over pixels, and two public implementations' numbers (A024)."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from laws.measured import flops
from regard.laws.agreement import close, same
from regard.vision import PolarizedAttention
from vision.naive_polarized import naive_polarized
from vision.shared import filled, gradients, leaves, normal, vectors

FORMS = {
    ("paper", "parallel"): "A",
    ("paper", "sequential"): "A",
    ("code", "parallel"): "P",
    ("code", "sequential"): "S",
}
every_form = pytest.mark.parametrize(("form", "layout"), FORMS)


def affine(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight[..., 0] if isinstance(layer, nn.Conv1d) else layer.weight
    return weight, layer.bias


def oracle(layer: PolarizedAttention, x: Tensor) -> Tensor:
    up = [affine(part) for part in layer.up if not isinstance(part, nn.ReLU)]
    gates = [affine(z) for z in (layer.channel_query, layer.channel_value, layer.spatial_query, layer.spatial_value)]
    form = FORMS[layer.form, layer.layout]
    return naive_polarized(x, *gates[:2], up, *gates[2:], form, layer.layout)


@every_form
@pytest.mark.parametrize("sizes", [(3, 2), (1, 4), (1, 1)])
def test_equals_the_loops(form: str, layout: str, sizes: tuple[int, int]) -> None:
    layer = filled(PolarizedAttention(8, layout=layout, form=form))
    (x,) = leaves(normal(1, 2, 8, *sizes))
    inputs = [x, *layer.parameters()]
    got, want = layer(x), oracle(layer, x)
    close(got, want)
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


NAMES = {
    "psa": {
        "conv_q_right": "channel_query",
        "conv_v_right": "channel_value",
        "conv_q_left": "spatial_query",
        "conv_v_left": "spatial_value",
        "conv_up": "up",
    },
    "tp": {
        "ch_wq": "channel_query",
        "ch_wv": "channel_value",
        "sp_wq": "spatial_query",
        "sp_wv": "spatial_value",
        "ch_wz": "up.0",
        "ln": "up.1",
    },
}


@pytest.mark.parametrize(
    ("case", "form", "layout"),
    [
        ("psa_p", "code", "parallel"),
        ("psa_s", "code", "sequential"),
        ("tp_par", "paper", "parallel"),
        ("tp_seq", "paper", "sequential"),
    ],
)
def test_gives_the_published_codes_numbers(case: str, form: str, layout: str) -> None:
    z = vectors("A024", case)
    layer = PolarizedAttention(z["x"].shape[1], layout=layout, form=form).double()
    state = layer.state_dict()
    for key, value in z.items():
        if key.startswith("p_"):
            first, _, rest = key.removeprefix("p_").partition(".")
            name = NAMES[case.split("_")[0]][first]
            name = f"{name}.{rest}" if case != "psa_p" or name != "up" else f"up.0.{rest}"
            state[name] = value.reshape(state[name].shape)
    layer.load_state_dict(state)
    (x,) = leaves(z["x"])
    out = layer(x)
    close(out, z["out"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


@every_form
def test_permuting_pixels_permutes_outputs(form: str, layout: str) -> None:
    layer = filled(PolarizedAttention(8, layout=layout, form=form))
    x, order = normal(2, 2, 8, 15), torch.randperm(15)
    close(layer(x)[..., order], layer(x[..., order]))
    close(layer(x.unflatten(2, (3, 5))).flatten(2), layer(x))


def test_both_layouts_start_alike() -> None:
    """With the same parameters, the outputs of the two layouts correlate closely."""
    parallel, sequential = (filled(PolarizedAttention(8, layout=n)) for n in ("parallel", "sequential"))
    sequential.load_state_dict(parallel.state_dict())
    x = normal(3, 2, 8, 6, 6)
    both = torch.stack([parallel(x).flatten(), sequential(x).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_gates_are_gates_and_the_codes_spatial_gate_is_nearly_constant() -> None:
    """A softmax over N positions inside a sigmoid leaves 1/2 + 1/(4 N); the paper's gate takes its full range."""
    z = normal(4, 2, 8, 400)
    code, paper = (filled(PolarizedAttention(8, form=form)) for form in ("code", "paper"))
    assert code.channel_gate(z).shape == (2, 8, 1)
    gate = code.spatial_gate(z)
    assert gate.shape == (2, 1, 400)
    assert ((gate - 0.5).sum(-1) - 0.25).abs().max() < 0.02
    assert paper.spatial_gate(z).std() > 3 * gate.std()
    for g in (gate, paper.spatial_gate(z), paper.channel_gate(z)):
        assert (g > 0).all()
        assert (g < 1).all()


def test_inputs_are_left_alone_and_channels_last_is_the_same() -> None:
    layer = filled(PolarizedAttention(8))
    x = normal(5, 2, 8, 3, 4)
    close(layer(x.to(memory_format=torch.channels_last)), layer(x))
    same(x, normal(5, 2, 8, 3, 4))


@every_form
def test_cost_is_linear_in_pixels(form: str, layout: str) -> None:
    """What is done to the pooled channels does not grow at all, hence differences."""
    layer = filled(PolarizedAttention(8, layout=layout, form=form))
    one, two, three = (flops(partial(layer, normal(0, 1, 8, 8, width))) for width in (8, 16, 24))
    assert three - two == two - one > 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"dim can't be divided so \(got 7\); expected a multiple of 2"):
        PolarizedAttention(7)
    with pytest.raises(ValueError, match=r"dim can't be divided so \(got 12\); expected a multiple of 8"):
        PolarizedAttention(12, form="code", layout="sequential")
    with pytest.raises(ValueError, match=r"layout is unknown \(got 'both'\)"):
        PolarizedAttention(8, layout="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"form is unknown \(got 'A'\)"):
        PolarizedAttention(8, form="A")  # type: ignore[arg-type]
    for shape in ((2, 6, 3, 3), (2, 8)):
        with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, M = 8, X, \*sizes\)"):
            PolarizedAttention(8)(normal(0, *shape))

"""The attention classes of Cait, EVA, DaViT, MaxxViT and GCViT, against numbers of timm 1.0.31's own, and torch.fx."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.integrations.naive_timm import CLASSES
from torch import Tensor, fx, nn

import regard
from regard.integrations.timm import KINDS, replace
from regard.integrations.timm import Attention as OurAttention

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "timm_classes.npz")


def vectors(name: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{name}/{kind}"
    return {n.removeprefix(prefix): torch.from_numpy(VECTORS[n]) for n in VECTORS.files if n.startswith(prefix)}


def naive(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A layer with timm's weights, and what it is called with."""
    layer = CLASSES[name]().double().eval()
    layer.load_state_dict(vectors(name, "state/"))
    return layer, list(vectors(name, "input").values())


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.attn(*inputs)


def swapped(name: str, mechanism: object = "softmax", **options: object) -> tuple[Holder, list[Tensor]]:
    layer, inputs = naive(name)
    model = Holder(layer)
    assert replace(model, mechanism, **options) == ["attn"]
    assert type(model.attn) is KINDS[name.partition("/")[0]]
    return model, inputs


@pytest.mark.parametrize("name", CLASSES)
def test_weights_load_strictly_and_give_timm_s_outputs(name):
    y = torch.from_numpy(VECTORS[f"{name}/y"])
    layer, inputs = naive(name)
    torch.testing.assert_close(layer(*inputs), y)
    model, _ = swapped(name)
    torch.testing.assert_close(model(*inputs), y)
    assert list(model.attn.state_dict()) == list(layer.state_dict())


def test_every_class_is_tried():
    assert {name.partition("/")[0] for name in CLASSES} == KINDS.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_are_the_layer_s_own(name):
    layer, inputs = naive(name)
    model, _ = swapped(name)
    grads = []
    for module in (layer, model.attn):
        x = inputs[0].clone().requires_grad_()
        module(x, *inputs[1:]).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for theirs, ours in zip(*grads, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith(("Eva", "AttentionRope"))])
def test_masks_of_layers_that_take_them(name):
    layer, inputs = naive(name)
    model, _ = swapped(name)
    x, rope = inputs[0], inputs[1] if len(inputs) > 1 else None
    added = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    for options in ({"attn_mask": added}, {"attn_mask": added[0, 0] > -1}, {"is_causal": True}, {}):
        if options.get("attn_mask") is not None and options["attn_mask"].dtype == torch.bool:
            options["attn_mask"][:, 0] = True
        torch.testing.assert_close(model.attn(x, rope, **options), layer(x, rope, **options))
    for wrong, said in (
        (torch.ones(5, 6).bool(), "does not broadcast"),
        (torch.ones(1, 1, 1, 6, 6), "does not broadcast"),
        (torch.ones(6, 6).long(), "has the wrong dtype"),
        ([[True]], "has the wrong type"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"Attention: attn_mask {said}"):
            model.attn(x, rope, wrong)


@pytest.mark.parametrize("name", CLASSES)
def test_mechanisms_change_what_they_should(name):
    model, inputs = swapped(name, "entmax")
    softmax, _ = swapped(name)
    assert (model(*inputs) - softmax(*inputs)).abs().max() > 1e-6
    again = Holder(model.attn)
    assert replace(again, "softmax") == ["attn"]
    torch.testing.assert_close(again(*inputs), softmax(*inputs))


def test_mechanisms_that_cannot_serve_are_refused():
    for name, mechanism, said in (
        ("ClassAttn", "alibi", "ClassAttn: mechanism asks where queries and keys stand"),
        ("ChannelAttention", regard.masks.window(2), "ChannelAttention: mechanism asks where"),
        ("ChannelAttentionV2/tokens", "gated", "ChannelAttentionV2: mechanism has a gate that reads tokens"),
        ("TalkingHeadAttn", "mta", "TalkingHeadAttn: mechanism maps scores or weights across heads"),
        ("EvaAttention/fused", "rotary", "before rotation"),
    ):
        layer, _ = naive(name)
        model = Holder(layer)
        with pytest.raises(ValueError, match=f"replace: attn: .*{said}.*; nothing was replaced"):
            replace(model, mechanism)
        assert model.attn is layer


def test_a_window_in_talking_heads_hides_what_it_hides():
    """The map of the weights has a bias, which must not give a hidden key any."""
    model, (x,) = swapped("TalkingHeadAttn", regard.masks.window(1))
    other = x.clone()
    other[:, 0] += 1.0
    assert torch.equal(model(x)[:, 1:], model(other)[:, 1:])


@pytest.mark.parametrize("name", CLASSES)
def test_fx_traces_a_model_that_holds_one(name):
    model, inputs = swapped(name)
    flat = fx.symbolic_trace(Called(model.attn, len(inputs)))
    torch.testing.assert_close(flat(*inputs), model(*inputs), rtol=0, atol=0)
    assert {n for n, _ in flat.named_parameters()} == {n for n, _ in model.named_parameters()}
    shorter = copy.deepcopy(flat)
    x = inputs[0][:1]
    if len(inputs) == 1 and name not in ("WindowAttentionGlobal/local",):
        torch.testing.assert_close(shorter(x), model(x))


class Called(Holder):
    """With as many arguments as it says: fx takes those that might be left out for given."""

    def __init__(self, attn: nn.Module, count: int) -> None:
        super().__init__(attn)
        self.count = count

    def forward(self, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        return self.attn(*(x, y, z)[: self.count])


@pytest.mark.parametrize("mechanism", ["softmax", "entmax", "gated"])
@pytest.mark.parametrize("gated", [False, True])
def test_fx_traces_the_drop_in_itself(gated, mechanism):
    layer = OurAttention(12, 3, qkv_bias=True, qk_norm=True, gated=gated, norm_layer=nn.LayerNorm, attn_drop=0.5,
                         mechanism=mechanism).double()  # fmt: skip
    flat, x = fx.symbolic_trace(layer), torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.rand(2, 1, 6, 6) < 0.5
    for module in (layer.eval(), flat.eval()):
        assert not module.training
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
        assert torch.equal(flat(x, **options), layer(x, **options))
    assert {n for n, _ in flat.named_parameters()} == {n for n, _ in layer.named_parameters()}
    outs = []
    for module in (layer.train(), flat.train()):
        torch.manual_seed(0)
        outs.append(module(x))
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], layer.eval()(x)), "training drops weights"
    longer = torch.randn(1, 9, 12, dtype=torch.float64)
    assert torch.equal(flat.eval()(longer), layer(longer))


@pytest.mark.parametrize("name", ["TalkingHeadAttn", "WindowAttention", "AttentionCl/first"])
def test_half_precision_under_autocast(name):
    """Norms and projections leave dtypes that differ; they meet before the kernel."""
    model, inputs = swapped(name)
    model, inputs = model.float(), [z.float() for z in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*inputs).dtype == torch.bfloat16
    layer = OurAttention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 6, 12)).dtype == torch.bfloat16


def test_classes_of_the_same_name_and_other_parts_are_left():
    class WindowAttention(CLASSES["WindowAttention"]):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="has no timm Attention layers"):
        replace(Holder(WindowAttention()), "softmax")


def test_layers_that_compute_something_else_are_refused():
    layer, _ = naive("ChannelAttention")
    layer.forward = lambda x: x  # type: ignore[method-assign]
    model = Holder(layer)
    with pytest.raises(ValueError, match="attn does not compute what timm's ChannelAttention does"):
        replace(model, "softmax")
    assert model.attn is layer

"""Both directions of `supports`: what a card claims works, what it does not claim is refused by name."""

import pytest
import torch

import regard
from laws.subject import ALL, DIM, HEADS, B, T, build, causalities, crossings, inputs, law, takes, tokens
from regard import masks


def lacks(feature: str):
    return {"where": lambda card: feature not in card.supports}


def create(name: str, **settings):
    options = {**regard.card(name).example, **settings}
    return regard.create(name, dim=DIM, num_heads=HEADS, **options)


@law("supported")
def test_claims_work(name: str) -> None:
    supports = regard.card(name).supports
    assert supports & {"causal", "bidirectional"}
    for causal in causalities(name):
        module, x = build(name, causal=causal), tokens()
        assert module(x).shape == x.shape
        if "cross" in supports and causal in crossings(name):
            assert module(x, tokens(B, 7)).shape == x.shape
        if "padding" in supports:
            keep = torch.arange(T) < T - 2
            with_pads = module(x, mask=masks.padding(keep.expand(B, T)))
            assert not torch.allclose(with_pads[:, -1], module(x)[:, -1]), "the padding mask changes nothing"
        if "mask" in supports:
            allowed = torch.eye(T, dtype=torch.bool)[None, None]
            assert not torch.allclose(module(x, mask=allowed)[:, -1], module(x)[:, -1]), "the mask changes nothing"
    if "gqa" in supports:
        assert build(name, **({} if "gqa" in name or "mqa" in name else {"num_kv_heads": 2}))(x).shape == x.shape
    if "streaming" in supports:
        assert "causal" in supports, "only what is causal can stream"
        assert hasattr(module, "step")


@law("supported", **lacks("causal"))
def test_not_causal(name: str) -> None:
    with pytest.raises(ValueError, match="causal"):
        create(name, causal=True)


@law("supported", **lacks("bidirectional"))
def test_not_bidirectional(name: str) -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        create(name, causal=False)


@law("supported", **lacks("gqa"))
def test_not_grouped(name: str) -> None:
    with pytest.raises(ValueError, match="gqa"):
        build(name, num_kv_heads=2)


@law("supported", **lacks("dropout"))
def test_no_dropout(name: str) -> None:
    with pytest.raises(ValueError, match="dropout"):
        build(name, dropout=0.1)


@law("supported", **lacks("cross"))
def test_not_across(name: str) -> None:
    module = build(name)
    with pytest.raises(ValueError if takes(module, "context") else TypeError, match=r"cross|context|argument"):
        module(tokens(), tokens(B, 7))


@law("supported", **lacks("padding"))
def test_no_padding(name: str) -> None:
    module = build(name)
    with pytest.raises(ValueError if takes(module, "mask") else TypeError, match=r"mask|padding"):
        module(tokens(), mask=masks.padding(torch.ones(B, T, dtype=torch.bool)))


@law("supported", **lacks("mask"))
def test_no_mask(name: str) -> None:
    """Neither as a tensor nor as a Mask that hides more than padding."""
    module = build(name)
    for mask in (torch.ones(1, 1, T, T, dtype=torch.bool).tril(), masks.window(3)):
        with pytest.raises(ValueError if takes(module, "mask") else TypeError, match="mask"):
            module(tokens(), mask=mask)


@law("supported", **lacks("streaming"))
def test_no_stream(name: str) -> None:
    module = build(name)
    if hasattr(module, "init_state"):
        with pytest.raises(ValueError, match="streaming"):
            module.init_state(B, T)


@law("supported", needs="causal streaming bidirectional", pipeline=True)
def test_only_causal_layers_stream(name: str) -> None:
    with pytest.raises(ValueError, match="causal"):
        build(name, causal=False).init_state(B, T)


@law("supported", protocols=ALL)
def test_output_of_the_protocol(name: str) -> None:
    module, given = build(name), inputs(name)
    protocol, out = regard.card(name).protocol, module(*given)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == given[0].dtype
    if protocol == "Loss":
        assert out.shape == ()
    elif protocol == "Pooler":
        assert out.shape == (B, DIM)
    elif protocol == "Pointer":
        assert out.shape == (*given[0].shape[:2], given[1].shape[1])
        torch.testing.assert_close(out.exp().sum(-1), torch.ones(out.shape[:2], dtype=out.dtype))
    else:
        assert out.shape == given[0].shape


@law("supported", protocols=ALL, where=lambda card: card.protocol != "Loss")
def test_wrong_inputs_are_refused(name: str) -> None:
    """Too narrow, or without a batch: a ValueError that says the shape it got."""
    module, (x, *rest) = build(name), inputs(name)
    narrow = x[:, :-1] if regard.card(name).protocol == "FeatureMixer" else x[..., :-1]
    for wrong in (narrow, x[0]):
        with pytest.raises(ValueError, match=r"expected|must be") as error:
            module(wrong, *rest)
        assert str(tuple(wrong.shape)) in str(error.value)

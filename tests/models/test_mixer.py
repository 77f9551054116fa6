"""Mechanisms as people write them."""

import pytest

from regard.models.mixer import Spec, build, parse, protocol, split


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("softmax", Spec("softmax")),
        (" gated+rotary ", Spec("gated+rotary")),
        ("window(window=64)", Spec("window", {"window": 64})),
        ("x(a=1.5, b='c', d=(1, 2), e=True)", Spec("x", {"a": 1.5, "b": "c", "d": (1, 2), "e": True})),
        ("my.module:Mixer(rank=4)", Spec("my.module:Mixer", {"rank": 4})),
    ],
)
def test_a_spec_is_read_and_written(text, spec):
    assert parse(text) == spec
    assert parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["", "x(", "x(3)", "x(a=b)", "x(a=f())", "x(**a)", "x)y", "a b", "x(a=1)+y", "../x"])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match="cannot be read"):
        parse(text)


def test_commas_in_brackets_do_not_split():
    assert split("softmax, window(window=4, dilation=2),,alibi") == [
        "softmax",
        "window(window=4, dilation=2)",
        "alibi",
    ]


def test_own_mechanisms_are_imported_and_a_missing_one_is_named():
    assert type(build(parse("torch.nn:Identity"), 8, 2)).__name__ == "Identity"
    with pytest.raises(ValueError, match=r"no_such_module"):
        build(parse("no_such_module:Mixer"), 8, 2)
    with pytest.raises(ValueError, match=r"NoSuchMixer"):
        build(parse("torch.nn:NoSuchMixer"), 8, 2)


def test_what_is_built_is_causal_unless_told_otherwise():
    assert build(parse("gated+rotary"), 8, 2).causal
    assert not build(parse("gated+rotary"), 8, 2, causal=False).causal


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("gated+rotary", "TokenMixer"),
        ("polarized", "FeatureMixer"),
        ("torch.nn:Identity", "TokenMixer"),
        ("stubs:Mapped", "FeatureMixer"),
    ],
)
def test_protocols_are_told_by_cards_and_by_the_callers_own(text, kind, monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent.parent / "bench")
    assert protocol(parse(text)) == kind

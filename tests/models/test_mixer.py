"""Mechanisms as people write them."""

import random
import re

import pytest

import regard
from regard import catalog
from regard.models.mixer import Part, Spec, Stack, build, parse, parse_stack, protocol, split
from regard.spec import single


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("softmax", [Part("softmax")]),
        (" gated + rotary ", [Part("gated"), Part("rotary")]),
        ("window(window=64)", [Part("window", {"window": 64})]),
        ("x(a=1.5, b='c', d=(1, 2), e=True)", [Part("x", {"a": 1.5, "b": "c", "d": (1, 2), "e": True})]),
        ("my.module:Mixer(rank=4)", [Part("my.module:Mixer", {"rank": 4})]),
        ("x(a=1)+y", [Part("x", {"a": 1}), Part("y")]),
        ("x(a=1)+y(a=2, b=(3,))+z()", [Part("x", {"a": 1}), Part("y", {"a": 2, "b": (3,)}), Part("z")]),
        ("x(a=')+(', b=\"'\", c='\\'+')+y", [Part("x", {"a": ")+(", "b": "'", "c": "'+"}), Part("y")]),
    ],
)
def test_a_spec_is_read_and_written(text, spec):
    assert parse(text) == Spec(tuple(spec))
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "x(", "x(3)", "x(a=b)", "x(a=f())", "x(**a)", "x)y", "a b", "../x", "+", "x+", "+x", "x++y", "a.b:C+x"],
)
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(ValueError, match="cannot be read"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "x(a=1)()",
        "x(a=1)(a=2)",
        "x(a=1).y(a=2)",
        "x(a=1, a=2)",
        "x(a=1) # (a=2)",
        "x(a=1)\n(a=2)",
        "x(a=1)[0]",
        "x(a=1e999)",
        "x(a=(1, -1e999))",
        "x(a={1: 2, 1: 3})",
        "x(a={1: 2, True: 3})",
        "x(a=1 # a=2\n)",
        "x\n(a=1)",
        "x(a=--1)",
        "x(a=1+1j)",
        "x(a=...)",
    ],
)
def test_nothing_that_is_written_is_dropped(text):
    """What would be read as another configuration than is written is refused."""
    with pytest.raises(ValueError, match="cannot be read"):
        parse(text)


@pytest.mark.parametrize(
    "text", ["x(a=" + "-" * 50_000 + "1)", "x(a=" + "1+" * 5_000 + "1)", "x(a=" + "(" * 5_000, "x" + "()" * 5_000]
)
def test_however_deep_it_is_refused_in_one_short_line(text):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        parse(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("window(window=64)()", r"at character 18: '\(\)' follows the bracket"),
        ("window(window=64)(window=8)", r"at character 18: '\(window=8\)' follows the bracket"),
        ("x(a=')')y(b=2)", r"at character 9: .y\(b=2\). follows the bracket"),
        ("gated+window(window=4, window=5)", "at character 24: window stands here twice"),
        ("x(a=1)+y(ä='é', b=z)", "at character 19: no such value"),
        ("x(a=1", r"at character 6: '\)' is missing"),
        ("x(a=1))", r"at character 7: '\)' closes nothing"),
        ("x(a='1)", 'at character 8: "\'" is missing'),
        ("x + 3y", "at character 5: '3y' is no name"),
        ("x+", "at character 3: a name is missing"),
        ("x(1)", "at character 3: a value without the name of its option"),
        ("x(**a)", r"at character 3: '\*\*' is no option"),
        ("x(a=1 b=2)", "at character [5-9]: "),
        ("a.b:C+x", "at character 1: the caller's own is joined to nothing"),
        ("x" * 5000, "at character 4097: it is longer than 4096 characters"),
        ("x(a=" + "(" * 50, "at character 20: brackets are deeper than 16"),
        ("x(a='\ud800')", "at character 6: '.ud800' says nothing here"),
    ],
)
def test_a_refusal_says_where_and_why(text, where):
    with pytest.raises(ValueError, match=where) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_whatever_is_written_is_read_as_it_stands_or_refused():
    """Random texts of all that means something here: what is printed of one is read as the same, and printed so."""
    draw, read, several = random.Random(0), 0, 0
    words = [*"a=()[]{},:+-10.#'*fj\n\0\\ "]
    words += ["b=", "True", "None", "(a=1)", "(b='+')", "x", "é", "1e999", "e9", "r'", "0x1"]
    words += ["{1:2}", "(3,)", "+y(c='\"')", "*2", "*1+", "(x+y)*3"]
    for _ in range(25_000):
        text = "".join(draw.choices(words, k=draw.randrange(1, 10)))
        if draw.random() < 0.7:
            text = f"x({draw.choice(('', 'a=', 'a=1, b='))}{text}){draw.choice(('', '', '*2', '*1+(y+z)'))}"
        try:
            spec = parse_stack(text)
        except ValueError as refused:
            said = str(refused)
        else:
            said, read, several = "", read + 1, several + isinstance(spec, Stack)
            assert repr(parse_stack(str(spec))) == repr(spec)
            assert str(parse_stack(str(spec))) == str(spec)
            assert isinstance(spec, Stack) or parse(str(spec)) == spec
            parts = sum(bool(part.options) for kind in spec.kinds for part in kind.parts)
            assert sum(map(text.count, "()")) >= 2 * parts
        shape = r"^mechanism cannot be read \(got .*\); at character \d+: .*; expected "
        assert not said or re.search(shape, said), said
    assert read > 500
    assert several > 50


def test_a_task_is_one_name():
    assert single("mqar(pairs=(1, 2))", "task") == Part("mqar", {"pairs": (1, 2)})
    with pytest.raises(ValueError, match=r"task cannot be joined by '\+' \(got 'mqar\+text'\)"):
        single("mqar+text", "task")


def test_options_are_those_of_the_part_that_they_stand_behind():
    made = regard.create("window(window=32)+rotary(base=500)", dim=8, num_heads=2, causal=True)
    assert (repr(made.mask), made.position.base, made.name) == ("window(32)", 500, "window+rotary")
    assert build(parse("window(window=5)+rotary"), 8, 2).position.base == catalog.card("rotary").options["base"]
    assert regard.create("window+rotary(base=7)", dim=8, num_heads=2, window=3).mask.reach == 3


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        (
            "window(window=4)+rotary(window=5)",
            {},
            r"'rotary' has no such option \(got 'window'\); expected one of base, ",
        ),
        ("window(window=4)+rotary", {"window": 5}, "'window' of 'window' is said twice"),
        ("gated(kernel='eager')+rotary(kernel='sdpa')", {}, "'kernel' of 'rotary' is said twice"),
        ("gated(causal=True)", {}, r"'gated' has no such option \(got 'causal'\)"),
        ("gated(dropout=0.5)", {"dropout": 0.1}, "dropout is said twice"),
        ("gated(dropout='much')", {}, "dropout has the wrong type"),
        ("window(window=4)+window(window=5)", {}, "both fill the slot 'mask'"),
    ],
)
def test_what_two_places_say_is_refused(text, settings, said):
    with pytest.raises((ValueError, TypeError), match=said):
        regard.create(text, dim=8, num_heads=2, **settings)


def test_every_way_to_give_options_gives_the_same():
    """Written behind the name or given beside it: of each card that can be built from its example."""
    checked = 0
    for card in catalog.cards().values():
        part = Part(card.name, dict(card.example))
        if not card.is_part or not card.example:
            continue
        assert parse(str(part)).parts == (part,), card.name
        beside = regard.create(card.name, dim=24, num_heads=6, causal="causal" in card.supports, **card.example)
        written = regard.create(str(part), dim=24, num_heads=6, causal="causal" in card.supports)
        shapes = [{n: p.shape for n, p in made.named_parameters()} for made in (beside, written)]
        assert shapes[0] == shapes[1], card.name
        assert repr(beside) == repr(written), card.name
        checked += 1
    assert checked > 10


def test_a_swap_reads_the_same():
    from regard.integrations.torch_mha import MultiheadAttention

    made = MultiheadAttention(8, 2, mechanism="entmax(alpha=1.25)+gated")
    assert made.parts.normalizer.alpha == 1.25
    with pytest.raises(ValueError, match=r"swap: 'entmax' has no such option \(got 'alhpa'\); .*did you mean 'alpha'"):
        MultiheadAttention(8, 2, mechanism="entmax(alhpa=1.25)")


def test_commas_in_brackets_do_not_split():
    assert split("softmax, window(window=4, dilation=2),,alibi") == [
        "softmax",
        "window(window=4, dilation=2)",
        "alibi",
    ]
    assert split("x(a=1, b=(2, 3)), y(c=')', d=[4, 5]),z") == ["x(a=1, b=(2, 3))", "y(c=')', d=[4, 5])", "z"]


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

"""Models whose layers differ: what is written is what stands in each layer, and nothing else is read."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import regard
from regard import models
from regard.models.checkpoint import load, save
from regard.models.lm import LMConfig, language_model
from regard.models.mixer import Spec, Stack, build, parse, parse_stack

SIZES = {"dim": 16, "num_heads": 2, "causal": True}
SMALL = LMConfig("linear*2+rotary", dim=16, depth=4, num_heads=2, mlp_dim=20, length=12)
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


@pytest.mark.parametrize(
    ("text", "normal", "layers"),
    [
        ("linear*3+softmax", "linear*3+softmax", "linear linear linear softmax"),
        ("softmax*1+window*1", "softmax*1+window*1", "softmax window"),
        ("softmax + window * 1", "softmax*1+window*1", "softmax window"),
        ("gated+rotary*2", "gated+rotary*2", "gated rotary rotary"),
        (
            "(gated+rotary)*2+window(window=64)",
            "(gated+rotary)*2+window(window=64)",
            "gated+rotary gated+rotary window",
        ),
        (" ( gated + rotary ) *1+ (entmax)", "(gated+rotary)*1+entmax*1", "gated+rotary entmax"),
        ("linear*1+linear*2+softmax", "linear*3+softmax", "linear linear linear softmax"),
        ("softmax*2", "softmax*2", "softmax softmax"),
        ("a.b:C(x='*(')*2+softmax", "a.b:C(x='*(')*2+softmax", "a.b:C a.b:C softmax"),
        ("x(a=1)*1+x(a=True)*1+x(a=1.0)", "x(a=1)*1+x(a=True)*1+x(a=1.0)*1", "x x x"),
    ],
)
def test_a_pattern_is_read_and_written(text, normal, layers):
    found = parse_stack(text)
    assert isinstance(found, Stack)
    assert str(found) == normal
    assert repr(parse_stack(normal)) == repr(found)
    assert [spec.name for spec in found.pattern] == layers.split()


@pytest.mark.parametrize("text", ["softmax", "gated+rotary", "window(window=64)", "a.b:C(x='*')", "x(a=1)+y"])
def test_what_has_no_number_of_layers_stays_one_layer(text):
    assert parse_stack(text) == parse(text)
    assert parse_stack(text).layers(3) == [parse(text)] * 3


def test_one_layer_of_a_mechanism_is_the_mechanism():
    assert parse_stack("softmax*1") == parse_stack("(softmax)*1") == parse("softmax")
    assert parse_stack("(gated+rotary)*1") == parse("gated+rotary")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x*", "at character 3: a number is missing"),
        ("x*+y", "at character 3: a number is missing"),
        ("*3", "at character 1: a name is missing"),
        ("x*0", "at character 3: '0' is no number of layers"),
        ("x* 03", "at character 4: '03' is no number of layers"),
        ("x*-1", "at character 3: '-1' is no number of layers"),
        ("x*1.5", "at character 3: '1.5' is no number of layers"),
        ("x*2 3", "at character 3: '2 3' is no number of layers"),
        ("x*\N{ARABIC-INDIC DIGIT THREE}", "at character 3: .* is no number of layers"),
        ("x*2*3", r"at character 4: '\*' stands here twice"),
        ("x**2", r"at character 3: '\*' stands here twice"),
        ("x*2+", "at character 5: a name is missing"),
        ("x*2(a=1)", r"at character 3: '2\(a=1\)' is no number of layers"),
        ("(a+b)(c=1)*2", r"at character 6: '\(c=1\)' follows the bracket"),
        ("(a+b)c*2", "at character 6: 'c' follows the bracket"),
        ("((a+b))*2", "at character 2: a name is missing"),
        ("()*2", "at character 2: a name is missing"),
        ("(a*2+b)*3", "at character 3: layers are repeated outside brackets"),
        ("y+(a.b:C+x)*2", "at character 4: the caller's own is joined to nothing"),
        ("x*1024+y", "at character 8: the layers are more than 1024"),
        ("x*1025", "at character 3: the layers are more than 1024"),
        ("x*99999999999999999999", "at character 3: the layers are more than 1024"),
        ("(a+b", r"at character 5: '\)' is missing"),
        ("(linear+softmax)", r"at character 1: a name is missing; .* layers as in '\(gated\+rotary\)\*2\+softmax'"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused_where_it_is_wrong(text, where):
    with pytest.raises(ValueError, match=f"mechanism cannot be read .*{where}") as caught:
        parse_stack(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["linear*3+softmax", "softmax*1"])
def test_where_one_layer_is_meant_several_are_refused(text):
    said = f"mechanism is several layers (got {text!r}); expected one, such as {text.partition('*')[0]!r}; "
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)
    with pytest.raises(ValueError, match="mechanism is several layers"):
        regard.create(text, **SIZES)


# --- down a model


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(3, "linear linear softmax"), (6, "linear linear softmax " * 2), (5, "linear linear softmax linear linear")],
)
def test_the_pattern_repeats_down_the_model_and_its_last_repetition_may_be_cut(depth, layers):
    stack = parse_stack("linear*2+softmax")
    assert [spec.name for spec in stack.layers(depth)] == layers.split()
    cut = "linear*2+softmax is cut at 5 layers, which are linear*2+softmax+linear*2"
    assert stack.cut(depth) == (cut if depth == 5 else "")


@pytest.mark.parametrize("depth", [1, 2])
def test_fewer_layers_than_the_pattern_has_are_refused(depth):
    said = rf"linear\*2\+softmax: depth is less than the 3 layers of the pattern \(got {depth}\); expected an int >= 3"
    with pytest.raises(ValueError, match=said):
        models.layers("linear*2+softmax", depth=depth, **SIZES)
    with pytest.raises(ValueError, match=said):
        language_model(replace(SMALL, mechanism="linear*2+softmax", depth=depth))


def test_each_layer_is_what_was_asked_for():
    """As if each had been made by itself, in that order: its kind, its window, its positions, its starting values."""
    text = "linear*1+(window(window=5)+rotary(base=500))*2+rotary(base=7)"
    torch.manual_seed(0)
    made = models.layers(text, depth=6, **SIZES)
    torch.manual_seed(0)
    local = "window(window=5)+rotary(base=500)"
    alone = [regard.create(name, **SIZES) for name in ("linear", local, local, "rotary(base=7)", "linear", local)]
    assert list(map(repr, made)) == list(map(repr, alone))
    assert [m.name for m in made] == [m.name for m in alone]
    assert [(m.mask.reach, m.position.base) for m in made[1:3]] == [(5, 500), (5, 500)]
    assert made[3].position.base == 7
    x = torch.randn(2, 9, 16)
    for ours, theirs in zip(made, alone):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert torch.equal(ours(x), theirs(x))


def test_a_mechanism_alone_stands_in_every_layer():
    torch.manual_seed(0)
    made = models.layers("gated+rotary", depth=2, **SIZES)
    torch.manual_seed(0)
    alone = [build(parse("gated+rotary"), 16, 2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(made[1].parameters(), alone[1].parameters(), strict=True))
    assert not models.layers("softmax", dim=16, num_heads=2, depth=1)[0].causal, "as regard.create"


def test_own_mechanisms_stand_beside_those_of_the_catalogue(monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent.parent / "bench")
    made = models.layers("stubs:Good(width=2.0)*2+softmax", depth=3, **SIZES)
    assert [(type(m).__name__, getattr(m, "width", 0)) for m in made] == [("Good", 2), ("Good", 2), ("Attention", 0)]


def test_a_hybrid_is_causal_and_streams():
    torch.manual_seed(0)
    host = language_model(replace(SMALL, mechanism="linear*2+(window(window=3)+rotary)")).double().eval()
    changed = IDS.clone()
    changed[:, 7] += 1
    torch.testing.assert_close(host(IDS)[:, :7], host(changed)[:, :7])
    assert host.streams
    for chunks in ([12], [1] * 12, [5, 1, 6]):
        states, parts = host.init_state(2, 12), []
        for ids in IDS.split(chunks, 1):
            logits, states = host.step(ids, states)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), host(IDS))


def test_layers_share_with_those_that_are_alike():
    made = models.layers("kerple*2+softmax+kerple_power*2", depth=6, **SIZES)
    regard.share(*made)
    tables = [id(made[n].position.r1) for n in (0, 1, 3, 4, 5)]
    assert tables[0] == tables[1] == tables[4] != tables[2] == tables[3]
    assert len({id(m.q_proj.weight) for m in made}) == 6
    assert len(dict(torch.nn.ModuleList(made).named_parameters())) == 6 * len(dict(made[2].named_parameters())) + 4


# --- files


def test_a_hybrid_is_kept_and_comes_back(tmp_path):
    model = language_model(SMALL)
    path = save(model, SMALL, tmp_path / "hybrid.safetensors")
    again, config = load(path)
    assert config == SMALL
    assert torch.equal(again(IDS), model.eval()(IDS))


def test_a_file_of_a_hybrid_is_held_to_its_pattern(tmp_path):
    model = language_model(SMALL)
    for wrong in ("linear*4+rotary", "gated*1+rotary*1", f"window(window={2**20})*1+rotary", "linear*2 rotary"):
        path = save(model, replace(SMALL, mechanism=wrong), tmp_path / "wrong.safetensors")
        with pytest.raises(
            ValueError, match=r"wrong\.safetensors.* (do not fit|cannot be loaded|cannot be read)"
        ) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_own_code_in_a_hybrid_must_be_named_to_be_run(tmp_path, monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent.parent / "bench")
    config = replace(SMALL, mechanism="linear*1+stubs:Good*1", depth=2)
    path = save(language_model(config), config, tmp_path / "own.safetensors")
    with safe_open(path, "pt") as file:
        assert "stubs:Good" in file.metadata()["config"]
    with pytest.raises(ValueError, match=r"linear\*1\+stubs:Good\*1', which is no part of regard; name it as well"):
        load(path)
    assert load(path, "linear*1+stubs:Good*1")[1] == config


def test_kinds_names_and_own():
    stack = parse_stack("(gated+rotary)*2+a.b:C*1+gated(kernel='eager')+gated+rotary")
    assert [str(kind) for kind in stack.kinds] == ["gated+rotary", "a.b:C", "gated(kernel='eager')", "gated", "rotary"]
    assert stack.names == ["gated", "rotary", "a.b:C"]
    assert stack.own
    assert not parse_stack("linear*3+softmax").own
    assert stack.name == "(gated+rotary)*2+a.b:C+gated*2+rotary"
    assert isinstance(stack.layers(6)[0], Spec)

"""The catalogue: names, options, composites, what every card says, what listing must not import."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard import catalog
from regard.card import SLOTS, Card, Paper, _registry, register

NAMES = regard.mechanisms()
EVERY = catalog.names()
"""With the analyses, which are no mechanisms: functions of attention maps."""
TESTS = Path(__file__).parent


def make(name: str, **options: object) -> torch.nn.Module:
    return regard.create(name, **{"dim": 24, "num_heads": 6, **options})


# --- names --------------------------------------------------------------------------------------------------


def test_names_by_family() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 15
    families = {regard.card(name).family for name in NAMES}
    assert families <= set(catalog.ROOMS)
    assert sorted(n for f in families for n in regard.mechanisms(f)) == sorted(NAMES)


def test_analyses_are_listed_but_are_no_mechanisms() -> None:
    """Laws, `compare` and `create` go by mechanisms(); an analysis is called as it is."""
    assert sorted(EVERY) == sorted([*NAMES, *catalog.analyses()])
    assert catalog.names("inspect") == catalog.analyses()
    assert regard.mechanisms("inspect") == []
    for name in catalog.analyses():
        card = regard.card(name)
        assert (card.protocol, card.family, card.slots) == ("Analysis", "inspect", None)
        assert not card.supports | card.traits
        assert callable(card.build)
    with pytest.raises(
        ValueError, match=r"create: 'attention_rollout' is an analysis of attention, not a layer; call "
    ):
        make("attention_rollout")


@pytest.mark.parametrize(("wrong", "near"), [("rotery", "rotary"), ("alibbi", "alibi"), ("kerpel", "kerple")])
def test_near_misses_are_suggested(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown mechanism '{wrong}'; did you mean .*'{near}'"):
        make(wrong)


def test_unknown_things_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown mechanism 'zzzz'; `regard list`"):
        regard.card("zzzz")
    with pytest.raises(ValueError, match="unknown family 'position'; did you mean 'positions'"):
        regard.mechanisms("position")
    with pytest.raises(ValueError, match="unknown option of 'shaw' 'max_distnace'; did you mean 'max_distance'"):
        make("shaw", max_distnace=3)
    with pytest.raises(ValueError, match="unknown mechanism"):
        make("alibi+zzzz")


def test_names_are_taken_once() -> None:
    card = regard.card("alibi")
    assert register(card) is card
    twin = Card(name="alibi", family="heads", gist="", equation="", paper=card.paper, slots=card.slots)
    with pytest.raises(ValueError, match=r"'alibi' already exists .*positions"):
        register(twin)
    assert _registry["alibi"] is card


def test_cards_are_checked_when_made() -> None:
    good = regard.card("alibi")
    rest = {"name": "x", "family": "heads", "gist": "", "equation": "", "paper": good.paper}
    with pytest.raises(ValueError, match=r"card 'x': unknown feature \['fly'\]"):
        Card(**rest, slots=good.slots, supports=frozenset({"fly"}))
    with pytest.raises(ValueError, match=r"card 'x': unknown trait \['red'\]"):
        Card(**rest, slots=good.slots, traits=frozenset({"red"}))
    with pytest.raises(ValueError, match="either slots= or build="):
        Card(**rest)


# --- create -------------------------------------------------------------------------------------------------


def test_composites() -> None:
    """Names joined by + fill several slots; the parts are those of each alone."""
    both = make("gated+rotary", causal=True)
    assert type(both.position) is type(make("rotary").position)
    assert type(both.gate) is type(make("gated").gate)
    assert both.name == "gated+rotary"
    assert both.supports == regard.card("gated").supports & regard.card("rotary").supports
    x = torch.randn(2, 5, 24)
    assert not torch.allclose(both(x), both(x.flip(1)).flip(1))
    three = make("alibi + entmax + qk_norm")
    assert three.position
    assert three.normalizer
    assert three.heads
    assert make("shaw+entmax", max_distance=2).position.max_distance == 2


def test_composites_that_collide() -> None:
    with pytest.raises(ValueError, match="'alibi' and 'rotary' both fill the slot 'position'"):
        make("alibi+rotary")
    with pytest.raises(ValueError, match="'alibi' fills the slot 'position' itself"):
        make("alibi", position=make("rotary").position)
    for name in NAMES:
        if regard.card(name).build:
            causal = "bidirectional" not in regard.card(name).supports
            with pytest.raises(ValueError, match="only mechanisms that fill slots can be joined"):
                make(f"{name}+alibi", causal=causal)


def test_options_of_the_layer_pass_through() -> None:
    layer = make("alibi", num_kv_heads=2, head_dim=8, bias=True, kernel="chunked", dropout=0.1, dtype=torch.float64)
    assert (layer.num_kv_heads, layer.head_dim, layer.kernel, layer.dropout) == (2, 8, "chunked", 0.1)
    assert layer.q_proj.bias is not None
    assert layer.q_proj.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4"):
        make("alibi", num_kv_heads=4)


# --- cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_card_is_well_formed(name: str) -> None:
    card = regard.card(name)
    assert card.name == name == name.lower()
    assert " " not in name
    assert "+" not in name
    assert 20 <= len(card.gist) < 90
    assert "\n" not in card.gist
    assert len(card.equation) > 10
    assert card.paper.title
    assert card.paper.authors
    assert 1990 <= card.paper.year <= 2030
    assert card.paper.ref
    assert card.cost.time
    if card.protocol == "TokenMixer":
        assert bool(card.cost.state) == ("streaming" in card.supports)
    assert not (card.exceptions.keys() - {f"L{n}" for n in range(1, 48)} - {"supported"})
    assert all(len(reason) > 20 for reason in card.exceptions.values())
    if card.verified == "equation":
        read = set(card.paper.equations.replace(";", "").split())
        assert not read & {"abstract", "code", "summary", "quoted"}, "what was not read in the paper is reconstructed"
    if "normalised" in card.traits and "nonnegative" in card.traits:
        assert "causal" in card.supports or "bidirectional" in card.supports
    options = catalog.options(card)
    assert card.example.keys() <= options.keys()
    if card.slots:
        shape = regard.kinds.HeadShape(24, 6, 6, 4)
        assert card.slots(shape, **card.example).keys() <= set(SLOTS)


@pytest.mark.parametrize("name", EVERY)
def test_card_stands_in_its_room(name: str) -> None:
    """Its file stands in its family's room, cites the paper, stays short, and has a test file of its own."""
    card = regard.card(name)
    room = importlib.import_module(f"regard.{card.family}")
    module = importlib.import_module((card.slots or card.build).__module__)
    file = Path(module.__file__)
    assert file.parent == Path(room.__file__).parent
    assert card.paper.ref in module.__doc__, f"the docstring of {file.name} doesn't name {card.paper.ref}"
    assert any(line.startswith("    ") for line in module.__doc__.splitlines()), "the docstring shows no equation"
    code = file.read_text().split("\nCARD = ")[0].splitlines()
    assert sum(bool(line.strip()) for line in code) <= 200, f"{file.name} is too long to be read in one go"
    texts = [t.stem + t.read_text().lower() for t in (TESTS / card.family).glob("test_*.py")]
    own = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    public = {name, file.stem, *(n.lower() for n in own if not n.startswith("_"))}
    assert any(word in text for text in texts for word in public), f"nothing in tests/{card.family} tests {name}"


def test_urls() -> None:
    assert regard.card("rotary").paper.url == "https://arxiv.org/abs/2104.09864"
    assert Paper("T", "A", 2020, "ICML 2020").url is None


# --- imports ------------------------------------------------------------------------------------------------

EXTRAS = (
    "transformers datasets sklearn plotly faiss torch_geometric ray scipy lightning accelerate entmax "
    "hypothesis pandas matplotlib"
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys, regard; regard.mechanisms(); print(*{m.partition('.')[0] for m in sys.modules})"
    assert not set(python(code).split()) & set(EXTRAS.split())


def test_works_without_the_extras() -> None:
    """In a fresh process where every extra fails to import."""
    code = f"""
import sys
for name in {EXTRAS!r}.split():
    sys.modules[name] = None
import torch, regard
for name in regard.mechanisms():
    card = regard.card(name)
    regard.create(name, dim=24, num_heads=6, causal='bidirectional' not in card.supports, **card.example)
print(len(regard.mechanisms()))
"""
    assert int(python(code)) == len(NAMES)


def test_importing_the_package_walks_no_room() -> None:
    code = "import sys, regard; print('regard.heads' in sys.modules, 'regard.mixers' in sys.modules)"
    assert python(code).split() == ["False", "False"]

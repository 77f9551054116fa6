"""The catalogue: names, options, composites, what every card says, what listing must not import."""

import contextlib
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pytest
import torch

import regard
from regard import catalog, index
from regard.cards import Card, Paper, _registry, register
from regard.laws import LAWS
from regard.rooms import FAMILIES
from regard.slots import BEYOND, SLOTS

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
    assert families <= set(FAMILIES)
    assert sorted(n for f in families for n in regard.mechanisms(f)) == sorted(NAMES)


def test_analyses_are_listed_but_are_no_mechanisms() -> None:
    """Laws, `compare` and `create` go by mechanisms(); an analysis is called as it is."""
    assert sorted(EVERY) == sorted([*NAMES, *catalog.analyses()])
    assert catalog.names("inspect") == catalog.analyses()
    assert regard.mechanisms("inspect") == []
    for name in catalog.analyses():
        card = regard.card(name)
        assert (card.protocol, card.family, card.is_function) == ("Analysis", "inspect", True)
        assert not card.supports | card.traits
        assert callable(card.builder)
    with pytest.raises(
        ValueError, match=r"create: 'attention_rollout' is an analysis of attention, not a layer; call "
    ):
        make("attention_rollout")


@pytest.mark.parametrize(("wrong", "near"), [("rotery", "rotary"), ("alibbi", "alibi"), ("kerpel", "kerple")])
def test_near_misses_are_suggested(wrong: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"mechanism is unknown \(got '{wrong}'\); expected .*; did you mean .*'{near}'"
    ):
        make(wrong)


def test_unknown_things_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"regard: mechanism is unknown \(got 'zzzz'\); expected one of those that `regard list` shows"
    ):
        regard.card("zzzz")
    with pytest.raises(
        ValueError, match=r"family is unknown \(got 'position'\); expected .*; did you mean 'positions'"
    ):
        regard.mechanisms("position")
    with pytest.raises(
        ValueError,
        match=r"'shaw' has no such option \(got 'max_distnace'\); expected one of .*; did you mean 'max_distance'\?",
    ):
        make("shaw", max_distnace=3)
    with pytest.raises(ValueError, match="mechanism is unknown"):
        make("alibi+zzzz")


def test_names_are_taken_once() -> None:
    card = regard.card("alibi")
    assert register(card) is card
    twin = Card("alibi", equation="", papers=card.papers)
    with pytest.raises(ValueError, match=r"'alibi' already exists .*positions"):
        twin.fills("position")(lambda: None)
    assert _registry["alibi"] is card


def test_cards_are_checked_when_made() -> None:
    papers = regard.card("alibi").papers
    with pytest.raises(ValueError, match=r"card 'x': feature is unknown \(got \['fly'\]\); expected some of"):
        Card("x", equation="", papers=papers, supports={"fly"})
    with pytest.raises(ValueError, match=r"card 'x': trait is unknown \(got \['red'\]\); expected some of"):
        Card("x", equation="", papers=papers, traits={"red"})
    with pytest.raises(ValueError, match=r"card 'x': protocol is unknown \(got 'Mixer'\); expected one of"):
        Card("x", equation="", papers=papers, protocol="Mixer")
    with pytest.raises(ValueError, match="card 'x': papers must be a tuple"):
        Card("x", equation="", papers=())
    with pytest.raises(ValueError, match="card 'x' decorates nothing"):
        _ = Card("x", equation="", papers=papers).options


def test_every_card_decorates_something() -> None:
    """A card that stands alone would be in no list, and nobody would miss it."""
    for family in FAMILIES:
        with contextlib.suppress(ModuleNotFoundError):
            package = importlib.import_module(f"regard.{family}")
            for info in pkgutil.walk_packages(package.__path__, f"regard.{family}."):
                if info.name.startswith(f"regard.{family}._"):
                    continue
                for name, value in vars(importlib.import_module(info.name)).items():
                    if isinstance(value, Card):
                        assert value.made is not None, f"{info.name}.{name} decorates nothing"
                        assert _registry[value.name] is value


def test_a_class_tells_its_options() -> None:
    """What create gives is none, nor what is closed or preset; inherited keywords count with their defaults."""
    card = Card("temporary_options", equation="y = x", papers=regard.card("alibi").papers, protocol="Pooler")

    class Above(torch.nn.Module):
        def __init__(self, dim: int, *, causal: bool = False, bias: bool = True, width: int = 3) -> None:
            super().__init__()
            self.got = (dim, causal, bias, width)

    class Rest(TypedDict, total=False):
        causal: bool
        bias: bool

    class Below(Above):
        def __init__(self, dim: int, *, size: int = 2, hidden: int = 0, **rest: Unpack[Rest]) -> None:
            super().__init__(dim, **rest)
            self.size = size

    try:
        card.module(closed=("hidden",))(Below)
        fixed = card.variant("temporary_variant", "The same with one size.", preset={"size": 5})
        assert card.options == {"size": 2, "bias": True}
        assert fixed.options == {"bias": True}
        assert regard.create("temporary_options", dim=4, num_heads=1, bias=False, causal=True).got == (
            4,
            True,
            False,
            3,
        )
        assert regard.create("temporary_variant", dim=4, num_heads=1).size == 5
        with pytest.raises(ValueError, match=r"'temporary_options' has no such option \(got 'hidden'\)"):
            regard.create("temporary_options", dim=4, num_heads=1, hidden=1)
        assert list(inspect.signature(Below).parameters) == ["dim", "size", "hidden", "causal", "bias"]

        class Further(Below):
            def __init__(self, dim: int, *, other: int = 1) -> None:
                super().__init__(dim)

        assert list(inspect.signature(Further).parameters) == ["dim", "other"]
        for words in ("temporary_options", "y = x", "Press"):
            assert words in Below.__doc__
    finally:
        for name in ("temporary_options", "temporary_variant"):
            _registry.pop(name, None)


@pytest.fixture
def temporary() -> Iterator[Callable[..., Card]]:
    """Makes cards that are forgotten afterwards."""
    before = dict(_registry)

    def make_card(name: str, **fields: object) -> Card:
        return Card(f"temporary_{name}", equation="y = x", papers=regard.card("alibi").papers, **fields)

    yield make_card
    _registry.clear()
    _registry.update(before)


POSTPONED = """
from __future__ import annotations
from typing import Unpack
from regard import HeadMixer
from regard.pipeline import Projections

class Mine(HeadMixer):
    def __init__(self, dim, num_heads, *, size: int = 2, **rest: Unpack[Projections]):
        super().__init__(dim, num_heads, **rest)
"""


def test_postponed_annotations_are_read(temporary: Callable[..., Card]) -> None:
    """Else `causal` would be none of the arguments, and a causal layer would see the future."""
    space: dict[str, Any] = {"__name__": "no_module_of_this_name"}
    exec(POSTPONED, space)
    card = temporary("postponed", supports={"causal", "bidirectional"})
    card.module(space["Mine"])
    assert set(card.options) == {"size", "bias", "context_dim"}
    assert make("temporary_postponed", causal=True).causal
    exec(POSTPONED.replace("from typing import Unpack", ""), space := {"__name__": "no_module_of_this_name"})
    with pytest.raises(ValueError, match="can't be read"):
        temporary("unreadable").module(space["Mine"])


def test_no_argument_falls_on_deaf_ears(temporary: Callable[..., Card]) -> None:
    class Deaf(regard.HeadMixer):
        def __init__(self, dim: int, num_heads: int, *, size: int = 2, **rest: dict[str, Any]) -> None:
            super().__init__(dim, num_heads)

    temporary("deaf").module(Deaf)
    make("temporary_deaf")
    for asked in ({"causal": True}, {"dropout": 0.5}):
        with pytest.raises(ValueError, match=f"claims to support {next(iter(asked))}, but .*Deaf takes no such"):
            make("temporary_deaf", **asked)


@pytest.mark.parametrize("late", [False, True])
def test_variants_of_variants(temporary: Callable[..., Card], late: bool) -> None:
    """They keep what is fixed above them, and are found, whichever comes first: the code or the cards."""
    card = temporary("base", protocol="Pooler")

    class Sized(torch.nn.Module):
        def __init__(self, *, a: int = 1, b: int = 2, c: int = 3) -> None:
            super().__init__()
            self.got = (a, b, c)

    if not late:
        card.module(Sized)
    above = card.variant("temporary_a", "a is fixed.", preset={"a": 5})
    below = above.variant("temporary_b", "b too.", preset={"b": 6})
    if late:
        card.module(Sized)
    assert make("temporary_b").got == (5, 6, 3)
    assert below.options == {"c": 3}


def test_gist_where_nothing_is_documented(temporary: Callable[..., Card]) -> None:
    space: dict[str, Any] = {"__name__": "no_module_of_this_name", "nn": torch.nn}
    exec("class Silent(nn.Module): pass\nclass Told(nn.Module):\n    'One line.'", space)
    silent, told = temporary("silent"), temporary("told")
    silent.module(space["Silent"])
    told.module(space["Told"])
    assert (silent.gist, told.gist) == ("", "One line.")


# --- create -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [(None, {}, "create: name"), (["softmax"], {}, "create: name"), ("softmax", {"causal": "no"}, "softmax: causal")],
)
def test_wrong_kinds_are_refused(name: Any, options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(TypeError, match=f"{wrong} has the wrong type"):
        make(name, **options)


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
        if not regard.card(name).is_part:
            causal = "bidirectional" not in regard.card(name).supports
            with pytest.raises(ValueError, match="only mechanisms that fill slots can be joined"):
                make(f"{name}+alibi", causal=causal)


def test_options_of_the_layer_pass_through() -> None:
    layer = make("alibi", num_kv_heads=2, head_dim=8, bias=True, kernel="chunked", dropout=0.1, dtype=torch.float64)
    assert (layer.num_kv_heads, layer.head_dim, layer.kernel, layer.dropout) == (2, 8, "chunked", 0.1)
    assert layer.q_proj.bias is not None
    assert layer.q_proj.weight.dtype == torch.float64
    with pytest.raises(ValueError, match=r"num_heads is no multiple of num_kv_heads = 4 \(got 6\)"):
        make("alibi", num_kv_heads=4)


def test_what_is_no_layer_needs_no_sizes() -> None:
    """A cache policy, say, is any object; a layer without dim and num_heads is refused in words."""
    card = Card("temporary_policy", equation="y = x", papers=regard.card("alibi").papers, protocol="CachePolicy")

    @card.module
    class Policy:
        def __init__(self, *, budget: int = 4) -> None:
            self.budget = budget

    try:
        assert regard.create("temporary_policy", budget=7).budget == 7
    finally:
        _registry.pop("temporary_policy")
    with pytest.raises(ValueError, match="create: 'alibi' needs dim and num_heads"):
        regard.create("alibi")
    with pytest.raises(ValueError, match="create: 'shift' needs dim "):
        regard.create("shift", num_heads=2)


# --- cards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_card_is_well_formed(name: str) -> None:
    card = regard.card(name)
    assert card.name == name == name.lower()
    assert " " not in name
    assert "+" not in name
    assert 20 <= len(card.gist) <= 100
    assert "\n" not in card.gist
    assert len(card.equation) > 10
    for paper in card.papers:
        assert paper.title
        assert paper.authors
        assert 1990 <= paper.year <= 2030
        assert paper.ref
    assert card.cost.time
    if card.protocol == "TokenMixer":
        assert bool(card.cost.state) == ("streaming" in card.supports)
    for excepted in card.exceptions:
        id, _, law = excepted.partition(" ")
        assert any(id == one.id and law in ("", one.name) for one in LAWS), f"there is no law {excepted}"
    assert all(len(reason) > 20 for reason in card.exceptions.values())
    if card.verified == "equation":
        read = set(card.paper.read.replace(";", "").split())
        assert not read & {"abstract", "code", "summary", "quoted"}, "what was not read in the paper is reconstructed"
    if "normalised" in card.traits and "nonnegative" in card.traits:
        assert "causal" in card.supports or "bidirectional" in card.supports
    assert card.example.keys() | card.tries.keys() <= card.options.keys()
    if card.is_part:
        given = {"dim": 24, "num_heads": 6, "num_kv_heads": 6, "head_dim": 4, "causal": False, "dropout": 0.0}
        assert card.parts(given, card.example).keys() <= {*SLOTS, *BEYOND}


@pytest.mark.parametrize("name", EVERY)
def test_card_stands_in_its_room(name: str) -> None:
    """Its file stands in its family's room, cites the paper, stays short, and has a test file of its own."""
    card = regard.card(name)
    room = importlib.import_module(f"regard.{card.family}")
    module = importlib.import_module(card.builder.__module__)
    file = Path(module.__file__)
    assert Path(room.__file__).parent in file.parents
    assert card.gist in module.__doc__ or card.base is not None or card.gist
    assert sum(bool(line.strip()) for line in file.read_text().splitlines()) <= 220, f"{file.name} is too long"
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


def test_importing_the_package_walks_no_room() -> None:
    code = "import sys, regard; print('regard.heads' in sys.modules, 'regard.mixers' in sys.modules)"
    assert python(code).split() == ["False", "False"]


THREADS = """
import sys, threading, regard
sys.setswitchinterval(1e-5)
names, failed = ["Attention", "create", "mechanisms", "trace", "swap", "plan", "effective_weights"], []
together = threading.Barrier(len(names))
def ask(name):
    together.wait()
    try:
        getattr(regard, name)
    except Exception as error:
        failed.append((name, error))
threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join(100)
assert not failed and not any(thread.is_alive() for thread in threads), failed
"""


def test_threads_may_ask_first_together() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True)


def test_options_that_are_flags_take_nothing_else() -> None:
    """Every option that is annotated as a bool, of every card; a 1, a list or "no" is none."""
    checked = 0
    for card in catalog.cards().values():
        if card.is_function or card.made is None:
            continue
        for name in card.options:
            if card.made.signature.parameters[name].annotation is not bool:
                continue
            for wrong in (1, None, "no", []):
                with pytest.raises(TypeError, match=rf"{name} has the wrong type .* expected True or False"):
                    regard.create(
                        card.name,
                        dim=24,
                        num_heads=6,
                        causal="causal" in card.supports,
                        **{**card.example, name: wrong},
                    )
            checked += 1
    assert checked > 20


def test_the_layers_own_flags_take_nothing_else() -> None:
    for name in ("softmax", "linear"):
        with pytest.raises(TypeError, match=r"bias has the wrong type .* expected True or False"):
            regard.create(name, dim=8, num_heads=2, bias="no")
    with pytest.raises(TypeError, match=r"causal has the wrong type .* expected True or False"):
        regard.Attention(8, 2, causal=1)  # type: ignore[arg-type]


def test_a_near_name_is_near() -> None:
    assert "did you mean" not in index.unknown("mechanism", "flash", ["softmax", "linear", "halo"])
    assert "did you mean" not in index.unknown("mechanism", "gru", ["gmm", "gss"])
    assert index.unknown("mechanism", "sotfmax", ["softmax", "linear"]).endswith("did you mean 'softmax'?")
    with pytest.raises(ValueError, match=r"'softmax' has no such option \(got 'is_causal'\); .*you mean 'causal'\?"):
        regard.create("softmax", dim=8, num_heads=2, is_causal=True)

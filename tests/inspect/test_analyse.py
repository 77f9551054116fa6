"""Analyses asked for by the names on their cards: what a trace gives them, and what it refuses."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.inspect.hosts import HOSTS, made
from torch import Tensor

import regard
from regard import catalog, masks
from regard.cards import Card, Paper, _registry
from regard.inspect import analyses
from regard.inspect.analyses.attention_distance import attention_distance
from regard.inspect.analyses.massive_activations import massive_activations
from regard.inspect.trace import Trace, trace


def traced(name: str, **more: Any) -> Trace:
    with torch.no_grad():
        return trace(made(name), HOSTS[name].inputs | more)


def gates_loss(gates: Tensor) -> Tensor:
    return (gates * torch.arange(8.0).view(2, 4)).sum()


def lens() -> Any:
    torch.manual_seed(0)
    return analyses.AttentionLens(4, torch.randn(7, 5))


def probe() -> Any:
    torch.manual_seed(0)
    return analyses.AttentionProbe(2, 4).double()


@dataclass
class Case:
    """How an analysis is asked for, and what it is called with when one calls it oneself."""

    host: str
    direct: Callable[[Trace, Any], Any]
    ask: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


def lens_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(3, 4, 5), torch.eye(3, 7))]


def probe_batches(t: Trace) -> list[Any]:
    labels = torch.tensor([[-100, 0, 2, 3, 4, 5, -100]]).expand(2, -1)
    return [analyses.ProbeBatch(t.maps(), labels)]


GRADIENTS = [torch.linspace(-1, 1, 2 * 4 * 49, dtype=torch.float64).view(2, 4, 7, 7)] * 2
POINTS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5).expand(4, -1, -1)
CASES = {
    "attention_distance": Case("vit", lambda t, f: f(t.maps(), grid=(3, 3), extra_tokens=1)),
    "attention_flow": Case("bert", lambda t, f: f(t.maps(), rows=[0], layers=[-1]), {"rows": [0], "layers": [-1]}),
    "attention_lens": Case("bert", lambda t, f: f(lens(), lens_batches()), {"lens": lens, "batches": lens_batches}),
    "attention_probe": Case("bert", lambda t, f: f(probe(), probe_batches(t)), {"probe": probe}),
    "attention_rollout": Case(
        "bert", lambda t, f: f(t.maps(), residual=0.3, heads="max"), {"residual": 0.3, "heads": "max"}
    ),
    "head_behaviour": Case("bert", lambda t, f: f(t.maps())),
    "head_importance": Case(
        "bert", lambda t, f: f(gates_loss, 2, 4), {"losses": lambda: gates_loss, "num_layers": 2, "num_heads": 4}
    ),
    "infini_retri": Case(
        "bert", lambda t, f: f(t.maps(), question=(4, 6), context=(1, 4)), {"question": (4, 6), "context": (1, 4)}
    ),
    "lookback_ratio": Case("llama", lambda t, f: f(t.maps(), prompt=4, context=2), {"prompt": 4, "context": 2}),
    "massive_activations": Case(
        "bert",
        lambda t, f: f(t.output.hidden_states, floor=1.0, ratio=2.0),
        {"floor": 1.0, "ratio": 2.0},
        {"output_hidden_states": True},
    ),
    "offset_heads": Case(
        "vit", lambda t, f: f(t.maps(), grid=(3, 3), extra_tokens=1, threshold=0.2), {"threshold": 0.2}
    ),
    "pattern_relevance": Case("bert", lambda t, f: f(t.maps(), masks.offset(1)), {"pattern": lambda: masks.offset(1)}),
    "rank_sweep": Case(
        "bert",
        lambda t, f: f(*POINTS, ranks=[1, 2], heads=[3]),
        {"queries": POINTS[0], "keys": POINTS[1], "ranks": [1, 2], "heads": [3]},
    ),
    "relevance": Case("bert", lambda t, f: f(t.maps(), GRADIENTS), {"gradients": GRADIENTS}),
    "representation_similarity": Case(
        "bert", lambda t, f: f([[torch.eye(5), torch.ones(5, 2)]]), {"x": [[torch.eye(5), torch.ones(5, 2)]]}
    ),
    "span_attention": Case("bert", lambda t, f: f(t.maps(), [(0, 2), (3, 5)]), {"keys": [(0, 2), (3, 5)]}),
    "stiffness": Case("bert", lambda t, f: f(list(POINTS)), {"states": list(POINTS)}),
    "sparse_memory": Case("llama", lambda t, f: f(t.layers[1].q, t.layers[1].k, scale=t.layers[1].scale), {"layer": 1}),
}
"""An analysis that stands here without its card, or has a card and does not stand here, fails the first test."""


def numbers(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, float):
        return [torch.tensor(value)]
    return [number for part in value for number in numbers(part)]


def test_every_analysis_is_tested_here() -> None:
    assert sorted(CASES) == sorted(regard.analyses())


@pytest.mark.parametrize("name", CASES)
def test_asked_for_by_name_it_is_the_call_itself(name: str) -> None:
    case = CASES[name]
    got = traced(case.host, **case.inputs)
    options = {key: value() if callable(value) else value for key, value in case.ask.items()}
    if name == "attention_probe":
        options["batches"] = probe_batches(got)
    first, second = numbers(got.analyse(name, **options)), numbers(case.direct(got, regard.card(name).builder))
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def test_the_short_ways_are_the_same() -> None:
    got = traced("bert")
    assert torch.equal(got.rollout(residual=0.3), got.analyse("attention_rollout", residual=0.3))
    assert torch.equal(got.flow(rows=[1]), got.analyse("attention_flow", rows=[1]))
    assert torch.equal(got.relevance(GRADIENTS), got.analyse("relevance", gradients=GRADIENTS))
    pairs = list(zip(got.maps(), GRADIENTS, strict=True))
    assert torch.equal(got.relevance(GRADIENTS), analyses.self_relevance(pairs))


def test_which_layers_are_meant() -> None:
    two = traced("t5")
    for side in ("encoder", "decoder"):
        want = analyses.attention_rollout(two.maps(side=side))
        assert torch.equal(two.analyse("attention_rollout", side=side), want)
    spans = [(0, 3), (3, None)]
    want = analyses.span_attention(two.maps(kind="cross"), spans, queries=[(0, 1)])
    assert torch.equal(two.analyse("span_attention", kind="cross", keys=spans, queries=[(0, 1)]), want)
    alone = analyses.attention_rollout([two.layers[1].weights()])
    assert torch.equal(two.analyse("attention_rollout", layer=1), alone)
    with pytest.raises(ValueError, match=r"side is needed.*\(got None\); expected one of 'encoder', 'decoder'"):
        two.analyse("attention_rollout")
    with pytest.raises(ValueError, match=r"trace: layer is too large \(got 99\)"):
        two.analyse("attention_rollout", layer=99)


def test_a_grid_is_given_where_the_layers_see_the_picture() -> None:
    both = traced("clip")
    seen = attention_distance(both.maps(side="vision"), grid=(2, 2), extra_tokens=1)
    read = attention_distance(both.maps(side="text"))
    for a, b in zip(both.analyse("attention_distance", side="vision"), seen, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(both.analyse("attention_distance", side="text"), read, strict=True):
        assert torch.equal(a, b)
    flat = attention_distance(both.maps(side="vision"))
    told = both.analyse("attention_distance", side="vision", grid=None, extra_tokens=0)
    assert torch.equal(told[0], flat[0]), "what the caller says comes first"


def test_hidden_states_are_those_of_the_stack() -> None:
    two = traced("t5", output_hidden_states=True)
    for side in ("encoder", "decoder"):
        want = massive_activations(two.output[f"{side}_hidden_states"], floor=0.5, ratio=1.0)
        got = two.analyse("massive_activations", side=side, floor=0.5, ratio=1.0)
        assert torch.equal(got.value, want.value)


def test_a_trace_of_one_layer_needs_no_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    got = trace(regard.create("softmax", dim=12, num_heads=3, num_kv_heads=1), torch.randn(1, 6, 12))
    want = analyses.sparse_memory_fit(got.layers[0].q, got.layers[0].k)
    assert torch.equal(got.analyse("sparse_memory").beta, want.beta)
    again = Trace.from_dir(got.to_dir(tmp_path / "kept"))
    assert torch.equal(again.analyse("sparse_memory").beta, want.beta)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("attention_rolout", {}, r"analyse: name is unknown .*did you mean 'attention_rollout'"),
        ("rotary", {}, r"analyse: name is a mechanism's \(got 'rotary'\); expected an analysis: one of attention_d"),
        ("gated+rotary", {}, "analyse: name is unknown"),
        ("attention_rollout", {"residul": 0.5}, r"'attention_rollout'.* option is unknown .*mean 'residual'"),
        ("attention_lens", {}, r"analyse\('attention_lens'\): lens, batches is missing .*expected lens= and batches="),
        ("attention_lens", {"lens": None}, r": batches is missing \(got no trace tells it\); expected batches="),
        ("head_importance", {"num_layers": 2}, "losses, num_heads is missing"),
        ("lookback_ratio", {"prompt": 3}, "context is missing"),
        ("massive_activations", {}, "hidden is missing .*output_hidden_states=True"),
        ("massive_activations", {"side": "encoder"}, "hidden is missing .*output_hidden_states=True"),
        ("rank_sweep", {"ranks": [1]}, "queries, keys, heads is missing"),
        ("relevance", {}, "gradients is missing"),
        ("representation_similarity", {}, "x is missing"),
        ("span_attention", {}, "keys is missing"),
        ("sparse_memory", {}, r"q, k is missing \(got it is one layer's, and here are 2: give layer=\)"),
    ],
)
def test_what_cannot_be_asked_is_named(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        traced("bert").analyse(name, **options)


def test_no_analysis_has_an_argument_that_analyse_takes_itself() -> None:
    own = set(inspect.signature(Trace.analyse).parameters) - {"options"}
    for name in regard.analyses():
        assert not own & regard.card(name).options.keys(), name


@pytest.fixture
def mine() -> Iterator[Card]:
    """An analysis that somebody else has written."""
    card = Card(
        "my_analysis", equation="y = sum A", papers=(Paper("T", "A", 2020, "X"),), gist="One of my own, as a test.",
        protocol="Analysis", supports=(),
    )  # fmt: skip

    @card.function
    def my_analysis(attention: list[Tensor], tokens: Any, *, times: float = 1.0) -> tuple[Tensor, Any]:
        return times * sum(one.sum() for one in attention), tokens  # type: ignore[return-value]

    yield card
    _registry.pop("my_analysis", None)


def test_analyses_of_ones_own_are_found(mine: Card) -> None:
    assert "my_analysis" in catalog.analyses()
    got = traced("bert")
    with pytest.raises(ValueError, match="tokens is missing"):
        got.analyse("my_analysis")
    total, said = got.analyse("my_analysis", tokens="abc", times=2.0)
    torch.testing.assert_close(total, torch.tensor(2.0 * 2 * 2 * 4 * 7, dtype=torch.float64))
    assert said == "abc"

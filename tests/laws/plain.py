"""Plain softmax attention in a mechanism's place, and whether the tests that its claim names then fail.

    PYTHONPATH=src:tests python -m laws.plain [NAME ...]     a table; --json FILE writes it as {card: {test: verdict}}

What stands in its place: an empty slot of the pipeline (all keys allowed, for a mask); softmax of its own queries, keys
and values; softmax between the tokens, pixels, nodes or states themselves for other modules; a loss of 0 and a training
that does nothing; for a cache policy the newest keys, as many as its budget, side by side in full precision; and for an
analysis, even maps in place of those that it is given. Verdicts: "fails" as it should,
"passes", or "breaks: ERROR" where it gets no further because what it asks of the mechanism is not there.
"""

import functools
import inspect
import json
import os
import pickle
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from laws import claims
from regard import cards, catalog, masks
from regard.cache.evict import Evicting
from regard.cache.stores import Padded
from regard.pipeline import HeadMixer
from regard.stages import Gate, HeadMap, Memory, Mix, Normalizer, Position, Score, Selector


def softmax(q: Tensor, k: Tensor, v: Tensor, *_: Any, causal: bool = False, keep: Any = None, **__: Any) -> Tensor:
    """Whatever else the mechanism's function takes."""
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) if z.dim() == 4 else z for z in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(k.shape[-2] - q.shape[-2]), -1e9)
    if isinstance(keep, Tensor):
        scores = scores.masked_fill(~keep[:, None, None], -1e9)
    return scores.softmax(-1) @ v


def _mix(self: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    if q.shape[-1] != k.shape[-1]:  # gates and more may stand beside queries and keys
        q, k = (z[..., : min(q.shape[-1], k.shape[-1], self.head_dim)] for z in (q, k))
    return softmax(q, k, v, causal=self.causal, keep=keep)


class Kept(typing.NamedTuple):
    """What softmax has to keep of the past."""

    k: Tensor
    v: Tensor


def _run(self: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: Kept | None) -> tuple[Tensor, Kept]:
    if state is not None and state.k.shape[2]:
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
    return _mix(self, q, k, v, keep), Kept(k, v)


def _empty_state(self: Any, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Kept:
    return Kept(*torch.zeros(2, batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype))


def _as_returned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Softmax, and beside it what a function returns more: keys and values, for softmax has no smaller state."""
    made = typing.get_type_hints(function).get("return")
    if typing.get_origin(made) is tuple:
        return lambda q, k, v, *args, **options: (softmax(q, k, v, *args, **options), Kept(k, v))
    if not hasattr(made, "_fields"):
        return softmax
    return lambda q, k, v, *args, **options: made(
        softmax(q, k, v, *args, **options), *[torch.cat([k, v], -1)] * (len(made._fields) - 1)
    )


def _tokens(self: Any, x: Tensor, context: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    source = x if context is None else context
    return softmax(x, source, source, causal=bool(getattr(self, "causal", False)))


def _features(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    flat = x.flatten(2).mT
    return softmax(flat, flat, flat).mT.unflatten(-1, x.shape[2:])


def _graph(self: Any, nodes: Tensor, edge_index: Tensor, *_: Any, **__: Any) -> Tensor:
    source, target = edge_index
    weights = ((nodes[source] * nodes[target]).sum(-1) / nodes.shape[-1] ** 0.5).exp()
    whole = nodes.new_zeros(len(nodes)).index_add(0, target, weights)
    return torch.zeros_like(nodes).index_add(0, target, weights[:, None] * nodes[source]) / (whole[:, None] + 1e-30)


def _model(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Of the inputs themselves; names of tokens as one-hot vectors."""
    x = x if x.is_floating_point() else torch.nn.functional.one_hot(x).double()
    return softmax(x, x, x, causal="causal" in self.supports)


FORWARD: dict[str, Callable[..., Any]] = {
    "TokenMixer": _tokens,
    "CrossMixer": _tokens,
    "FeatureMixer": _features,
    "GraphMixer": _graph,
    "Pooler": lambda self, x, *_, **__: softmax(x.mean(1, keepdim=True), x, x)[:, 0],
    "Pointer": lambda self, x, context, *_, **__: (x @ context.mT / x.shape[-1] ** 0.5).log_softmax(-1),
    "Model": _model,
    "Loss": lambda self, *given, **_: 0 * sum(z.sum() for z in given if isinstance(z, Tensor)),
}


def _normalised(self: Any, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    return (scores if allowed is None else scores.masked_fill(~allowed, -1e30)).softmax(-1)


def _dots(self: Any, rows: Any, scale: float) -> Tensor:
    return scale * rows.q @ rows.k.repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1).mT


PARTS: dict[type, dict[str, Callable[..., Any]]] = {
    Position: {
        **{hook: getattr(Position, hook) for hook in ("embed", "rotate", "turn", "values")},
        "bias": lambda self, rows: rows.q.new_zeros(*rows.q.shape[:2], len(rows.i), len(rows.j)),
    },
    Score: {"forward": _dots},
    Normalizer: {"forward": _normalised},
    Memory: {"forward": lambda self: (self.keys[:, :0], self.values[:, :0])},
    Mix: {"forward": lambda self, z, rows: z},
    HeadMap: {"forward": lambda self, q, k, v: (q, k, v), "along": HeadMap.along},
    Gate: {"forward": lambda self, z, x, at: z},
    Selector: {"forward": lambda self, q, k, mask, made=None: masks.full() if mask is None else mask},
}


def switch_off(card: regard.Card) -> None:
    """For the rest of this process."""
    builder = card.builder
    home = sys.modules[builder.__module__]
    classes = [c for c in vars(home).values() if inspect.isclass(c) and c.__module__ == home.__name__]
    made = None if inspect.isclass(builder) else typing.get_type_hints(builder).get("return")
    for cls in [*classes, made] if inspect.isclass(made) else classes:  # a function may make a part of another file
        for kind, methods in PARTS.items():
            if issubclass(cls, kind):
                for name, method in methods.items():
                    setattr(cls, name, method)
    for name, function in list(vars(home).items()):
        if inspect.isfunction(function) and function.__module__.startswith(f"regard.{card.family}."):
            if list(inspect.signature(function).parameters)[:3] == ["q", "k", "v"] and function is not builder:
                _replace(function, _as_returned(function))
            elif card.family == "normalizers" and name == card.name:
                _replace(function, lambda z, *_, **__: z.softmax(-1))
    if card.is_part:
        _plain_parts(card)
    elif card.protocol == "CachePolicy" and issubclass(builder, Evicting):
        _newest(builder)
    elif card.is_function:
        _replace(builder, _blind(builder))
    elif issubclass(builder, regard.Attention) and not _projects(card):
        builder.forward = FORWARD[card.protocol]  # without the pipeline's projections its own methods find nothing
    elif issubclass(builder, regard.Attention):
        for name in vars(builder).keys() & vars(regard.Attention).keys() - {"__init__", "__doc__", "__module__"}:
            setattr(builder, name, getattr(regard.Attention, name))
        _without_mask(builder)
    else:
        mixer = {"mix": _mix, "run": _run, "empty_state": _empty_state}
        for name, plain in (mixer if issubclass(builder, HeadMixer) else {"forward": FORWARD[card.protocol]}).items():
            for cls in builder.__mro__:  # a test may be about the class that it refines
                if cls.__module__.startswith(f"regard.{card.family}.") and name in vars(cls):
                    setattr(cls, name, plain)


def _newest(builder: type[Evicting]) -> None:
    """No scorer, no budgets by layer or head, no store of its own."""
    build = builder.__init__

    @functools.wraps(build)
    def emptied(self: Evicting, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.floor, self.makes = None, Padded.of

    builder.__init__ = emptied  # type: ignore[method-assign]
    plain = {"judge": lambda self, asked: (asked.positions.double(), None), "at_layer": Evicting.at_layer}
    for name, method in plain.items():
        setattr(builder, name, method)


def _without_mask(builder: type[regard.Attention]) -> None:
    """Its slot for a mask is emptied, too, where its own code fills it."""
    build = builder.__init__

    @functools.wraps(build)
    def emptied(self: regard.Attention, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.mask = None

    builder.__init__ = emptied  # type: ignore[method-assign]


def _projects(card: regard.Card) -> bool:
    """Whether it has the pipeline's projections, to which the pipeline's own methods can go back."""
    layer = regard.create(card.name, dim=24, num_heads=6, **card.example)
    return hasattr(layer, "k_proj") and layer.q_proj.out_features == layer.num_heads * layer.head_dim


def _plain_parts(card: regard.Card) -> None:
    """Slots that no class of the library's kinds fills: a mask, a kernel, a number of heads."""
    real = cards.Card.parts
    if card.made.slot == "mask":  # a function, which a model may call by itself
        _replace(card.builder, lambda **_: masks.full())

    def parts(self: regard.Card, given: Any, own: Any) -> dict[str, Any]:
        made = real(self, given, own)
        if self.builder is not card.builder:
            return made
        plain = {"mask": masks.full(), "kernel": "eager", "num_kv_heads": given.get("num_heads")}
        return {slot: plain.get(slot, part) for slot, part in made.items()}

    cards.Card.parts = parts  # type: ignore[method-assign]


def _blind(function: Callable[..., Any]) -> Callable[..., Any]:
    """An analysis of even maps."""

    def even(given: Any) -> Any:
        if isinstance(given, Tensor) and given.is_floating_point() and given.dim() > 1:
            return 0 * given + given.mean(-1, keepdim=True)
        if hasattr(given, "_fields"):
            return type(given)(*map(even, given))
        return type(given)(map(even, given)) if isinstance(given, list | tuple) else given

    return lambda *args, **options: function(*map(even, args), **{k: even(v) for k, v in options.items()})


def _replace(function: Any, other: Any) -> None:
    """Wherever the library has it; tests are imported afterwards, from rooms that show what their files define."""
    other = functools.wraps(function)(lambda *args, _other=other, **options: _other(*args, **options))
    for module in [m for name, m in sys.modules.items() if name.startswith("regard") and isinstance(m, ModuleType)]:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, other)


class _Verdicts:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> None:
        node = item.nodeid.partition("[")[0]
        error = None if call.excinfo is None else call.excinfo.value
        if isinstance(error, AssertionError | pytest.fail.Exception):
            self.found[node] = "fails"
        elif error is not None:
            if self.found.get(node) != "fails":
                self.found[node] = f"breaks: {type(error).__name__}"
        else:
            self.found.setdefault(node, "passes")


def _verdicts(card: regard.Card) -> dict[str, str]:
    switch_off(card)
    plugin = _Verdicts()
    options = ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "--rootdir", "."]
    pytest.main([*options, *claims.nodes(card)], plugins=[plugin])
    return {node: plugin.found.get(node, "breaks: it can't be collected") for node in claims.nodes(card)}


def verdicts(name: str) -> dict[str, str]:
    """In a child of this process, which has loaded the libraries and changed nothing yet."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with os.fdopen(write, "wb") as out:
            pickle.dump(_verdicts(regard.card(name)), out)
            out.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as given:
        held = given.read()
    os.waitpid(child, 0)
    return pickle.loads(held) if held else dict.fromkeys(claims.nodes(regard.card(name)), "breaks: the process")


def main(arguments: list[str]) -> None:
    os.chdir(claims.ROOT)
    torch.set_num_threads(1)
    file = Path(arguments[arguments.index("--json") + 1]).resolve() if "--json" in arguments else None
    wanted = [a for a in arguments if a in catalog.cards()] or sorted(catalog.cards())
    table = {}
    for name in wanted:
        table[name] = verdicts(name)
        for node, verdict in table[name].items():
            print(f"{name:32} {verdict:24} {node}", flush=True)
    if file is not None:
        file.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Asking for an analysis by the name on its card: it is given what its arguments name, as far as that is there."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter
from typing import Any

from regard import catalog
from regard.checks import choice, refuse
from regard.inspect.inputs import SEEING
from regard.inspect.layers import LayerTrace
from regard.inspect.traced import Traced

Offers = Mapping[str, Callable[[], Any]]
"""What arguments may be named -> what stands for them, worked out when one asks; None, or a LookupError that says why,
where it is not there."""


def ask(name: str, offers: Offers, options: Mapping[str, Any]) -> Any:
    """Call the analysis of that card, each argument from `options`, else from `offers`, else its default.

    Raises:
        ValueError: no analysis of that name, an option that it has not, an argument that nobody has.
    """
    known, who = catalog.analyses(), f"analyse({name!r})"
    if name not in known and name in catalog.names():
        refuse("analyse", "name", "is a mechanism's", repr(name), f"an analysis: one of {', '.join(known)}")
    choice("analyse", known, name=name)
    card = catalog.card(name)
    for option in options:
        choice(who, card.options, option=option)
    given, missing = dict(options), {}
    for argument, default in card.options.items():
        if argument in given:
            continue
        try:
            found, why = offers.get(argument, lambda: None)(), "no trace tells it"
        except LookupError as error:
            found, why = None, str(error)
        if found is not None:
            given[argument] = found
        elif default is Parameter.empty:
            missing[argument] = why
    if missing:
        wanted = " and ".join(f"{argument}=" for argument in missing)
        refuse(who, ", ".join(missing), "is missing", "; ".join(dict.fromkeys(missing.values())), wanted)
    return card.builder(**given)


def offers(trace: Traced, chosen: Callable[[], tuple[LayerTrace, ...]], side: str | None) -> Offers:
    """What there is of a trace and of the chosen layers; see `regard.inspect.trace.Trace.analyse`."""

    def one(name: str) -> Any:
        if len(layers := chosen()) != 1:
            raise LookupError(f"it is one layer's, and here are {len(layers)}: give layer=")
        return getattr(layers[0], name)

    def hidden() -> Any:
        prefix = f"{side}_" if side in ("encoder", "decoder") else ""
        found = getattr(trace.output, f"{prefix}hidden_states", None)
        if found is None:
            raise LookupError("the model put out no hidden states: call it with output_hidden_states=True")
        return found

    def pictured(name: str) -> Any:
        if trace.grid is None:
            return None
        length = trace.extra_tokens + trace.grid[0] * trace.grid[1]
        fits = all(x.side in SEEING and x.shape[2:] == (length, length) for x in chosen())
        return getattr(trace, name) if fits else None

    return {
        "attention": lambda: [x.weights() for x in chosen()],
        **{name: partial(one, name) for name in ("q", "k", "v", "scale")},
        "hidden": hidden,
        **{name: partial(pictured, name) for name in ("grid", "extra_tokens")},
        **{name: partial(getattr, trace, name) for name in ("tokens", "images", "output")},
    }

"""Bridge for files in the former form, until all are in the new one."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from regard.cards import FEATURES, PLAIN, TRAITS, Cost, Paper  # noqa: F401
from regard.cards import Card as _Card
from regard.shapes import HeadShape

SLOTS = ()


@dataclass
class Card:
    name: str
    family: str
    gist: str
    equation: str
    paper: Paper
    slots: Any = None
    build: Any = None
    protocol: Any = "TokenMixer"
    inputs: Any = None
    supports: frozenset[str] = FEATURES
    traits: frozenset[str] = frozenset()
    cost: Cost = field(default_factory=lambda: Cost("2*B*H*T*S*D", "2*S*G*D"))
    claim: str = ""
    differs: tuple[str, ...] = ()
    verified: Any = "equation"
    example: Any = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    exceptions: Any = field(default_factory=dict)


def register(old: Card) -> Any:
    rest = {k: v for k, v in vars(old).items() if k not in ("name", "family", "gist", "paper", "slots", "build")}
    card = _Card(old.name, papers=(old.paper,), gist=old.gist, **rest)
    builder = old.slots or old.build
    if old.protocol == "Analysis":
        card.function(builder)
        return card

    def made(*, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, **own: Any) -> Any:
        own.pop("device", None), own.pop("dtype", None)
        return builder(HeadShape(dim, num_heads, num_kv_heads, head_dim), **own)

    mine = [
        p for p in inspect.signature(builder).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in ("device", "dtype")
    ]  # fmt: skip
    names = {p.name for p in mine}
    shape = [p for p in list(inspect.signature(made).parameters.values())[:4] if p.name not in names]
    made.__signature__ = inspect.Signature([*shape, *mine])  # type: ignore[attr-defined]
    made.__module__, made.__qualname__ = builder.__module__, builder.__qualname__ + old.name
    (card.fills() if old.slots else card.module)(made)
    return card

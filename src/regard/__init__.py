"""Every attention mechanism worth knowing behind one interface."""

__version__ = "0.1.0"

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard import heads, inspect, kinds, laws, masks, normalizers, positions, scores, stages
    from regard.cards import Card, Cost, Paper
    from regard.catalog import analyses, card, create, mechanisms
    from regard.inspect.edges import edge_weights
    from regard.inspect.effective import effective_weights
    from regard.inspect.trace import trace
    from regard.integrations.pretrained import convert_layer, convertible, layer_state, load_layer
    from regard.integrations.transformers import swap
    from regard.integrations.transformers_heads import scale_heads
    from regard.integrations.transformers_loaded import load_swapped
    from regard.integrations.transformers_prune import prune_heads
    from regard.kernels import Plan
    from regard.laws import check
    from regard.pipeline import Attention, HeadMixer, KVCache, attention, plan
    from regard.stages import share

_FROM = {
    "Attention": "regard.pipeline",
    "Card": "regard.cards",
    "Cost": "regard.cards",
    "HeadMixer": "regard.pipeline",
    "KVCache": "regard.pipeline",
    "Paper": "regard.cards",
    "Plan": "regard.kernels",
    "analyses": "regard.catalog",
    "attention": "regard.pipeline",
    "card": "regard.catalog",
    "check": "regard.laws",
    "convert_layer": "regard.integrations.pretrained",
    "convertible": "regard.integrations.pretrained",
    "create": "regard.catalog",
    "edge_weights": "regard.inspect.edges",
    "effective_weights": "regard.inspect.effective",
    "layer_state": "regard.integrations.pretrained",
    "load_layer": "regard.integrations.pretrained",
    "load_swapped": "regard.integrations.transformers_loaded",
    "mechanisms": "regard.catalog",
    "plan": "regard.pipeline",
    "prune_heads": "regard.integrations.transformers_prune",
    "scale_heads": "regard.integrations.transformers_heads",
    "share": "regard.stages",
    "swap": "regard.integrations.transformers",
    "trace": "regard.inspect.trace",
}
"""Name -> the module that has it, imported when the name is first asked for: `import regard` loads no torch."""

__all__ = [
    "Attention",
    "Card",
    "Cost",
    "HeadMixer",
    "KVCache",
    "Paper",
    "Plan",
    "analyses",
    "attention",
    "card",
    "check",
    "convert_layer",
    "convertible",
    "create",
    "edge_weights",
    "effective_weights",
    "heads",
    "inspect",
    "kinds",
    "laws",
    "layer_state",
    "load_layer",
    "load_swapped",
    "masks",
    "mechanisms",
    "normalizers",
    "plan",
    "positions",
    "prune_heads",
    "scale_heads",
    "scores",
    "share",
    "stages",
    "swap",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        from regard.rooms import FIRST

        with FIRST:
            found = getattr(import_module(_FROM[name]), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from regard.rooms import FAMILIES

    rooms = (
        name for name in (*FAMILIES, "integrations", "prompts", "tasks") if find_spec(f"{__name__}.{name}") is not None
    )
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *rooms})

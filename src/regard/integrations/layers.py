"""Which modules of a transformers model attend through its registry, and where they stand."""

import functools
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of a model that attends through transformers' registry."""

    name: str
    """Its path in the model."""
    module: nn.Module
    index: int
    """As the model counts (layer_idx), else in order within its stack."""
    kind: Literal["self", "cross"]
    side: str
    """Which stack it belongs to: "encoder", "decoder", "text", "vision", or "" where there is only one."""


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """The model's attention layers, in order of its modules; those that attend in a way of their own are left out."""
    found: list[Layer] = []
    counts: dict[tuple[str, str], int] = {}
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for name, module in model.named_modules():
        if hasattr(module, "set_attn_implementation") or _asks(module) is None:
            continue
        kind = _kind(name, module)
        side = _side(name, encoder_decoder)
        order = counts.get((side, kind), 0)
        counts[side, kind] = order + 1
        index = getattr(module, "layer_idx", None)
        found.append(Layer(name, module, index if isinstance(index, int) else order, kind, side))
    return tuple(found)


def check_model(model: object) -> None:
    """Raises TypeError or ValueError, with the reason, unless the model's layers ask transformers' registry."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"model: expected a transformers model (a PreTrainedModel), got {type(model).__name__}; "
            "pass the model inside wrappers, such as ddp.module"
        )
    if not layers(model):
        raise ValueError(
            f"model: no layer of {type(model).__name__} asks transformers' attention registry (models with attention "
            "or mixers of their own, such as Longformer, DeBERTa or Mamba, never do), so nothing can be exchanged"
        )


def configs_of(model: nn.Module) -> Iterator[Any]:
    """Every config that names an attention function, outer ones first, each once."""
    seen: set[int] = set()
    held: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    waiting = [config for config in held if hasattr(config, "_attn_implementation")]
    while waiting:
        config = waiting.pop(0)
        if id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        parts = [getattr(config, key, None) for key in config.sub_configs]
        waiting = [part for part in parts if part is not None] + waiting


def _asks(module: nn.Module) -> tuple[dict[str, Any], str] | None:
    """The namespace in which the module's class looks up attention functions, and the name of its eager one there."""
    cls: Any = type(module)
    return _lookup(cls)


@functools.cache
def _lookup(cls: Any) -> tuple[dict[str, Any], str] | None:
    for base in cls.__mro__:
        for method in vars(base).values():
            method = inspect.unwrap(method) if callable(method) else method
            code = getattr(method, "__code__", None)
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                eager = [name for name in code.co_names if name.endswith("eager_attention_forward")]
                return method.__globals__, (eager or ["eager_attention_forward"])[0]
    return None


def _kind(name: str, module: nn.Module) -> Literal["self", "cross"]:
    crossed = any(word in name.lower() for word in ("cross", "encdec", "encoder_attn"))
    return "cross" if crossed or getattr(module, "is_cross_attention", False) is True else "self"


def _side(name: str, encoder_decoder: bool) -> str:
    for part in name.split("."):
        if encoder_decoder and part in ("encoder", "decoder"):
            return part
        if part in ("text_model", "vision_model"):
            return part.removesuffix("_model")
    return ""

"""What stands on a swapped layer, and the attention function that asks it: all goes where copies of the layer go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.integrations.interface import plain_name
from regard.integrations.slots import About, Parts
from regard.integrations.transformers_call import compute, maps, read
from regard.integrations.transformers_check import incoming
from regard.integrations.transformers_report import Row, count

if TYPE_CHECKING:
    from regard.integrations.transformers_kept import KeptLayer

PLACE = "_regard_kept"
"""Under what a tensor of keys has the layer of a cache that keeps less, which they are for."""


@dataclass(eq=False)
class Called:
    """How a model and its sub-models are called. Layers and hooks have the same one, and those of a copy another."""

    heard: list[bool] = field(default_factory=list)
    """Of each model that runs, outer ones first, whether it was asked for attention maps, by output_attentions=True or
    its config: not all models tell their layers."""

    @property
    def asked(self) -> bool:
        return bool(self.heard) and self.heard[-1]


@dataclass(eq=False)
class Entry:
    """What stands on a swapped layer."""

    held: Parts | str
    """The parts; those with parameters stand in the layer itself, under this name."""
    heads: Bool[Tensor, " H"] | None
    row: Row
    called: Called
    about: About
    named: tuple[str, Mapping[str, Any]] | None
    """The mechanism's name and options as they were given; None where parts were handed in."""
    keeps: bool = False
    """Whether the swap came with a cache policy."""

    def parts(self, module: nn.Module) -> Parts:
        return getattr(module, self.held) if isinstance(self.held, str) else self.held


class Attending:
    """The attention function of a swapped model. What it is to do in a layer stands on the layer."""

    def __init__(self, place: str, measure: str) -> None:
        self.place, self.measure = place, measure

    def entry(self, module: nn.Module) -> Entry | None:
        """None for a layer that stays as it was."""
        return getattr(module, self.place, None)

    def __call__(
        self, original: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        entry = self.entry(module)
        layer: "KeptLayer | None" = getattr(k, PLACE, None)
        if layer is not None:
            return self.kept(entry, layer, module, q, k, v, mask, **options)
        if entry is None:
            return original(module, q, k, v, mask, **options)
        if torch.compiler.is_compiling() and not entry.parts(module).placeless:
            return self.uncompiled(entry, original, module, q, k, v, mask, **options)
        return self.attend(entry, original, module, q, k, v, mask, **options)

    @torch.compiler.disable
    def uncompiled(self, *given: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Places come from Python's numbers, which with a static cache are others at each token."""
        return self.attend(*given, **options)

    @torch.compiler.disable
    def kept(
        self,
        entry: Entry | None,
        layer: "KeptLayer",
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Over what a policy keeps."""
        assert entry is not None, "only layers that are swapped have such a cache"
        from regard.integrations.transformers_kept import kept_call

        call, parts = kept_call(layer, module, q, k, v, mask, options), entry.parts(module)
        changed = parts.applied(call)
        entry.row.calls += 1
        out = parts.gated(compute(changed, parts.kernel))
        return out, maps(changed, parts.kernel, changed.k) if call.wants_weights or entry.called.asked else None

    def attend(
        self, entry: Entry, original: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        call, parts = read(module, q, k, v, mask, **options), entry.parts(module)
        changed = parts.applied(call)
        if parts.sparse:
            count(entry.row, call.problem, changed, mass=self.measure == "mass")
            entry.row.dense += parts.dense_now(call)
        elif not torch.compiler.is_compiling():  # a number that changes with each call would be compiled anew
            entry.row.calls += 1
        out = parts.gated(compute(changed, parts.kernel))
        seen = maps(changed, parts.kernel, k) if call.wants_weights or entry.called.asked else None
        if entry.heads is None:
            return out, seen
        here = entry.heads.to(out.device)
        out = torch.where(here[:, None], out, original(module, q, k, v, mask, **options)[0])
        if seen is not None:
            exact = maps(call.problem, "auto", k)
            seen = None if exact is None else torch.where(here[:, None, None], seen, exact)
        return out, seen


# Hooks of a copied module are called with the copy, and what `partial` holds is copied with it: closures would go on to
# mean the original.


def fed(module: nn.Module, place: str) -> list[Callable[[], None]]:
    """The layer's gate gets the tokens that come in."""
    hook = module.register_forward_pre_hook(partial(_feed, place), with_kwargs=True)
    return [hook.remove, module.register_forward_hook(partial(_clear, place)).remove]


def _feed(place: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    getattr(module, place).parts(module).x = incoming(args, kwargs)


def _clear(place: str, module: nn.Module, *_: Any) -> None:
    getattr(module, place).parts(module).x = None


def listening(model: nn.Module, called: Called) -> list[Callable[[], None]]:
    """Sub-models listen too: they may be called by themselves, and outlive the model."""
    _configs_may_ask()
    undo: list[Callable[[], None]] = []
    for part in model.modules():
        if hasattr(part, "set_attn_implementation"):
            undo.append(part.register_forward_pre_hook(partial(_hear, called), with_kwargs=True).remove)
            undo.append(part.register_forward_hook(partial(_forget, called), always_call=True).remove)
    return undo


def _hear(called: Called, model: nn.Module, args: Any, kwargs: Any) -> None:
    told = kwargs.get("output_attentions")
    if told is None:
        told = called.asked or getattr(model.config, "output_attentions", False)
    called.heard.append(bool(told))


def _forget(called: Called, *_: Any) -> None:
    called.heard.pop()


@cache
def _configs_may_ask() -> None:
    """`config.output_attentions = True` works under a name of regard's, where transformers' setter takes only "eager".

    Configs of other models go through transformers' setter as before.
    """
    from transformers import PreTrainedConfig

    configs: Any = PreTrainedConfig
    theirs = vars(configs).get("output_attentions")
    if not isinstance(theirs, property) or theirs.fset is None:
        return
    refusing = theirs.fset

    def ask(config: Any, value: bool) -> None:
        name = config._attn_implementation
        if isinstance(name, str) and plain_name(name) != name:
            config._output_attentions = value
        else:
            refusing(config, value)

    configs.output_attentions = theirs.setter(ask)

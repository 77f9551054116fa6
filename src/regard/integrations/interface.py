"""A transformers model switched to another attention function, and back.

transformers looks up by name, in two registries, how a layer attends (AttentionInterface) and which mask its model
builds for that (AttentionMaskInterface). An `Interception` registers a function and a mask function together under a
name of its own and points the model's configs at it. The name stands in the config, so that interceptions nest: what
was there before is what `original` gives.

Which layers it is for stands on the layers, which hold it: so a copy of the model (by deepcopy or pickle, or the
replicas of DataParallel) and a part of it that outlives it attend as the model does, until they are given another
attention function. A layer that holds nothing of a name that its config has goes on as before that name came, so that
models may share a config, and a name whose interception is over harms nobody.
"""

import functools
import itertools
import uuid
import weakref
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from regard.integrations.layers import Layer, _asks, check_model, configs_of, layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ForOriginal",
    "Interception",
    "Layer",
    "_asks",
    "check_model",
    "configs_of",
    "interceptions",
    "layers",
    "plain_name",
    "resolve",
]

AttentionFunction = Callable[..., tuple[Tensor, Any]]
"""transformers': f(module, query, key, value, attention_mask, **options) -> ((B, T, H, V), weights or None)."""
Interceptor = Callable[..., tuple[Tensor, Any]]
"""f(original, module, query, key, value, attention_mask, **options): the same, with what would have run in front."""
MaskFunction = Callable[..., Any]
"""f(*, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, config, ...)."""


@runtime_checkable
class ForOriginal(Protocol):
    """A mask that can also say what the original function would have been given."""

    def for_original(self) -> Any: ...


_numbers = itertools.count()
_HERE = uuid.uuid4().hex[:8]
"""What tells this process's names from those in models that were made elsewhere."""


def unique(what: str) -> str:
    """A name that nothing else has."""
    return f"{what}_{_HERE}_{next(_numbers)}"


@dataclass
class _Name:
    """What is known of a name that configs may have. It is never forgotten: a config may have been copied."""

    below: str | None
    """What stood in the config before."""
    wraps: bool = True
    """Whether its mask is that of what stood there before."""
    held: int = 0
    """How many interceptions have it: a model that is unpickled where it was pickled brings another one."""
    owner: "weakref.ref[Interception] | None" = None


_names: dict[str, _Name] = {}


class Interception:
    """`model` attends through `function` until `restore`, which leaves the `with` block too, also after an error.

    The layers keep it alive, and the registries no longer than they do: with the last layer the function is let go, and
    the configs are as they were.

    Args:
        model: a transformers model.
        function: called for every attention layer with the function that would have run, and transformers' arguments.
        mask: builds the masks that `function` gets, given the function that builds them for the original functions, and
            transformers' arguments. Default: that function itself.

    Raises:
        TypeError: no transformers model. ValueError: a model none of whose layers asks the registry.
    """

    def __init__(self, model: "PreTrainedModel", function: Interceptor, *, mask: MaskFunction | None = None):
        check_model(model)
        configs = list(configs_of(model))
        before = [config._attn_implementation for config in configs]
        first, held = unique("regard"), list(dict.fromkeys([model.config._attn_implementation, *before]))
        names = {earlier: f"{first}_{n}" if n else first for n, earlier in enumerate(held)}  # one name for each
        self._set(function, mask, {name: earlier for earlier, name in names.items()}, configs)
        self._modules: weakref.WeakSet[Any] = weakref.WeakSet(m for m in model.modules() if _asks(m) is not None)
        for module in self._modules:
            _mark(module, {**_marks(module), **dict.fromkeys(self.names, self)})
        try:
            model.set_attn_implementation(first)
            for config, earlier in zip(configs, before, strict=True):
                if config._attn_implementation == first:
                    config._attn_implementation = {"": names[earlier]}  # a dict leaves the sub-configs as they are
        except BaseException:
            self.restore()
            raise

    def _set(
        self, function: Interceptor, mask: MaskFunction | None, below: dict[str, str | None], configs: list[Any]
    ) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        self.name, self.names, self.order = next(iter(below)), tuple(below), next(_numbers)
        self.active = True
        self._function, self._mask, self._configs = function, mask, configs
        for name, earlier in below.items():
            known = _names.setdefault(name, _Name(earlier))
            known.below, known.wraps, known.held = earlier, mask is None, known.held + 1
            known.owner = weakref.ref(self)
            original = functools.partial(_mask_below, name)
            AttentionInterface.register(name, functools.partial(_attend, name))
            AttentionMaskInterface.register(name, original if mask is None else functools.partial(mask, original))
        weakref.finalize(self, _retire, self.names, configs).atexit = False  # type: ignore[misc]

    @property
    def wraps(self) -> bool:
        """Whether it goes on with the masks of what it stands on: it may add to that, but not take its place."""
        return self._mask is None

    def original(self, module: nn.Module) -> AttentionFunction:
        """The function that this layer would have used."""
        return resolve(module, self.original_name(module))

    def original_name(self, module: nn.Module) -> str | None:
        """The name of that function: "eager", "sdpa", ..., or that of an earlier interception."""
        config: Any = module.config
        name = config._attn_implementation
        while name in _names and name not in self.names:
            name = _names[name].below
        return _names[name if name in _names else self.name].below

    def restore(self) -> None:
        """Put back what was there before. Calling it again does nothing. Copies of the model stay as they are."""
        if not self.active:
            return
        self.active = False
        kept = {name for module in self._modules for name in _marks(module) if name not in self.names}
        for config in self._configs:
            if config._attn_implementation in self.names:
                config._attn_implementation = {"": _under(config, kept)}
        for module in self._modules:
            _mark(module, {name: held for name, held in _marks(module).items() if held is not self})

    def __enter__(self) -> "Interception":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __deepcopy__(self, memo: Any) -> "Interception":
        return self

    def __reduce__(self) -> Any:
        if "<locals>" in getattr(self._function, "__qualname__", ""):
            raise TypeError(
                "pickle: the model can't be written to a file (got one whose heads are scaled or watched by functions "
                "that live in this process alone); expected it restored, or its state_dict"
            )
        chain: dict[str, str | None] = {}
        waiting = list(self.names)
        while waiting:
            if (name := waiting.pop()) in _names:
                chain[name] = _names[name].below
                waiting.append(chain[name] or "")
        return _revived, (self._function, self._mask, self.names, chain)


def _revived(
    function: Interceptor, mask: MaskFunction | None, names: tuple[str, ...], chain: dict[str, str | None]
) -> Interception:
    """An interception out of a file. The layers that come with it hold it; it is not known to whom else it belonged."""
    for name, below in chain.items():
        if name not in _names:
            _names[name] = _Name(below)
            _pass_on(name)
    self = Interception.__new__(Interception)
    self._modules = weakref.WeakSet()
    self._set(function, mask, {name: chain[name] for name in names}, [])
    return self


def interceptions(model: nn.Module) -> list[Interception]:
    """Those that are active on the model, the earliest first."""
    found = {held for module in model.modules() for held in _marks(module).values()}
    return sorted(found, key=lambda held: held.order)


def _marks(module: nn.Module) -> dict[str, Interception]:
    """The interceptions that a layer is meant by, under each of their names."""
    return module.__dict__.get("_regard_marks", {})


def _mark(module: nn.Module, held: dict[str, Interception]) -> None:
    if held:
        module.__dict__["_regard_marks"] = held  # a new one: copies of the module may hold the old one
    else:
        module.__dict__.pop("_regard_marks", None)


def _attend(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    """What the registry has under the name."""
    held, original = _marks(module).get(name), functools.partial(_run_below, name)
    if held is None:  # of another model of the same config
        return original(module, query, key, value, attention_mask, **options)
    return held._function(original, module, query, key, value, attention_mask, **options)


def _run_below(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    known = _names[name]
    if known.below == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        raise ValueError(
            "interface: with reorder_and_upcast_attn, eager attention of this model bypasses the registry; set the "
            "config's reorder_and_upcast_attn to False, or load the model with attn_implementation='sdpa'"
        )
    if not known.wraps and isinstance(attention_mask, ForOriginal):
        attention_mask = attention_mask.for_original()
    return resolve(module, known.below)(module, query, key, value, attention_mask, **options)


def _mask_below(name: str, **options: Any) -> Any:
    """The mask that the original functions would have been given, for the arguments of a mask function."""
    from transformers import AttentionMaskInterface

    below, registry = _names[name].below, AttentionMaskInterface()
    return registry[below](**options) if below in registry else None


def _under(config: Any, kept: AbstractSet[str] = frozenset()) -> str | None:
    """What the config says below its topmost name, past names that mean nothing to it: neither one of `kept`, nor that
    of an active interception which it was given to."""
    name = _names[config._attn_implementation].below
    while name in _names and name not in kept:
        held = owner() if (owner := _names[name].owner) is not None else None
        if held is not None and held.active and any(config is one for one in held._configs):
            break
        name = _names[name].below
    return name


def plain_name(name: str | None) -> str | None:
    """What stood in a config before any interception: a name of transformers' own."""
    while name in _names:
        name = _names[name].below
    return name


def _retire(names: tuple[str, ...], configs: list[Any]) -> None:
    """Called when an interception is collected: configs that outlive it are as before, others that have its name act
    as if they were."""
    for config in configs:
        if config._attn_implementation in names:
            config._attn_implementation = {"": _under(config)}
    for name in names:
        known = _names[name]
        known.held -= 1
        if not known.held:
            known.wraps, known.owner = True, None
            _pass_on(name)


def _pass_on(name: str) -> None:
    """Register the name for what stands below it, and nothing more."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, functools.partial(_run_below, name))
    AttentionMaskInterface.register(name, functools.partial(_mask_below, name))


def resolve(module: nn.Module, name: str | None) -> AttentionFunction:
    """The attention function that `name` means for this layer; "eager" is a function of the model's own file."""
    found = _asks(module)
    if found is None:
        raise ValueError(f"interface: {type(module).__name__} does not ask transformers' attention registry")
    namespace, eager = found
    return namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(name, namespace.get(eager))

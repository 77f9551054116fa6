"""A transformers model switched to another attention function, and back.

transformers looks up by name, in two registries, how a layer attends (AttentionInterface) and which mask its model
builds for that (AttentionMaskInterface). An `Interception` registers a function and a mask function together under a
name of its own and points the model's configs at it. The name stands in the config, so that interceptions nest: what
was there before is what `original` gives. Which layers it is for stands on the layers, so that a copy of the model (by
deepcopy, or the replicas of DataParallel) attends as the model does, until that is restored or collected.
"""

import functools
import itertools
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from regard.integrations.layers import Layer, _asks, check_model, layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ForOriginal", "Interception", "Layer", "_asks", "check_model", "interceptions", "layers", "resolve"]

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
_live: "dict[str, Interception]" = {}
"""By every name that a config may have for it."""


def unique(what: str) -> str:
    """A name that nothing else has."""
    return f"{what}_{_HERE}_{next(_numbers)}"


class _Marks:
    """The interceptions that a layer is meant by. It goes where the layer's copies go, but not into a file."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def __deepcopy__(self, memo: Any) -> "_Marks":
        return _Marks(self.names)

    def __reduce__(self) -> Any:
        raise TypeError(
            "pickle: the model can't be written to a file (got one that attends through regard.swap or "
            "regard.scale_heads, "
            "whose functions live in this process alone); expected it restored, or its state_dict"
        )


def _marks(module: nn.Module) -> frozenset[str]:
    held = module.__dict__.get("_regard_marks")
    return frozenset() if held is None else held.names


def _mark(module: nn.Module, names: frozenset[str]) -> None:
    if names:
        module.__dict__["_regard_marks"] = _Marks(names)
    else:
        module.__dict__.pop("_regard_marks", None)


class Interception:
    """`model` attends through `function` until `restore`, which leaves the `with` block too, also after an error.

    The registries keep `function` and `mask` alive until then, so these must not hold the model; once the model is gone
    they are let go too.

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
        from transformers import AttentionInterface, AttentionMaskInterface

        self.name = unique("regard")
        self._function, self._wraps = function, mask is None
        self._configs = list(_configs(model))
        before = [config._attn_implementation for config in self._configs]
        self._base: dict[str, str | None] = {self.name: model.config._attn_implementation}
        """What stood in a config before, by the name that stands there now: one for each of the earlier names."""
        for earlier in before:
            if earlier not in self._base.values():
                self._base[f"{self.name}_{len(self._base)}"] = earlier
        self._modules: weakref.WeakSet[Any] = weakref.WeakSet(m for m in model.modules() if _asks(m) is not None)
        builds = self.original_mask if mask is None else functools.partial(mask, self.original_mask)
        for name in self._base:
            AttentionInterface.register(name, self._attend)
            AttentionMaskInterface.register(name, builds)
            _live[name] = self
        self._finalizer = weakref.finalize(model, _retire, tuple(self._base))
        for module in self._modules:
            _mark(module, _marks(module) | {self.name})
        try:
            model.set_attn_implementation(self.name)
            names = {earlier: name for name, earlier in self._base.items()}
            for config, earlier in zip(self._configs, before, strict=True):
                if config._attn_implementation == self.name:
                    config._attn_implementation = {"": names[earlier]}  # a dict leaves the sub-configs as they are
        except BaseException:
            self.restore()
            raise

    @property
    def wraps(self) -> bool:
        """Whether it goes on with the masks of what it stands on: it may add to that, but not take its place."""
        return self._wraps

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called in a config."""
        return tuple(self._base)

    @property
    def active(self) -> bool:
        """Whether the model still attends through this."""
        return self.name in _live

    def original(self, module: nn.Module) -> AttentionFunction:
        """The function that this layer would have used."""
        return resolve(module, self.original_name(module))

    def original_name(self, module: nn.Module) -> str | None:
        """The name of that function: "eager", "sdpa", ..., or that of an earlier interception."""
        return self._before(module.config)

    def _before(self, config: Any) -> str | None:
        """What stood in this config, or in the one that it is a copy of."""
        name = getattr(config, "_attn_implementation", None)
        while name in _live:
            held = _live[name]
            if held is self:
                return self._base[name]
            name = held._base[name]
        return self._base[self.name]

    def restore(self) -> None:
        """Put back what was there before. Calling it again does nothing."""
        if not self.active:
            return
        for config in self._configs:
            if config._attn_implementation in self._base:
                config._attn_implementation = {"": self._base[config._attn_implementation]}
        for later in _live.values():
            for name, before in later._base.items():
                if before in self._base:
                    later._base[name] = self._base[before]
        for module in self._modules:
            _mark(module, _marks(module) - {self.name})
        self._finalizer.detach()
        _retire(tuple(self._base))

    def __enter__(self) -> "Interception":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _attend(self, module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Any]:
        # Another model may share the config object, and with it the name: it goes on as before.
        if self.name in _marks(module):
            return self._function(self._run_original, module, *args, **options)
        return self._run_original(module, *args, **options)

    def _run_original(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Any]:
        name = self.original_name(module)
        if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
            raise ValueError(
                "interface: with reorder_and_upcast_attn, eager attention of this model bypasses the registry; set the "
                "config's reorder_and_upcast_attn to False, or load the model with attn_implementation='sdpa'"
            )
        if not self._wraps and isinstance(attention_mask, ForOriginal):
            attention_mask = attention_mask.for_original()
        return resolve(module, name)(module, query, key, value, attention_mask, **options)

    def original_mask(self, **options: Any) -> Any:
        """The mask that the original functions would have been given, for the arguments of a mask function."""
        from transformers import AttentionMaskInterface

        name = self._before(options.get("config"))
        registry = AttentionMaskInterface()
        return registry[name](**options) if name in registry else None


def interceptions(model: nn.Module) -> list[Interception]:
    """Those that are active on the model, the earliest first."""
    marked = frozenset().union(*map(_marks, model.modules()))
    return [held for name, held in _live.items() if name in marked]


def resolve(module: nn.Module, name: str | None) -> AttentionFunction:
    """The attention function that `name` means for this layer; "eager" is a function of the model's own file."""
    found = _asks(module)
    if found is None:
        raise ValueError(f"interface: {type(module).__name__} does not ask transformers' attention registry")
    namespace, eager = found
    return namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(name, namespace.get(eager))


def _configs(model: nn.Module) -> Iterator[Any]:
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


def _retire(names: tuple[str, ...]) -> None:
    """Nothing is kept under these names any more; whoever still uses one is told."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in names:
        AttentionInterface.register(name, _ended)
        AttentionMaskInterface.register(name, _ended)
        _live.pop(name, None)


def _ended(*args: Any, **options: Any) -> Any:
    raise RuntimeError(
        "this config names an attention function of regard that has been taken back (a copy made while it was in use?);"
        " call model.set_attn_implementation('sdpa')"
    )

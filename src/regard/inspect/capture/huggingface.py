"""Models of transformers: their attention functions are watched where the models look them up.

A model asks a table, mostly ALL_ATTENTION_FUNCTIONS, for its function at every call. For the time of a trace each entry
is a function that keeps what it is given and calls what stood there. The model's configuration stays as it is, and so
does every branch that asks it for a name, every mask and every kernel: no bit of the output can change.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.checks import refuse
from regard.inspect.capture.masks import as_mask, causal
from regard.inspect.capture.own import of_problem
from regard.inspect.capture.recorder import Recorder
from regard.inspect.effective import measured_weights, undisturbed
from regard.inspect.layers import LayerTrace, Measured
from regard.integrations.interface import Interception, Layer, _asks, interceptions, layers
from regard.integrations.transformers_call import compute, read

Function = Callable[..., Any]

PLAIN = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Names under which transformers keeps softmax attention; any other function is measured."""


@contextmanager
def watching(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Record the layers of `model` that look their attention function up; the tables are as before afterwards."""
    watch = _Watch(model, recorder)
    undo: list[Callable[[], None]] = []
    try:
        for table in watch.tables:
            # "eager" stands in no table: it is what a model falls back to, each model to its own.
            for name in dict.fromkeys([*table, "eager"]):
                function = table.get(name)
                undo.append(_restorer(table, name))
                table[name] = watch.watched(name, function)
        yield
    finally:
        for step in reversed(undo):
            step()


def _restorer(table: MutableMapping[str, Function], name: str) -> Callable[[], None]:
    """What takes an entry back: an entry of the table's own is set again, one that all tables share shows through."""
    try:
        own = table[name]
        del table[name]
    except KeyError:
        return lambda: table.__delitem__(name)
    return lambda: table.__setitem__(name, own)


class _Watch:
    """The layers of one model, and the functions that see them at work."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.recorder = recorder
        self.layers: dict[nn.Module, Layer] = {layer.module: layer for layer in layers(model)}
        self.eager, tables = {}, {}
        for module in self.layers:
            names, eager = _asks(module)  # type: ignore[misc]
            self.eager[module] = names.get(eager)
            tables[id(names["ALL_ATTENTION_FUNCTIONS"])] = names["ALL_ATTENTION_FUNCTIONS"]
        self.tables: list[MutableMapping[str, Function]] = list(tables.values())
        self.interceptions = {name: held for held in interceptions(model) for name in held.names}
        self.within: set[nn.Module] = set()
        self.masks: dict[Any, Any] = {}

    def watched(self, name: str, function: Function | None) -> Function:
        """`function` (None: the module's own eager one), which is recorded when a layer of the model calls it."""

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *rest: Any,
            **options: Any,
        ) -> Any:
            run = function or self.eager.get(module) or _own_eager(module)
            if module not in self.layers or module in self.within or self.goes_on(name, module):
                return run(module, query, key, value, attention_mask, *rest, **options)
            self.within.add(module)
            try:
                self.record(name, run, module, query, key, value, attention_mask, options)
                return run(module, query, key, value, attention_mask, *rest, **options)
            finally:
                self.within.discard(module)

        return attend

    def goes_on(self, name: str, module: nn.Module) -> bool:
        """Whether the function of this name calls what stood there before for this layer, which is watched as well."""
        held = self.interceptions.get(name)
        return held is not None and (held.wraps or ((entry := _entries(held)) is not None and entry(module) is None))

    def record(
        self, name: str, run: Function, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, given: Any, options: Any
    ) -> None:
        at, index = self.layers[module], getattr(module, "layer_idx", None)
        place = self.recorder.place(at.name, at.kind, at.side, index if isinstance(index, int) else None)
        if not self.recorder.wants(place["index"]):
            return
        if options.get("cache") is not None:
            refuse(
                "trace", "inputs", "go through a paged cache, which hides earlier keys", name, "a plain forward pass"
            )
        held, told = self.interceptions.get(name), {**options, "dropout": 0.0}
        with torch.no_grad():
            entry = None if held is None else _entries(held)
            if entry is not None:
                with undisturbed(module):
                    layer = _swapped(place, entry(module), module, q, k, v, given, told)
            else:
                layer = self.layer(place, name, module, q, k, v, given, options)
                if name not in PLAIN:
                    layer = _measured(layer, module, lambda q, k, v: run(module, q, k, v, given, **told)[0])
            self.recorder.keep(layer)

    def layer(
        self,
        place: dict[str, Any],
        name: str,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        given: Any,
        options: Any,
    ) -> LayerTrace:
        """What softmax attention does with these arguments."""
        key = (id(given), q.shape[2], k.shape[2], causal(module, options), options.get("sliding_window"))
        if key not in self.masks:  # layers share masks, and share what is made of them
            self.masks[key] = given, as_mask(given, name, module, q, k, options)
        mask, added = self.masks[key][1]
        bias, scale = options.get("position_bias"), options.get("scaling")
        if bias is not None:
            bias = bias[..., : k.shape[2]] if bias.any() else None
        if added is not None:
            bias = added if bias is None else bias + added
        sinks = options.get("s_aux")
        return LayerTrace(
            **place,
            q=q,
            k=k,
            v=v,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            mask=mask,
            bias=bias,
            softcap=options.get("softcap"),
            sinks=getattr(module, "sinks", None) if sinks is None else sinks,
        )


def _own_eager(module: nn.Module) -> Function:
    """For a module of another model, which looks into the same table while this one is traced."""
    names, eager = _asks(module)  # type: ignore[misc]
    return names[eager]


def _entries(held: Interception) -> Callable[[nn.Module], Any] | None:
    """What a `regard.swap` does in a layer; None for any other interception."""
    return getattr(held._function, "entry", None)


def _swapped(
    place: dict[str, Any], entry: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, given: Any, options: Any
) -> LayerTrace:
    """A layer under `regard.swap`: the pipeline that its parts make of the call."""
    parts = entry.parts(module)
    layer = of_problem(place, parts.applied(read(module, q, k, v, given, **options)))
    if entry.heads is None:
        return layer

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call, here = read(module, q, k, v, given, **options), entry.heads.to(q.device)
        changed = compute(parts.applied(call), parts.kernel)
        return torch.where(here[:, None], changed, compute(call.problem))

    return _measured(replace(layer, q=q, k=k, v=v, logit_rule=None), module, mixed)


def _measured(layer: LayerTrace, module: nn.Module, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LayerTrace:
    """The layer with the weights that `run`, from q, k, v to (B, T, H, V), gives to values: nothing else is known."""

    def measure(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with undisturbed(module):
            return measured_weights(lambda values: run(q, k, values).transpose(1, 2), v)

    return replace(layer, weight_rule=Measured(measure, layer.q.dtype))

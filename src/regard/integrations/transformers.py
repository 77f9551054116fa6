"""Another attention inside a transformers model, through its own extension points: `swap`, and gates on its heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.integrations.interface import Interception, Layer, check_model, interceptions
from regard.integrations.interface import layers as attention_layers
from regard.integrations.slots import (
    About,
    Parts,
    check_mechanism,
    slots_of,
    start_as_original,
    why_not,
)
from regard.integrations.transformers_call import compute, read, weights
from regard.integrations.transformers_check import about_layers, changed_outputs, incoming, self_check
from regard.integrations.transformers_heads import scale_heads
from regard.integrations.transformers_masks import lazy_mask
from regard.integrations.transformers_report import Report, Row, count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Swap", "scale_heads", "swap"]

Heads = int | slice | Sequence[int] | None
Which = int | slice | Sequence[int] | Callable[[Layer], bool] | None


def swap(
    model: "PreTrainedModel",
    mechanism: Any,
    *,
    layers: Which = None,
    heads: Heads = None,
    check: bool | Mapping[str, Tensor] = True,
    measure: Literal["density", "mass"] = "density",
    **options: Any,
) -> "Swap":
    """Run a transformers model with another attention: until `restore()`, or within a `with` block.

        with regard.swap(model, "xattention", threshold=0.95) as swapped:
            model.generate(...)
        print(swapped.report())

    The model's projections, positions, caches and masks stay its own; only what happens to queries, keys and values
    changes. A mechanism with parameters gets new ones in each layer (`layer.regard`, where optimizers and state dicts
    see them), set to where the layer puts out what it did before, as nearly as the mechanism can; `notes` says how
    near that is. They leave the model with the swap, and stay in `Swap.parts`.

    Args:
        mechanism: a name of the catalogue ("softmax", "window", "xattention", "gated", "gated+entmax", ...), a part
            (a Mask, Selector, Normalizer, Position, ...), or a mapping of slots to parts.
        layers: which of `regard.integrations.interface.layers(model)`: numbers, a slice, or a function of a Layer.
            Default: all that the mechanism can serve; `notes` names the others.
        heads: which heads; the other heads, and the other layers, go on as before.
        check: first run a few random tokens, padded left and right and with a cache, under eager and under regard's
            exact attention, and raise unless they agree. A mapping is a batch to do that with; False leaves it out.
        measure: what `report()` tells of mechanisms that leave pairs out; "mass" computes exact attention's scores too.
        options: of the mechanism (`regard show NAME`), and `kernel`.

    Raises:
        TypeError, ValueError: what can't be swapped, with the reason. The model is then as it was before.
    """
    supports = check_mechanism(mechanism)
    check_model(model)
    if any(held.wraps for held in interceptions(model)):
        raise ValueError(
            "swap: heads of this model are scaled now, which a swap would undo; scale them inside the swap"
        )
    if measure not in ("density", "mass"):
        raise ValueError(f"swap: measure must be 'density' or 'mass', got {measure!r}")
    if isinstance(check, Mapping) and not check:
        raise ValueError("swap: check must be a batch of inputs, True or False, got an empty mapping")
    checked = None if check is False else self_check(model, None if check is True else check)
    about = about_layers(model) if checked is None else checked.about
    chosen, notes = _fill(_wanted(model, layers), about, layers is not None, mechanism, options, supports)
    swapped = Swap(model, [(layer, parts, _heads(heads, about[layer.name])) for layer, parts in chosen], notes, measure)
    if checked is not None:
        try:
            off = changed_outputs(model, checked)
        except BaseException:
            swapped.restore()
            raise
        same = off <= max(1e-5, 4 * checked.difference)
        found = "the same as before" if same else f"something else, off by {off:.2g} of its largest value"
        swapped.notes.append(f"on the sample tokens the model puts out {found}")
        swapped.forget()
    return swapped


class Swap:
    """A model that attends in another way until `restore`. Made by `swap`.

    Attributes:
        layers: those that changed.
        parts: by layer name, the mechanism's parts there, with their parameters.
        notes: what was left as it was and why, and how near to the original the model starts.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        chosen: Sequence[tuple[Layer, Parts, Bool[Tensor, "H"] | None]],
        notes: Sequence[str],
        measure: str,
    ) -> None:
        self.model, self.notes = model, list(notes)
        self.layers = tuple(layer for layer, _, _ in chosen)
        self.parts = {layer.name: parts for layer, parts, _ in chosen}
        self._attending = _Attending(
            {id(layer.module): _Entry(parts, heads, Row(layer.name)) for layer, parts, heads in chosen}, measure
        )
        self._undo: list[Callable[[], None]] = []
        try:
            for layer, parts, _ in chosen:
                self._undo += _placed(layer.module, parts)
            self._undo += _listening(model, self._attending)
            interception = Interception(model, self._attending, mask=lazy_mask)
            self._undo.append(interception.restore)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the model back as it was before. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def report(self) -> Report:
        """What was computed since the swap began, by layer: calls, density, kept mass. Print it."""
        return Report(tuple(entry.row for entry in self._attending.entries.values()))

    def forget(self) -> None:
        """Start the report anew."""
        for entry in self._attending.entries.values():
            entry.row = Row(entry.row.layer)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mechanism's own, which the model did not have before."""
        for parts in self.parts.values():
            yield from parts.parameters()

    def __enter__(self) -> "Swap":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return "\n".join([f"swap of {len(self.layers)} layers of {type(self.model).__name__}", *self.notes])


@dataclass(eq=False)
class _Entry:
    parts: Parts
    heads: Bool[Tensor, "H"] | None
    row: Row


class _Attending:
    """The attention function of a swapped model. It holds no part of the model, which the registry would keep alive."""

    def __init__(self, entries: dict[int, _Entry], measure: str) -> None:
        self.entries, self.measure = entries, measure
        self.asked = False
        """Whether the model was called with output_attentions=True, which not all of them pass on to their layers."""

    def __call__(
        self, original: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        entry = self.entries.get(id(module))
        if entry is None:
            return original(module, q, k, v, mask, **options)
        call, parts = read(module, q, k, v, mask, **options), entry.parts
        changed = parts.applied(call)
        if parts.sparse:
            count(entry.row, call.problem, changed, mass=self.measure == "mass")
            entry.row.dense += parts.dense_now(call)
        else:
            entry.row.calls += 1
        out = parts.gated(compute(changed, parts.kernel))
        seen = weights(changed, parts.kernel) if call.wants_weights or self.asked else None
        if entry.heads is None:
            return out, seen
        here = entry.heads.to(out.device)
        out = torch.where(here[:, None], out, original(module, q, k, v, mask, **options)[0])
        if seen is not None:
            exact = weights(call.problem)
            seen = None if exact is None else torch.where(here[:, None, None], seen, exact)
        return out, seen


def _fill(
    wanted: Sequence[Layer],
    about: Mapping[str, About],
    strict: bool,
    mechanism: Any,
    options: Mapping[str, Any],
    supports: frozenset[str],
) -> tuple[list[tuple[Layer, Parts]], list[str]]:
    """The layers that can take the mechanism, with its parts for each, and notes on the others."""
    found, notes = [], []
    for layer in wanted:
        if layer.name in about:
            slots = slots_of(mechanism, about[layer.name].shape, options)
            reasons = why_not(slots, about[layer.name], supports)
        else:
            slots, reasons = {}, ["it did not run on the sample tokens"]
        if not reasons:
            found.append((layer, Parts(slots)))
        elif strict:
            raise ValueError(f"swap: {layer.name} can't be swapped: {'; '.join(reasons)}")
        else:
            notes.append(f"{layer.name} stays as it was: {'; '.join(reasons)}")
    if not found:
        reasons = list(dict.fromkeys(note.partition(": ")[2] for note in notes)) or ["none was chosen"]
        raise ValueError(f"swap: no layer can be swapped: {' | '.join(reasons)}")
    return found, notes


def _placed(module: nn.Module, parts: Parts) -> list[Callable[[], None]]:
    """Put the parts into the layer, and give what takes them out again."""
    undo: list[Callable[[], None]] = []
    if any(True for _ in parts.children()):
        held = next((p for p in module.parameters() if p.is_floating_point()), None)
        if held is not None:
            parts.to(held.device, held.dtype)
        for part in parts.children():
            start_as_original(part)
        parts.train(module.training)
        names = (name for n in range(1, 100) if not hasattr(module, name := "regard" if n == 1 else f"regard{n}"))
        name = next(names)
        module.add_module(name, parts)
        undo.append(lambda: delattr(module, name))
    if parts.gate is not None:

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            parts.x = incoming(args, kwargs)

        def after(*_: Any) -> None:
            parts.x = None

        undo += [module.register_forward_pre_hook(before, with_kwargs=True).remove]
        undo += [module.register_forward_hook(after).remove]
    return undo


def _listening(model: nn.Module, attending: _Attending) -> list[Callable[[], None]]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        attending.asked = bool(kwargs.get("output_attentions"))

    def after(*_: Any) -> None:
        attending.asked = False

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    return [hook.remove, model.register_forward_hook(after, always_call=True).remove]


def _wanted(model: nn.Module, which: Which) -> tuple[Layer, ...]:
    found = attention_layers(model)
    if which is None:
        return found
    if callable(which):
        return tuple(layer for layer in found if which(layer))
    return tuple(found[n] for n in _numbers("layers", which, len(found)))


def _heads(which: Heads, about: About) -> Bool[Tensor, "H"] | None:
    if which is None:
        return None
    H = about.shape.num_heads
    here = torch.zeros(H, dtype=torch.bool)
    here[_numbers("heads", which, H)] = True
    return here


def _numbers(name: str, which: int | slice | Sequence[int], size: int) -> list[int]:
    """Numbers below `size`, in order, each once; negative ones count from the end."""
    if isinstance(which, slice):
        return list(range(size))[which]
    given = [which] if isinstance(which, int) else list(which)
    for n in given:
        if isinstance(n, bool) or not isinstance(n, int) or not -size <= n < size:
            raise ValueError(f"swap: {name} must be numbers below {size}, got {n!r}")
    return sorted({n % size for n in given})

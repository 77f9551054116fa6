"""Another attention inside a transformers model, through its own extension points: `swap`, and gates on its heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.catalog import create
from regard.integrations.interface import Interception, Layer, check_model, interceptions, unique
from regard.integrations.interface import layers as attention_layers
from regard.integrations.slots import (
    About,
    Parts,
    check_mechanism,
    slots_of,
    start_as_original,
    why_not,
)
from regard.integrations.transformers_attend import Attending, Called, Entry, fed, listening
from regard.integrations.transformers_check import about_layers, changed_outputs, self_check
from regard.integrations.transformers_heads import scale_heads
from regard.integrations.transformers_masks import formed_when_compiled, lazy_mask
from regard.integrations.transformers_names import register
from regard.integrations.transformers_report import Report, Row
from regard.integrations.transformers_saved import save_swapped
from regard.kinds import CachePolicy
from regard.spec import Stack, parse_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from regard.integrations.transformers_kept import Keeping

__all__ = ["Swap", "register", "scale_heads", "swap"]

Heads = int | slice | Sequence[int] | None
Named = tuple[str, Mapping[str, Any]] | None
"""A mechanism's name and options as they were given; None where parts were handed in."""
Which = int | slice | Sequence[int] | Callable[[Layer], bool] | None


def swap(
    model: "PreTrainedModel",
    mechanism: Any = None,
    *,
    cache: CachePolicy | str | None = None,
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

        with regard.swap(model, cache=regard.create("snapkv", budget=512)):
            model.generate(...)

    The model's projections, positions, caches and masks stay its own; only what happens to queries, keys and values
    changes. A mechanism with parameters gets new ones in each layer (`layer.regard`, where optimizers and state dicts
    see them), set to where the layer puts out what it did before, as nearly as the mechanism can; `notes` says how
    near that is. They leave the model with the swap, and stay in `Swap.parts`.

    Args:
        mechanism: a name of the catalogue ("softmax", "window", "xattention", "gated", "gated+entmax", ...), a part
            (a Mask, Selector, Normalizer, Position, ...), a mapping of slots to parts, or several for the layers one
            after the other: "window(window=64)*3+softmax" repeats down `interface.layers(model)`, whichever of these
            `layers` names. None with a `cache`: the model's own attention.
        cache: what is kept of past keys and values: a policy, or its name with options, "snapkv(budget=512)". Caches
            that the model makes or is given empty (a DynamicCache) then hold that alone; layers with a sliding window
            keep their own.
        layers: which of `regard.integrations.interface.layers(model)`: numbers, a slice, or a function of a Layer.
            Default: all that the mechanism can serve; `notes` names the others.
        heads: which heads; the other heads, and the other layers, go on as before.
        check: first run a few random tokens, padded left and right and with a cache, under eager and under regard's
            exact attention, and raise unless they agree. A mapping is a batch to do that with; False leaves it out.
        measure: what `report()` tells of mechanisms that leave pairs out; "mass" computes exact attention's scores too.
        options: of the mechanism (`regard show NAME`), and `kernel`; of several mechanisms, `kernel` alone.

    Raises:
        TypeError, ValueError: what can't be swapped, with the reason. The model is then as it was before.
    """
    if mechanism is None and cache is None:
        raise TypeError("swap: mechanism is missing (got None); expected one, or a cache=, or both")
    mechanism = "softmax" if mechanism is None else mechanism
    if cache is not None and heads is not None:
        raise ValueError(f"swap: heads can't be picked with a cache (got {heads!r}); expected None, for all heads")
    policy = create(cache) if isinstance(cache, str) else cache
    stack = parse_stack(mechanism) if isinstance(mechanism, str) else None
    supports = {str(one): check_mechanism(one) for one in ([mechanism] if stack is None else map(str, stack.kinds))}
    if isinstance(stack, Stack) and (beside := sorted(options.keys() - {"kernel"})):
        raise ValueError(f"swap: options {beside} are of which of {stack}? write them in brackets behind the name")
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
    all_layers = attention_layers(model)
    each = [mechanism] * len(all_layers) if stack is None else map(str, stack.layers(len(all_layers)))
    mine = {layer.name: one for layer, one in zip(all_layers, each)}
    chosen, notes = _fill(_wanted(model, layers), about, layers is not None, mine, options, supports)
    told = None
    if policy is not None:
        from regard.integrations.transformers_kept import keeping

        told, more = keeping(model, policy, chosen, about)
        notes += more
    swapped = Swap(
        model,
        [
            (layer, parts, facts, _heads(heads, facts), None if stack is None else (mine[layer.name], dict(options)))
            for layer, parts in chosen
            for facts in (about[layer.name],)
        ],
        notes,
        measure,
        told=told,
    )
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
    """A model that attends in another way until `restore`. Made by `swap` and `load_swapped`.

    Copies of the model (by deepcopy, pickle, torch.save, DataParallel) and parts of it that outlive it attend as it
    does then, and go on so when it is restored; `set_attn_implementation` makes them plain.

    Attributes:
        layers: those that changed.
        parts: by layer name, the mechanism's parts there, with their parameters.
        notes: what was left as it was and why, and how near to the original the model starts.
        under: the swaps that `load_swapped` made before this one, as they stood on the model that was saved.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        chosen: Sequence[tuple[Layer, Parts, About, Bool[Tensor, " H"] | None, Named]],
        notes: Sequence[str],
        measure: str,
        under: Sequence["Swap"] = (),
        told: "Keeping | None" = None,
    ) -> None:
        self.model, self.notes, self.under = model, list(notes), tuple(under)
        self.layers = tuple(layer for layer, *_ in chosen)
        self.parts = {layer.name: parts for layer, parts, *_ in chosen}
        attending, called = Attending(unique("_regard_swap"), measure), Called()
        self._entries: list[Entry] = []
        self._undo: list[Callable[[], None]] = []
        try:
            for layer, parts, about, here, named in chosen:
                name, undo = _placed(layer.module, parts)
                self._undo += undo
                entry = Entry(name or parts, here, Row(layer.name), called, about, named, told is not None)
                setattr(layer.module, attending.place, entry)
                self._undo.append(partial(delattr, layer.module, attending.place))
                self._entries.append(entry)
                if parts.gate is not None:
                    self._undo += fed(layer.module, attending.place)
            self._undo += listening(model, called)
            if told is not None:
                from regard.integrations.transformers_kept import giving

                self._undo += giving(model, told)
            everywhere = all(parts.placeless for parts in self.parts.values())
            interception = Interception(model, attending, mask=formed_when_compiled if everywhere else lazy_mask)
            self._undo.append(interception.restore)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the model back as it was before the swap, one that was loaded to the plain host. Calling it again does
        nothing."""
        while self._undo:
            self._undo.pop()()
        for swap in reversed(self.under):
            swap.restore()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the swapped model to a folder, whole; `regard.load_swapped(folder)` gives it back bit for bit.

        transformers writes the host, its config and generation config, as `model.save_pretrained` does: a checkpoint
        that `from_pretrained` loads as the plain model, with a warning that it left something out. What was put in is
        beside it: tensors in `regard.safetensors`, and in `regard.json` what was swapped where, with all options. All
        swaps that stand on the model are written, this one or not.

        Raises:
            ValueError: the swap is over, or something can't be written as data: a mask that is a function, parts of
                classes of your own, options that are no plain values, heads that are scaled now, a host that is
                quantized, on the device "meta", of a class that transformers doesn't have, in several dtypes, or not
                as its config says (with adapters). Nothing is written then.
        """
        if not self._undo:
            raise ValueError("save: the swap was restored, and the model is plain; save before restore()")
        save_swapped(self.model, folder)

    def report(self) -> Report:
        """What was computed since the swap began, by layer: calls, density, kept mass. Print it."""
        return Report(tuple(entry.row for entry in self._entries))

    def forget(self) -> None:
        """Start the report anew."""
        for entry in self._entries:
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


def _fill(
    wanted: Sequence[Layer],
    about: Mapping[str, About],
    strict: bool,
    mechanisms: Mapping[str, Any],
    options: Mapping[str, Any],
    supports: Mapping[str, frozenset[str]],
) -> tuple[list[tuple[Layer, Parts]], list[str]]:
    """The layers that can take their mechanism, with its parts for each, and notes on the others."""
    found, notes = [], []
    for layer in wanted:
        if layer.name in about:
            mechanism = mechanisms[layer.name]
            slots = slots_of(mechanism, about[layer.name].shape, options)
            reasons = why_not(slots, about[layer.name], supports[str(mechanism)])
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


def _placed(module: nn.Module, parts: Parts) -> tuple[str, list[Callable[[], None]]]:
    """Put parts that hold something into the layer. Gives the name there ("" = not there), and what takes them out."""
    if not any(True for _ in parts.children()):
        return "", []
    held = next((p for p in module.parameters() if p.is_floating_point()), None)
    if held is not None:
        parts.to(held.device, held.dtype)
    for part in parts.children():
        start_as_original(part)
    parts.train(module.training)
    names = (name for n in range(1, 100) if not hasattr(module, name := "regard" if n == 1 else f"regard{n}"))
    name = next(names)
    module.add_module(name, parts)
    return name, [partial(delattr, module, name)]


def _wanted(model: nn.Module, which: Which) -> tuple[Layer, ...]:
    found = attention_layers(model)
    if which is None:
        return found
    if callable(which):
        return tuple(layer for layer in found if which(layer))
    return tuple(found[n] for n in _numbers("layers", which, len(found)))


def _heads(which: Heads, about: About) -> Bool[Tensor, " H"] | None:
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

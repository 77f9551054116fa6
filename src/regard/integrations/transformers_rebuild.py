"""The parts of a swap out of its recipe: every number is looked at, and every size, before anything is allocated."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard.checks import choice, flag, refuse, whole
from regard.integrations.recipes import WHO, entries, part_from_data
from regard.integrations.slots import About, Parts, check_mechanism, slots_of, start_as_original, why_not
from regard.kernels import KERNELS
from regard.shapes import HeadShape, head_shape
from regard.slots import SLOTS

_FACTS = ("causal", "windowed", "cross", "rotary", "capped", "sinks")


def slots_for(said: Mapping[str, Any], shape: HeadShape, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """The slots that a swap's recipe fills in a layer of this shape."""
    mechanism: Any = said["mechanism"]
    if mechanism is None:
        mechanism = {slot: part_from_data(part, masks) for slot, part in said["slots"].items()}
    return slots_of(mechanism, shape, {"kernel": said["kernel"]})


def built(slots: Mapping[str, Any]) -> Parts:
    """Parts whose tensors' values are of no account; random generators stay as they are."""
    with torch.random.fork_rng([]):
        parts = Parts(slots)
        for part in parts.children():
            start_as_original(part)
        return parts


def check_swap(said: Any) -> None:
    """Refuse what is no recipe of one swap."""
    entries(said, "a swap", {"mechanism", "slots", "kernel", "measure", "layers"})
    if (said["mechanism"] is None) == (said["slots"] is None):
        refuse(WHO, "a swap", "has both a mechanism and slots, or neither", "that", "one of them, and null")
    if said["mechanism"] is not None and not isinstance(said["mechanism"], str):
        refuse(WHO, "mechanism", "is no text", type(said["mechanism"]).__name__, "names of the catalogue")
    for key in ("slots", "layers"):
        if said[key] is not None and (not isinstance(said[key], dict) or not said[key]):
            refuse(WHO, key, "is no object with anything in it", type(said[key]).__name__, "one entry for each")
    choice(WHO, ("density", "mass"), measure=said["measure"])
    choice(WHO, ("auto", *KERNELS), kernel=said["kernel"])


def rebuilt(
    said: Mapping[str, Any],
    layer: str,
    facts: Any,
    masks: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    largest: int,
) -> tuple[Parts, About, Bool[Tensor, " H"] | None]:
    """One layer's parts without their values, what the layer is, and which heads.

    Args:
        values: what the parts will hold; their shapes are compared before the parts are built.
        largest: no width of the layer is larger.
    """
    about, heads = _about(facts, largest)
    with torch.device("meta"):
        slots = slots_for(said, about.shape, masks)
        want = held_tensors(built(slots))
    supports = check_mechanism(said["mechanism"] or {name: part for name, part in slots.items() if name in SLOTS})
    if reasons := why_not(slots, about, supports):
        refuse(WHO, layer, "can't take what the recipe says", "; ".join(reasons), "what regard.swap would take")
    if odd := sorted(want.keys() ^ values.keys()):
        refuse(
            WHO, layer, "misses a tensor" if odd[0] in want else "has an unknown tensor", odd[0], f"{len(want)} tensors"
        )
    for name, t in want.items():
        held = values[name]
        if held.shape != t.shape or held.is_floating_point() != t.is_floating_point():
            got, expected = (f"{one.dtype} {tuple(one.shape)}" for one in (held, t))
            refuse(WHO, f"{layer}.{name}", "is not what the recipe builds", got, expected)
    return built(slots_for(said, about.shape, masks)), about, heads


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the module's parameters and buffers these values, in the dtypes that these have."""
    for path, t in tensors.items():
        inner, _, name = path.rpartition(".")
        at = module.get_submodule(inner)
        if (old := at._parameters.get(name)) is not None:
            at._parameters[name] = nn.Parameter(t.to(old.device), requires_grad=old.requires_grad)
        else:
            at._buffers[name] = t.to(at.get_buffer(name).device)


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers by name, also under names that share one."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(named)


def _about(facts: Any, largest: int) -> tuple[About, Bool[Tensor, " H"] | None]:
    """What the recipe says of a layer."""
    entries(facts, "a layer", {"shape", "heads", *_FACTS})
    sizes = entries(facts["shape"], "the shape of a layer", {f.name for f in fields(HeadShape)})
    whole(WHO, most=largest, **sizes)
    shape = head_shape(**sizes, who=WHO)
    flag(WHO, **{name: facts[name] for name in _FACTS})
    heads, given = None, facts["heads"]
    if given is not None:
        if not isinstance(given, list):
            refuse(WHO, "heads", "are no list", type(given).__name__, "numbers of heads, or null")
        for head in given:
            whole(WHO, 0, most=shape.num_heads - 1, heads=head)
        heads = torch.zeros(shape.num_heads, dtype=torch.bool)
        heads[given] = True
    return About(shape, **{name: facts[name] for name in _FACTS}), heads

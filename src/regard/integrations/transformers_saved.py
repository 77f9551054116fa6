"""Swapped models as folders: the host as transformers writes it, and beside it what was put in, and how.

    config.json, model.safetensors ...  the host, by its own `save_pretrained`; `from_pretrained` reads it, and warns
                                        that it left out `MARKER`
    regard.safetensors                  the parts' tensors, masks' tensors, and the host's buffers that its file lacks
    regard.json                         what was swapped where, as `regard.integrations.recipes` says it

Only data is read: JSON and safetensors, and classes of transformers and of this library that these name.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard import __version__
from regard.files import write_atomically
from regard.integrations import files
from regard.integrations.interface import configs_of, interceptions, plain_name
from regard.integrations.recipes import part_as_data, spelled, unlike
from regard.integrations.transformers_attend import Attending, Entry
from regard.integrations.transformers_rebuild import built, held_tensors, slots_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "regard.swap/1"
RECIPE, TENSORS = "regard.json", "regard.safetensors"
MARKER = "swapped.load_it_with.regard.load_swapped"
"""A tensor in the host's file that no model knows, so that transformers says it left something out. It holds the sha256
of the recipe."""


@dataclass(frozen=True)
class Standing:
    """One swap that stands on a model; of one with several mechanisms, the layers that have one of them."""

    attending: Attending
    entries: dict[str, tuple[nn.Module, Entry]]
    """By layer name."""


def save_swapped(model: "PreTrainedModel", folder: str | Path) -> None:
    """Write a model with all swaps that stand on it to a folder, from which `regard.load_swapped` reads it.

    As `Swap.save_pretrained`, for a copy of a swapped model, which has no Swap of its own.

    Raises:
        ValueError: what can't be written as data, with the reason, before anything is written.
    """
    folder = Path(folder)
    standing = _standing(model)
    if any(entry.keeps for one in standing for _, entry in one.entries.values()):
        raise ValueError("save: the swap came with a cache policy, which is no part of a model; swap without it")
    tensors: dict[str, Tensor] = {}
    try:
        swaps = [_swap_as_data(n, one, tensors) for n, one in enumerate(standing)]
    except RecursionError:
        raise ValueError("save: a mask is nested too deep to be written as data") from None
    inside = tuple(
        f"{name}.{entry.held}."
        for one in standing
        for name, (_, entry) in one.entries.items()
        if isinstance(entry.held, str)
    )
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(inside)}
    with _as_it_was(model) as names:
        fresh = _check_host(model, state)
        for (
            name,
            buffer,
        ) in model.named_buffers():  # those that are not in the host's file; a cast may have rounded them
            if name in fresh and name not in state and buffer.shape == fresh[name].shape:
                tensors[f"buffer.{name}"] = buffer
        held = files.header_of(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).unlink(missing_ok=True)  # until all is written, there is no swapped model here
        recipe = {
            "format": FORMAT,
            "regard": __version__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": names,
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in held.items()},
            "sha256": files.write(folder / TENSORS, tensors),
            "swaps": swaps,
        }
        text = json.dumps(recipe, indent=1, allow_nan=False).encode()
        marker = torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8)
        model.save_pretrained(folder, state_dict={**state, MARKER: marker})
        write_atomically(folder / RECIPE, text)


def _standing(model: "PreTrainedModel") -> list[Standing]:
    """The swaps on the model, the earliest first."""
    found = []
    for held in interceptions(model):
        if not isinstance(attending := held._function, Attending):
            raise ValueError(
                "save: heads of this model are scaled or watched now by functions that no file holds; save it outside"
            )
        entries = {name: (m, entry) for name, m in model.named_modules() if (entry := attending.entry(m)) is not None}
        for named in {str(entry.named): None for _, entry in entries.values()}:
            mine = {name: (m, entry) for name, (m, entry) in entries.items() if str(entry.named) == named}
            found.append(Standing(attending, mine))
    if not found:
        raise ValueError(
            f"save: {type(model).__name__} is not swapped (any more); use model.save_pretrained, which writes it plain"
        )
    return found


def _swap_as_data(n: int, one: Standing, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What one swap is; its tensors are added."""
    masks: dict[str, Tensor] = {}
    module, entry = next(iter(one.entries.values()))
    parts = entry.parts(module)
    if entry.named is not None:
        said: dict[str, Any] = {"mechanism": spelled(*entry.named), "slots": None}
    else:
        slots = {slot: part_as_data(part, entry.about.shape, masks) for slot, part in parts.filled().items()}
        said = {"mechanism": None, "slots": slots}
    said |= {"kernel": parts.kernel, "measure": one.attending.measure, "layers": {}}
    for name, (module, entry) in one.entries.items():
        parts = entry.parts(module)
        again = built(slots_for(said, entry.about.shape, masks))
        if found := unlike(again, parts):
            raise ValueError(
                f"save: what stands in {name} is not what its description builds ({', '.join(found)[:200]}); was it "
                "changed after the swap, or does it hold what is no number?"
            )
        heads = None if entry.heads is None else entry.heads.nonzero().flatten().tolist()
        said["layers"][name] = {**asdict(entry.about), "heads": heads}
        tensors.update({f"swap{n}.{name}.{inner}": t for inner, t in held_tensors(parts).items()})
    tensors.update({f"swap{n}.{name}": t for name, t in masks.items()})
    return said


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[dict[str, str | None]]:
    """The configs name what stood in them before any swap, so that transformers writes and checks these. Gives the
    names, by the path of the first module that has the config."""
    paths = config_paths(model)
    now = [(config, config._attn_implementation) for config in paths.values()]
    try:
        for config, name in now:
            config._attn_implementation = {"": plain_name(name)}
        yield {path: config._attn_implementation for path, config in paths.items()}
    finally:
        for config, name in now:
            config._attn_implementation = {"": name}


def config_paths(model: nn.Module) -> dict[str, Any]:
    """Every config that names an attention function, by the module and the attributes that lead to it first."""
    of = {id(config): config for config in configs_of(model)}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        waiting: list[tuple[str, Any]] = [(path + ":", getattr(module, "config", None))]
        while waiting:
            at, config = waiting.pop()
            if config is not None and of.pop(id(config), None) is not None:
                found[at] = config
                waiting += [(f"{at}{key}.", getattr(config, key, None)) for key in config.sub_configs]
    return found


def _check_host(model: "PreTrainedModel", state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Refuse a host that its class and config would not build, or that holds nothing. Gives the buffers of what they
    build."""
    import transformers

    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(
            f"save: {kind.__name__} is no class of transformers, so that its name does not say how to build it; save "
            "state_dict() and swap again"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"save: {kind.__name__} is quantized or has adapters, which its file would not hold as it is")
    if empty := [name for name, t in state.items() if t.device.type == "meta"]:
        raise ValueError(f"save: {empty[0]} is on the device 'meta' and holds nothing; expected a model with weights")
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    for name, t in state.items():
        if t.is_floating_point() and t.dtype != model.dtype and not kept:
            raise ValueError(
                f"save: {name} is {t.dtype}, and the model {model.dtype}; transformers loads all in one dtype: "
                "model.to(dtype) first"
            )
    with torch.device("meta"), torch.random.fork_rng([]):
        made = kind(copy.deepcopy(model.config))
    want = made.state_dict()
    odd = sorted(name for name in want.keys() | state.keys() if _shape(want, name) != _shape(state, name))
    if odd:
        raise ValueError(
            f"save: the model is not what its class and config build ({', '.join(odd[:3])}); merge adapters into its "
            "weights, or bring the config up to date"
        )
    return dict(made.named_buffers())


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None

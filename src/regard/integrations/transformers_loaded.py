"""Reading what `Swap.save_pretrained` wrote: the host by transformers, then the swaps by their recipe."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.checks import choice, refuse
from regard.files import header, naming, read_json
from regard.integrations import files
from regard.integrations.folder import Weights, config_of, look, pretrained
from regard.integrations.interface import layers, plain_name
from regard.integrations.recipes import WHO, entries
from regard.integrations.transformers import Swap
from regard.integrations.transformers_rebuild import check_swap, fill, rebuilt
from regard.integrations.transformers_saved import FORMAT, MARKER, RECIPE, TENSORS, config_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in files.DTYPES if dtype.is_floating_point}


def load_swapped(folder: str | Path) -> Swap:
    """The swapped model that `Swap.save_pretrained` wrote to a folder: it computes what that one did, bit for bit.

        swapped = regard.load_swapped("my-model")
        swapped.model.generate(...)

    transformers builds the host, on the CPU and in evaluation mode, as its `from_pretrained` does; the parts are built
    as `regard.json` says, and get their values from `regard.safetensors`. No file decides which code runs: only JSON
    and safetensors are read, and only classes of transformers and mechanisms of the catalogue are named (your own cards
    must be registered before). Nothing is downloaded.

    Returns:
        The swap, on `swapped.model`. Where several stood on the model, the last one made, with the others in `under`;
        its `restore` takes all back, so that the plain host is left.

    Raises:
        ValueError: a file is missing, damaged, of a newer version or does not fit the others, in one line that names
            it. Sizes are compared before anything is allocated.
    """
    at = Path(folder)
    recipe_file, tensors_file = at / RECIPE, at / TENSORS
    with naming(recipe_file):
        recipe, digest = _recipe(recipe_file)
    with naming(tensors_file):
        tensors = _tensors(tensors_file, recipe)
    with torch.random.fork_rng([]):
        model = _host(at, recipe, digest)
        with naming(recipe_file):
            _name_attention(model, recipe["attention"])
            return _swapped(model, recipe["swaps"], tensors)


def _recipe(path: Path) -> tuple[dict[str, Any], str]:
    """The recipe, looked at as far as it concerns no model, and its sha256."""
    recipe, data = read_json(path)
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        kind = recipe.get("format") if isinstance(recipe, dict) else None
        raise ValueError(f"it has the format {str(kind)[:80]!r}; this version of regard reads {FORMAT!r}")
    entries(recipe, "it", {"format", "regard", "dtype", "attention", "tensors", "sha256", "swaps"})
    choice(WHO, sorted(_DTYPES), dtype=recipe["dtype"] if isinstance(recipe["dtype"], str) else None)
    for key, kind in (("attention", dict), ("tensors", dict), ("swaps", list)):
        if not isinstance(recipe[key], kind) or (not recipe[key] and key != "tensors"):
            refuse(WHO, key, "has the wrong type or nothing in it", type(recipe[key]).__name__, kind.__name__)
    for said in recipe["swaps"]:
        check_swap(said)
    return recipe, hashlib.sha256(data).hexdigest()


def _tensors(path: Path, recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, if they are those that the recipe tells of."""
    held = header(path)
    told = recipe["tensors"]
    if odd := sorted(held.keys() ^ told.keys()):
        raise ValueError(
            f"its tensors are not those of {RECIPE} ({odd[0]!r} is in {'it' if odd[0] in held else RECIPE} alone)"
        )
    for name, (dtype, shape) in held.items():
        if told[name] != [dtype, list(shape)]:
            raise ValueError(f"{name!r} is {dtype} {list(shape)}, and {str(told[name])[:80]} in {RECIPE}")
    if files.digest(path) != recipe["sha256"]:
        raise ValueError(f"it is not the file that {RECIPE} was written with: their sha256 differ")
    return files.read_tensors(path)


# --- the host ------------------------------------------------------------------------------------------------


def _host(at: Path, recipe: Mapping[str, Any], digest: str) -> "PreTrainedModel":
    found = look(at)
    marked = None
    for path, held in found.files.items():
        with naming(path):
            if MARKER in held:
                marked = bytes(files.read_tensors(path, [MARKER])[MARKER].tolist()).hex()
    with naming(found.first):
        if marked != digest:
            wrong = (
                "it was not written by Swap.save_pretrained" if marked is None else "it was written with another one"
            )
            raise ValueError(f"{wrong}, so that it does not belong to {RECIPE}; save both again")
    with naming(at / "config.json"):
        kind, config = host_class(found)
        with torch.device("meta"):
            asked = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
        if asked > found.numbers:
            raise ValueError(f"it asks for {asked} parameters, and the model's files hold {found.numbers} numbers")
    if kind.can_generate():  # transformers itself would go on without it
        with naming(at / "generation_config.json"):
            read_json(at / "generation_config.json")
    top = recipe["attention"].get(":")
    model, info = pretrained(
        kind,
        found,
        config,
        dtype=_DTYPES[recipe["dtype"]],
        attn_implementation=top if _known(top) else None,
        output_loading_info=True,
    )
    info = {**info, "unexpected_keys": set(info["unexpected_keys"]) - {MARKER}}
    for key, odd in info.items():
        if odd:
            first = str(sorted(odd)[0])[:120]
            raise ValueError(f"{found.first}: it does not fit config.json: {key.replace('_', ' ')} {first}")
    for parameter in model.parameters():
        if parameter.data_ptr() % 64:  # as it lies in the file; some operations round otherwise there
            parameter.data = parameter.data.clone()
    return model


def host_class(found: Weights) -> tuple[Any, Any]:
    """The host's class, and its config."""
    import transformers

    given = found.said.get("architectures")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
        raise ValueError(f"its architectures must name one class (got {str(given)[:80]!r})")
    kind = getattr(transformers, given[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"its architectures name {given[0][:80]!r}, which is no model of transformers")
    if "auto_map" in found.said:
        raise ValueError("it has 'auto_map', with which no swapped model is saved")
    config = config_of(found)
    if kind.config_class is None or not isinstance(config, kind.config_class):
        raise ValueError(f"its model_type {config.model_type!r} is not that of {given[0]}")
    return kind, config


def _known(name: Any) -> bool:
    """Whether transformers attends under this name by itself."""
    from transformers import AttentionInterface

    return name == "eager" or (isinstance(name, str) and name in AttentionInterface() and plain_name(name) == name)


def _name_attention(model: "PreTrainedModel", names: Mapping[str, Any]) -> None:
    """Every config gets the attention function that it had under the swap."""
    configs = config_paths(model)
    if odd := sorted(names.keys() ^ configs.keys()):
        refuse(WHO, "attention", "is of other configs than the host has", odd[0][:80], ", ".join(configs))
    for path, name in names.items():
        if name is not None and not _known(name):
            refuse(
                WHO, "attention", "names a function that transformers does not have", str(name)[:80], "eager, sdpa, ..."
            )
        configs[path]._attn_implementation = {"": name}


# --- the swaps -----------------------------------------------------------------------------------------------


def _swapped(model: "PreTrainedModel", swaps: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Swap:
    """The swaps on the model, the last one with the others under it."""
    left = dict(tensors)
    buffers = {f"buffer.{n}": b for n, b in model.named_buffers() if n not in model.state_dict()}
    for name, buffer in buffers.items():
        if name not in left or left[name].shape != buffer.shape:
            refuse(
                WHO,
                name,
                "does not fit the host",
                tuple(left[name].shape) if name in left else "none",
                str(tuple(buffer.shape)),
            )
    fill(model, {name.removeprefix("buffer."): left.pop(name) for name in buffers})
    largest = max(max(p.shape, default=0) for p in model.parameters())
    attending = {layer.name: layer for layer in layers(model)}
    chosen: list[list[Any]] = []
    for n, said in enumerate(swaps):
        masks = {name.removeprefix(f"swap{n}."): left.pop(name) for name in list(left) if _is_mask(name, n)}
        chosen.append([])
        for name, facts in said["layers"].items():
            if name not in attending:
                refuse(WHO, "layers", "name one that the host does not have", name[:80], ", ".join(attending))
            where = f"swap{n}.{name}."
            own = {inner.removeprefix(where): left.pop(inner) for inner in list(left) if inner.startswith(where)}
            parts, about, heads = rebuilt(said, name, facts, masks, own, largest)
            chosen[-1].append((attending[name], parts, about, heads, own))
    if left:
        refuse(WHO, "tensors", "name one that nothing uses", sorted(left)[0][:80], "none but those of its swaps")
    made: list[Swap] = []
    try:
        for said, found in zip(swaps, chosen):
            made.append(Swap(model, [(*one[:4], _named(said)) for one in found], [], said["measure"], made))
            for _, parts, _, _, own in found:
                fill(parts, own)
    except BaseException:
        for swap in reversed(made):
            swap.restore()
        raise
    return made[-1]


def _is_mask(name: str, n: int) -> bool:
    """Whether the tensor is one that a mask of this swap holds."""
    return name.startswith(f"swap{n}.mask") and "." not in name.removeprefix(f"swap{n}.mask")


def _named(said: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    return None if said["mechanism"] is None else (said["mechanism"], {"kernel": said["kernel"]})

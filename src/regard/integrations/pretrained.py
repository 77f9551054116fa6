"""Pretrained layers of other libraries as layers of regard, and back: same weights, same outputs.

What a mechanism loads, and from which class, stands in its own file (see `regard.weights`). Here the parts of one layer
come together, and every name and shape is compared before anything is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import catalog
from regard.cards import Card
from regard.checks import meant, refuse, short
from regard.files import FLOATS, Header, naming
from regard.integrations import files
from regard.integrations.folder import CONFIG, Weights, look, pretrained
from regard.integrations.transformers_loaded import host_class
from regard.pipeline.layer import Attention
from regard.weights import Loaded, Loader, Move, loaders, shapes

Shapes = Mapping[str, tuple[int, ...]]


def convert_layer(theirs: nn.Module) -> Any:
    """A layer of transformers, timm, torch_geometric or torch.nn as the layer of regard that computes the same.

    Weights are copied, in their dtype and on their device. What it takes is what regard's layer takes: a mask in place
    of a bias with -inf, positions in place of sines and cosines. Layers without an output projection, as
    BertSelfAttention, give one whose `o_proj` is the identity. Dropout of the output is left to the model.

    Args:
        theirs: one attention layer, as `model.model.layers[3].self_attn`; `convertible()` lists the classes.

    Raises:
        TypeError: a module of another class.
        ValueError: settings that regard has no counterpart for, or weights that the class does not have.
    """
    plan = _plan(theirs, "convert_layer")
    state = theirs.state_dict()
    layer = _filled(plan, state, "convert_layer")
    return layer.train(theirs.training)


def layer_state(layer: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """The weights of a layer of regard under another library's names: `like.load_state_dict(layer_state(layer, like))`.

    Args:
        layer: as `convert_layer(like)` builds it, with any values.
        like: a module of theirs; its own weights do not matter.

    Raises:
        TypeError, ValueError: as of `convert_layer`; a layer with other tensors; or, of a few classes, weights that
            went through a rounding and can't be had back with every bit.
    """
    plan = _plan(like, "layer_state")
    want = like.state_dict()
    _compare(plan, _shapes(want), "layer_state")
    state = layer.state_dict()
    expected = shapes(plan.moves, _shapes(want))
    for name in sorted(expected.keys() ^ state.keys()):
        where = "misses a tensor" if name in expected else "has a tensor too many"
        refuse("layer_state", "layer", where, name, f"a layer as convert_layer makes of {type(like).__name__}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            refuse("layer_state", name, "has the wrong shape", tuple(state[name].shape), str(shape))
    made: dict[str, Tensor] = {}
    for move in plan.moves:
        if move.store is None:
            refuse(
                "layer_state",
                ", ".join(move.theirs),
                "was rounded on the way here",
                type(like).__name__,
                "a class whose weights regard holds as they are",
            )
        made |= dict(zip(move.theirs, move.store(*(state[name] for name in move.ours)), strict=True))
    return {name: made[name].to(t.dtype).contiguous().clone() for name, t in want.items()}


def load_layer(folder: str | Path, layer: int | str = 0) -> Any:
    """One layer of a model that transformers saved, as the layer of regard that computes the same.

    Of the weights only that layer's are read, unless transformers keeps them under other names than the model's. Only
    safetensors are, and no code that comes with a model is run.

    Args:
        folder: as `save_pretrained` writes it.
        layer: counted from 0 among those layers of the model that can be converted, or its path, as
            "model.layers.3.self_attn".

    Raises:
        ValueError: a file is missing or damaged, the layer's weights are missing, too many or misshaped, or regard has
            no counterpart, in one line that names the file. Nothing is built before.
    """
    found = look(folder)
    with naming(found.folder / CONFIG):
        kind, config = host_class(found)
        with torch.device("meta"), torch.random.fork_rng([]):
            model = kind(config)
        path, theirs = _chosen(model, layer)
        plan = _plan(theirs, path)
    with naming(found.first):
        as_named = any(name.startswith(f"{path}.") for name in found.held)
        state = _state(found, path, theirs) if as_named else _renamed(found, path, kind, config)
        return _filled(plan, state, path).eval()


def convertible() -> dict[str, tuple[str, ...]]:
    """The classes that `convert_layer` knows, as "transformers LlamaAttention", and what makes each up."""
    known: dict[str, list[str]] = {}
    for one in _all():
        known.setdefault(f"{one.library} {one.name}", []).append(one.card.name)
    return {name: tuple(cards) for name, cards in sorted(known.items())}


# --- plans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    build: Callable[[], Any]
    moves: tuple[Move, ...]


def _all() -> list[Loader]:
    catalog.cards()
    return loaders()


def _plan(theirs: nn.Module, who: str) -> _Plan:
    """What becomes of this module, from all cards that load something of it."""
    if not isinstance(theirs, nn.Module):
        refuse(who, "the layer", "has the wrong type", type(theirs).__name__, "an nn.Module", error=TypeError)
    found = [one for one in _all() if _is(theirs, one)]
    if not found:
        raise TypeError(_unknown(theirs, who))
    made = [(one.card, loaded) for one in found if (loaded := one.convert(theirs)) is not None]
    moves = tuple(move for _, loaded in made for move in loaded.moves)
    alone = [loaded for card, loaded in made if not card.is_part]
    return _Plan(alone[0].build if alone else lambda: _pipeline(made), moves)


def _is(theirs: nn.Module, one: Loader) -> bool:
    """A class of that name which that package defines; heirs may compute something else."""
    kind = type(theirs)
    return kind.__name__ == one.name and f"{kind.__module__}.".startswith(f"{one.library}.")


def _unknown(theirs: nn.Module, who: str) -> str:
    kind, known = type(theirs), convertible()
    near = meant(kind.__name__, [name.partition(" ")[2] for name in known])
    words = f"{who}: no mechanism loads {kind.__module__}.{kind.__name__}; expected one attention layer of those that "
    inner = [name for name, m in theirs.named_modules() if name and any(_is(m, one) for one in loaders())]
    return words + "; ".join(
        ["regard.convertible() lists", *([near] if near else []), *([f"it has one at {inner[0]!r}"] if inner else [])]
    )


def _pipeline(made: list[tuple[Card, Loaded]]) -> Attention:
    """`Attention` with each part in its slot."""
    keywords: dict[str, Any] = {}
    for card, loaded in made:
        slot = card.made.slot if card.made is not None else None
        keywords |= {slot: loaded.build()} if slot else loaded.build()
    return Attention(**keywords)


# --- weights -------------------------------------------------------------------------------------------------


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(t.shape) for name, t in state.items()}


def _filled(plan: _Plan, state: Mapping[str, Tensor], who: str) -> Any:
    """The layer with these weights, once all names and shapes fit."""
    _compare(plan, _shapes(state), who)
    first = next(t for t in state.values() if t.is_floating_point())
    with torch.random.fork_rng([]):
        layer = _trimmed(plan).to(device=first.device, dtype=first.dtype)
    with torch.no_grad():
        loaded = {
            name: t.clone()
            for move in plan.moves
            for name, t in zip(move.ours, move.load(*(state[name] for name in move.theirs)), strict=True)
        }
    layer.load_state_dict(loaded, assign=True)
    return layer


def _compare(plan: _Plan, have: Shapes, who: str) -> None:
    """Refuse missing tensors, tensors too many, and such of the wrong shape, by name."""
    wanted = {name for move in plan.moves for name in move.theirs}
    if odd := sorted(wanted ^ have.keys()):
        where = "is missing" if odd[0] in wanted else "is too many"
        refuse(who, odd[0], where, f"{len(have)} tensors", f"{len(wanted)}: {short(', '.join(sorted(wanted)), 200)}")
    ours = shapes(plan.moves, have)
    with torch.device("meta"), torch.random.fork_rng([]):
        built = _shapes(_trimmed(plan).state_dict())
    if odd := sorted(ours.keys() ^ built.keys()):
        refuse(who, odd[0], "has no counterpart", ", ".join(odd), "tensors for all that the layer holds")
    for move in plan.moves:
        for name in move.ours:
            if ours[name] != built[name]:
                got = ", ".join(f"{their} {have[their]}" for their in move.theirs)
                refuse(who, ", ".join(move.theirs), "has the wrong shape", got, f"what makes {name} {built[name]}")


def _trimmed(plan: _Plan) -> Any:
    """The layer without those projections and biases that theirs does not have: none of its weights would be left."""
    layer, held = plan.build(), {name for move in plan.moves for name in move.ours}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(layer, name, None)
        if not isinstance(linear, nn.Linear):
            continue
        if name == "o_proj" and "o_proj.weight" not in held:
            layer.o_proj = nn.Identity()
        elif f"{name}.bias" not in held:
            linear.register_parameter("bias", None)
    return layer


# --- folders -------------------------------------------------------------------------------------------------


def _chosen(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    """The layer's path in the model, and the module."""
    known = [name for name, module in model.named_modules() if any(_is(module, one) for one in _all())]
    if not known:
        listed = "regard.convertible() lists the classes that are known"
        raise ValueError(f"no mechanism loads a layer of {type(model).__name__}; {listed}")
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        refuse("load_layer", "layer", "has the wrong type", type(layer).__name__, "an int or a path", error=TypeError)
    if isinstance(layer, str):
        if layer not in known:
            refuse("load_layer", "layer", "is unknown", repr(layer), short(f"one of {', '.join(known)}", 300))
        return layer, model.get_submodule(layer)
    if not 0 <= layer < len(known):
        listed = short(", ".join(known), 300)
        refuse("load_layer", "layer", "is out of range", layer, f"0 to {len(known) - 1}: {listed}")
    return known[layer], model.get_submodule(known[layer])


def _state(found: Weights, path: str, theirs: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors, once their names, shapes and kinds are those of the module."""
    wanted, prefix = _shapes(theirs.state_dict()), f"{path}."
    held: Header = {n.removeprefix(prefix): about for n, about in found.held.items() if n.startswith(prefix)}
    for name in sorted(wanted.keys() ^ held.keys()):
        refuse(path, name, "is missing" if name in wanted else "is too many", f"{len(held)} tensors", str(len(wanted)))
    for name, (dtype, shape) in held.items():
        if shape != wanted[name] or dtype not in FLOATS:
            refuse(path, name, "does not fit config.json", f"{dtype} {list(shape)}", f"numbers {list(wanted[name])}")
    state: dict[str, Tensor] = {}
    for file, inside in found.files.items():
        mine = [name for name in inside if name.startswith(prefix)]
        if mine:
            state |= {n.removeprefix(prefix): t for n, t in files.read_tensors(file, mine).items()}
    return state


def _renamed(found: Weights, path: str, kind: Any, config: Any) -> dict[str, Tensor]:
    """The layer's tensors where the files have other names than the model: transformers alone knows which."""
    model, info = pretrained(kind, found, config, output_loading_info=True)
    if odd := sorted(str(name) for name in info["missing_keys"] if str(name).startswith(f"{path}.")):
        refuse(path, odd[0].removeprefix(f"{path}."), "is missing", f"{len(found.held)} tensors", "all of the layer's")
    return model.get_submodule(path).state_dict()

"""Heads that are really gone: their rows and columns are cut out of a transformers model's projections.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (https://arxiv.org/abs/1905.10650), section 4.4. What is
cut is proven to be what `regard.scale_heads` silences: the outputs are the same, or nothing is changed.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.checks import whole
from regard.integrations.interface import Layer, check_model, interceptions, layers
from regard.integrations.transformers_check import (
    TOLERANCE,
    Checked,
    difference,
    outputs,
    quiet,
    self_check,
    under_eager,
)
from regard.integrations.transformers_heads import scale_heads
from regard.shapes import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERIES = ("q_proj", "query", "q", "q_lin")
KEYS = ("k_proj", "key", "k", "k_lin")
VALUES = ("v_proj", "value", "v", "v_lin")
FUSED = ("qkv_proj", "c_attn")
"""Queries, then keys, then values, in one projection."""
OUTPUTS = ("o_proj", "out_proj", "o", "out_lin", "c_proj", "output.dense", "dense")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
WIDTHS = ("all_head_size", "inner_dim", "split_size")
"""Attributes that hold heads times their width."""
HEAD_WIDTHS = ("head_dim", "d_kv")
"""What a config calls the width of a head, where that does not follow from the number of heads."""


@dataclass(frozen=True)
class Pruned:
    """What `prune_heads` did."""

    heads: dict[str, list[int]]
    """Layer -> the heads that are gone, by their numbers before."""
    parameters: tuple[int, int]
    """Of the model, before and after."""
    difference: float
    """Of the outputs from those with the same heads silenced, relative to the largest."""
    in_config: bool
    """Whether the config holds it, so that `save_pretrained` and `from_pretrained` bring the smaller model back."""


@dataclass(frozen=True)
class _Cut:
    """What is left of a layer."""

    layer: Layer
    shape: HeadShape
    gone: list[int]
    queries: Tensor
    """The heads that stay, of H."""
    keys: Tensor
    """Those of G."""


def prune_heads(
    model: "PreTrainedModel",
    heads: Mapping[int | str, Iterable[int]],
    *,
    check: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Cut heads out of a transformers model, in place: it has fewer parameters, and computes and caches less.

    A key head goes with its last query head. Where several query heads share one, all key heads that stay must keep
    equally many.

        pruned = regard.prune_heads(model, {0: [1, 3], 2: [0]})
        model.save_pretrained("smaller")  # and from_pretrained, where pruned.in_config

    Args:
        heads: number or name of one of `regard.integrations.interface.layers(model)` -> the heads to cut.
        check: a small batch to run the model on; default: a few random tokens, as `swap` does.

    Raises:
        TypeError, ValueError: what can't be cut, with the reason; the model is then as it was before.
    """
    check_model(model)
    if list(interceptions(model)):
        raise ValueError("prune_heads: model attends through regard.swap or regard.scale_heads now; restore it first")
    asked = _asked(model, heads)
    known = self_check(model, check)
    cuts = [_cut(layer, known.about[layer.name].shape, gone) for layer, gone in asked.items()]
    before, wanted = _count(model), _silenced(model, cuts, known)
    with _undone(model):
        for cut in cuts:
            _apply(model, cut)
        in_config = _configured(model, {layer.name: known.about[layer.name].shape for layer in layers(model)}, cuts)
        off = _off(model, known, wanted)
    gone = {cut.layer.name: cut.gone for cut in cuts}
    return Pruned(gone, (before, _count(model)), off, in_config)


def _asked(model: "PreTrainedModel", heads: Mapping[int | str, Iterable[int]]) -> dict[Layer, list[int]]:
    """Layers and the numbers of the heads that go."""
    attending = layers(model)
    named = {layer.name: layer for layer in attending}
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"prune_heads: heads must map layers to heads (got {heads!r}); expected such as {{0: [1, 3]}}")
    found: dict[Layer, list[int]] = {}
    for key, numbers in heads.items():
        layer = named.get(key) if isinstance(key, str) else None
        if isinstance(key, int) and 0 <= key < len(attending):
            layer = attending[key]
        if layer is None:
            raise ValueError(
                f"prune_heads: heads names no layer (got {key!r}); expected 0 to {len(attending) - 1}, or one of "
                f"{', '.join(list(named)[:3])}, ..."
            )
        gone = list(numbers)
        for number in gone:
            whole("prune_heads", 0, heads=number)
        found[layer] = sorted({*found.get(layer, ()), *gone})
    return {layer: gone for layer, gone in found.items() if gone}


def _cut(layer: Layer, shape: HeadShape, gone: list[int]) -> _Cut:
    """What stays of a layer. Raises where nothing would, or groups would differ in size."""
    H, G = shape.num_heads, shape.num_kv_heads
    if gone[-1] >= H:
        raise ValueError(f"prune_heads: {layer.name} has no such head (got {gone[-1]}); expected 0 to {H - 1}")
    stay = [head for head in range(H) if head not in gone]
    if not stay:
        raise ValueError(f"prune_heads: {layer.name} would have no head left (got all {H}); expected one to stay")
    groups = {group: sum(head // (H // G) == group for head in stay) for group in range(G)}
    left = {group: count for group, count in groups.items() if count}
    if len(set(left.values())) > 1:
        raise ValueError(
            f"prune_heads: {layer.name} shares each of {G} key heads among {H // G} query heads, and those that stay "
            f"must share alike (got {list(left.values())} left in each group); expected whole groups to go, or equally "
            "many of each"
        )
    return _Cut(layer, shape, gone, torch.tensor(stay), torch.tensor(list(left)))


def _apply(model: nn.Module, cut: _Cut) -> None:
    """Cut a layer's projections, and what else counts its heads."""
    module, shape = cut.layer.module, cut.shape
    H, G, D = shape.num_heads, shape.num_kv_heads, shape.head_dim
    if (fused := _find(module, FUSED)) is not None:
        if _size(fused, 0) != (H + 2 * G) * D:
            raise _unknown(cut, f"{_size(fused, 0)} features in its projection of all, not {(H + 2 * G) * D}")
        of_keys = _features(cut.keys, D)
        _keep(fused, torch.cat([_features(cut.queries, D), H * D + of_keys, (H + G) * D + of_keys]), 0)
    else:
        for names, count, stay in ((QUERIES, H, cut.queries), (KEYS, G, cut.keys), (VALUES, G, cut.keys)):
            projection = _find(module, names)
            if projection is None:
                raise _unknown(cut, f"no projection of the name {' or '.join(names)}")
            width, rest = divmod(_size(projection, 0), count)
            if rest or (names is not VALUES and width != D):
                raise _unknown(cut, f"{_size(projection, 0)} features for {count} heads of {D}")
            _keep(projection, _features(stay, width), 0)
    out = _find(module, OUTPUTS) or _find(model.get_submodule(cut.layer.name.rpartition(".")[0]), OUTPUTS)
    if out is None or _size(out, 1) % H:
        raise _unknown(cut, f"no projection of the name {' or '.join(OUTPUTS)} that takes {H} heads in")
    _keep(out, _features(cut.queries, _size(out, 1) // H), 1)
    if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
        module.sinks = _part(sinks, cut.queries, 0)
    if isinstance(near := getattr(module, "relative_attention_bias", None), nn.Embedding):
        near.weight = _part(near.weight, cut.queries, 1)
        near.embedding_dim = len(cut.queries)
    left, kept = len(cut.queries), len(cut.keys)
    counts = dict.fromkeys(COUNTS, (H, left)) | dict.fromkeys(WIDTHS, (H * D, left * D))
    counts |= {"num_key_value_heads": (G, kept), "num_key_value_groups": (H // G, left // kept)}
    for name, (old, new) in counts.items():
        if getattr(module, name, None) == old:
            setattr(module, name, new)


def _unknown(cut: _Cut, what: str) -> ValueError:
    return ValueError(
        f"prune_heads: {cut.layer.name}, a {type(cut.layer.module).__name__}, is built in a way that is not known here "
        f"(got {what}); expected projections of queries, keys, values and outputs, heads by heads"
    )


def _find(module: nn.Module, names: Iterable[str]) -> nn.Module | None:
    """The first of these that is a linear map."""
    for name in names:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear) or _turned(found):
            return found
    return None


def _turned(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear map, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _size(module: Any, axis: int) -> int:
    """Features that go out (axis 0) or come in (axis 1)."""
    return int(module.weight.shape[1 - axis if _turned(module) else axis])


def _keep(module: Any, index: Tensor, axis: int) -> None:
    """Keep these features of those that go out (axis 0) or come in (axis 1)."""
    module.weight = _part(module.weight, index, 1 - axis if _turned(module) else axis)
    if axis == 0 and module.bias is not None:
        module.bias = _part(module.bias, index, 0)
    names = ("nf", "nx") if _turned(module) else ("out_features", "in_features")
    setattr(module, names[axis], len(index))


def _part(parameter: Tensor, index: Tensor, axis: int) -> nn.Parameter:
    kept = parameter.detach().index_select(axis, index.to(parameter.device)).clone()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _features(heads: Tensor, width: int) -> Tensor:
    """Numbers of the features of these heads."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _silenced(model: "PreTrainedModel", cuts: Iterable[_Cut], known: Checked) -> dict[str, Tensor]:
    """What the model gives with these heads silenced."""
    gone = {cut.layer.name: cut.gone for cut in cuts}
    gates = [torch.ones(known.about[layer.name].shape.num_heads) for layer in layers(model)]
    for gate, layer in zip(gates, layers(model)):
        gate[gone.get(layer.name, [])] = 0
    with quiet(model), under_eager(model), scale_heads(model, gates):
        return outputs(model, known.inputs)


def _off(model: "PreTrainedModel", known: Checked, wanted: Mapping[str, Tensor]) -> float:
    """How far the pruned model is from that. Raises if it is too far, or doesn't run."""
    try:
        with quiet(model), under_eager(model):
            got = outputs(model, known.inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"prune_heads: {type(model).__name__} does not run with layers of these sizes (got "
            f"{str(error).partition(chr(10))[0][:200]}); where layers share something by heads, as T5 its positions, "
            "expected the same heads in all of them. Nothing was changed"
        ) from error
    worst = 0.0
    for name, reference in wanted.items():
        off = difference(got[name], reference)
        worst = max(worst, off)
        if not off <= TOLERANCE.get(reference.dtype, 1e-4):
            raise ValueError(
                f"prune_heads: without these heads {type(model).__name__} does not give what it gives with them "
                f"silenced ({name} differs by {off:.2g} of its largest value); its heads do not stand for themselves, "
                "as where queries are normalised over all of them. Nothing was changed"
            )
    return worst


def _configured(model: "PreTrainedModel", shapes: Mapping[str, HeadShape], cuts: Iterable[_Cut]) -> bool:
    """Write what is left into copies of the model's configs, if a model that is built from them has these sizes."""
    left = {name: (shape.num_heads, shape.num_kv_heads, shape.head_dim) for name, shape in shapes.items()}
    left |= {cut.layer.name: (len(cut.queries), len(cut.keys), cut.shape.head_dim) for cut in cuts}
    mine: dict[int, Any] = {}
    whole_model = copy.deepcopy(model.config, mine)
    held = [module for module in model.modules() if hasattr(getattr(module, "config", None), "num_attention_heads")]
    copies: dict[int, Any] = {id(m.config): mine.get(id(m.config)) or copy.deepcopy(m.config) for m in held}
    for old, new in {**copies, id(model.config): whole_model}.items():
        sizes = {left[layer.name] for layer in layers(model) if id(layer.module.config) == old} or set(left.values())
        width = next((name for name in HEAD_WIDTHS if hasattr(new, name)), None)
        if len(sizes) > 1 or width is None:
            continue
        ((H, G, D),) = sizes
        setattr(new, width, D)
        new.num_attention_heads = H
        if getattr(new, "num_key_value_heads", None) is not None:
            new.num_key_value_heads = G
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(whole_model))
    except Exception:  # whatever a config says when its numbers do not fit each other
        return False
    if {k: v.shape for k, v in built.state_dict().items()} != {k: v.shape for k, v in model.state_dict().items()}:
        return False
    for module in held:
        module.config = copies[id(module.config)]
    model.config = whole_model
    return True


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """If an error comes, every module has its parameters and attributes back."""
    before = {module: (dict(module.__dict__), dict(module._parameters)) for module in model.modules()}
    try:
        yield
    except BaseException:
        for module, (attributes, parameters) in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        raise

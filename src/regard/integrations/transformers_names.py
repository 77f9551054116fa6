"""Mechanisms by name in transformers' own settings: `model.set_attn_implementation("regard:window(window=64)")`.

A name is looked up when a model is first given it, and then stands in both of transformers' registries: one that is
only among the attention functions gets no mask, and with it loses padding and windows, without a word. The function
holds nothing of a model's: a mechanism with parameters has no place in it, and goes through `regard.swap`.
"""

from functools import cache, partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard.integrations.layers import _kind, layers
from regard.integrations.slots import About, Parts, check_mechanism, slots_of, start_as_original, why_not
from regard.integrations.transformers_call import Call, compute, maps, read
from regard.integrations.transformers_check import _rotates
from regard.integrations.transformers_masks import formed_when_compiled, lazy_mask
from regard.shapes import HeadShape

PREFIX = "regard:"
_TOLD = "_regard_told"
"""Where an attention layer holds whether it is cross-attention and whether its model rotates."""


@cache
def register() -> None:
    """Teach transformers names of this library: "regard:" and a mechanism, with options, as `regard.create` takes it.

        register()
        model.set_attn_implementation("regard:window(window=64)")
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="regard:sparsemax")

    The model then attends as within `regard.swap(model, "window", window=64)`, until another name is set. Layers of
    cross-attention that the mechanism can't serve keep exact attention, as there; any other layer that it can't serve
    raises ValueError when it is first called. Nothing is checked against eager attention, nothing is counted,
    torch.compile leaves the graph in each layer, and attention maps come only from models that pass `output_attentions`
    on to their layers: `regard.swap` has these. Calling it again does nothing.

    From then on `set_attn_implementation` and `from_pretrained` raise ValueError for a name behind "regard:" that is
    unknown, with what may have been meant, and for a mechanism with parameters or one that is no pipeline over given
    queries, keys and values.

    transformers writes no such name to a checkpoint; give it again at `from_pretrained`. A process that has not
    registered gets transformers' own error for it.
    """
    from transformers import PreTrainedModel

    models: Any = PreTrainedModel
    theirs = models.get_correct_attn_implementation

    @wraps(theirs)
    def known(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if isinstance(requested_attention, str) and requested_attention.startswith(PREFIX):
            _enter(requested_attention)
            if any(True for _ in self.children()):
                _tell(self)
            else:  # asked from its constructor, before it has layers
                self.register_forward_pre_hook(_tell)
            return requested_attention
        return theirs(self, requested_attention, *args, **kwargs)

    models.get_correct_attn_implementation = known


class Named:
    """The attention function that a name stands for."""

    def __init__(self, mechanism: str) -> None:
        self.mechanism, self.supports = mechanism, check_mechanism(mechanism)
        self._parts: WeakKeyDictionary[nn.Module, Parts] = WeakKeyDictionary()
        held = Parts(slots_of(mechanism, HeadShape(64, 4, 4, 16), {}))
        if held.gate is not None or any(True for _ in held.parameters()):
            raise ValueError(
                f"set_attn_implementation: {mechanism!r} has parameters or a gate of its own, for which a name has no "
                f"place; use regard.swap(model, {mechanism!r}), which puts them into the layers"
            )
        self.mask = formed_when_compiled if held.placeless else lazy_mask

    @torch.compiler.disable
    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        call = read(module, query, key, value, attention_mask, **options)
        parts = self._parts.get(module)
        if parts is None:
            parts = self._parts_for(module, call)
        parts.train(module.training)
        changed = parts.applied(call)
        out = compute(changed, parts.kernel)
        return out, maps(changed, parts.kernel, key) if call.wants_weights else None

    def _parts_for(self, module: nn.Module, call: Call) -> Parts:
        """The mechanism for this layer. Raises ValueError, with the reason, where it can't serve it."""
        about = self._about(module, call)
        slots = slots_of(self.mechanism, about.shape, {})
        reasons = why_not(slots, about, self.supports)
        if reasons and not about.cross:
            raise ValueError(
                f"{PREFIX}{self.mechanism}: {type(module).__name__} can't attend so: {'; '.join(reasons)}; "
                f"regard.swap(model, {self.mechanism!r}) leaves such layers as they are"
            )
        parts = Parts({} if reasons else slots).to(call.problem.q.device, call.problem.q.dtype)
        for part in parts.children():
            start_as_original(part)
        if call.problem.k.shape[2] > 1:  # one key tells nothing of causality
            self._parts[module] = parts
        return parts

    def _about(self, module: nn.Module, call: Call) -> About:
        p = call.problem
        _, H, G, T, S = p.shape
        kind, rotary = module.__dict__.get(_TOLD) or (_kind(type(module).__name__, module), False)
        return About(
            shape=HeadShape(H * p.q.shape[3], H, G, p.q.shape[3]),
            causal=call.causal if max(T, S) > 1 else "causal" in self.supports,
            windowed=call.windowed,
            cross=kind == "cross",
            rotary=rotary,
            capped=p.score_mix is not None,
            sinks=p.normalizer is not None,
        )


@cache
def _enter(name: str) -> None:
    """Put the name into both registries."""
    from transformers import AttentionInterface, AttentionMaskInterface

    named = Named(name.removeprefix(PREFIX))
    AttentionMaskInterface.register(name, partial(named.mask, _formed))
    AttentionInterface.register(name, named)


def _formed(**asked: Any) -> Any:
    """The mask as a tensor, for who needs one: nothing of transformers' stands below a name."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


@torch.compiler.disable
def _tell(model: nn.Module, *_: Any) -> None:
    """What a layer can't see of itself: its place in the model, and whether the model rotates."""
    if _TOLD in model.__dict__:
        return
    rotates = _rotates(model)
    for layer in layers(model):
        layer.module.__dict__.setdefault(_TOLD, (layer.kind, rotates))
    model.__dict__[_TOLD] = True

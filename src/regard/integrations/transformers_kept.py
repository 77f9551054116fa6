"""Caches that keep less in a transformers model: `with regard.swap(model, cache=policy): model.generate(...)`.

transformers' cache is handed keys and values before attention is, and no queries. So a layer of the cache only hands
them on, with itself written on the keys; where the attention function is called it takes them in, with the queries.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from regard.checks import refuse
from regard.integrations.interface import Layer
from regard.integrations.slots import About
from regard.integrations.transformers_attend import PLACE
from regard.integrations.transformers_call import Call, read
from regard.integrations.transformers_masks import LazyMask, Structure
from regard.kinds import CachePolicy, Kept, Turn
from regard.masks import causal
from regard.masks.algebra import And
from regard.masks.tensors import Kept as Padding
from regard.pipeline.kept import may_see


class KeptLayer(CacheLayerMixin):
    """What a policy keeps of one layer's keys and values."""

    is_sliding = False
    is_croppable = False

    def __init__(self, policy: CachePolicy, keeping: "Keeping") -> None:
        self.policy, self.keeping = policy, keeping
        self.held: Any = None
        self.length = self.batch = 0

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.held is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return 0 if self.held is None else int(self.held.nbytes)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        self.held = self.policy.init_state(B, G, D, value_dim=value_states.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new ones alone, for the attention function to ask `take` with."""
        if not self.keeping.lasts:
            wanted = "the cache used within the swap that it was made in"
            refuse("KeptLayer", "the model", "attends in its own way again", "a restored swap", wanted)
        if self.held is None:
            self.lazy_initialization(key_states, value_states)
        key_states = key_states.view_as(key_states)
        setattr(key_states, PLACE, self)
        return key_states, value_states

    def take(
        self, k: Tensor, v: Tensor, q: Tensor, keep: Bool[Tensor, "B t"] | None, scale: float, turn: Turn | None
    ) -> Kept:
        """Take tokens in: what their queries attend to."""
        kept, self.held = self.policy.update(self.held, k, v, q, keep=keep, scale=scale, turn=turn)
        self.length, self.batch = self.length + k.shape[2], len(k)
        return kept

    def get_seq_length(self) -> int:
        """Tokens of the text: what comes next stands behind them, whatever was dropped."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.held, self.length = None, 0

    def offload(self) -> None:
        raise NotImplementedError("KeptLayer: what is kept stays on its device")

    def prefetch(self) -> None:
        """It is where it is."""

    def reorder_cache(self, beam_idx: Int[Tensor, " B2"]) -> None:
        if self.held is not None:
            self.held, self.batch = self.policy.reorder(self.held, beam_idx), len(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " B2"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held is not None:
            self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        refuse(
            "KeptLayer", "tokens_to_remove", "asks for dropped keys again", tokens_to_remove, "a cache that keeps all"
        )


@dataclass(eq=False)
class Keeping:
    """A policy in a model: for which layers it is, and whether it still is."""

    policy: CachePolicy
    numbers: tuple[int, ...]
    turns: dict[int, Turn | None] = field(default_factory=dict)
    lasts: bool = True

    def fill(self, cache: Any, config: Any) -> None:
        """Put layers of the policy's into an empty cache of transformers."""
        if any(isinstance(layer, KeptLayer) for layer in cache.layers):
            return
        if type(cache) is not DynamicCache:
            wanted = "a DynamicCache, or none, which makes one"
            refuse(
                "swap", "past_key_values", "is not what a policy can take the place of", type(cache).__name__, wanted
            )
        if cache.get_seq_length():
            refuse("swap", "past_key_values", "holds tokens from before", cache.get_seq_length(), "an empty cache")
        if not cache.layers:
            cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
        plain = [n for n in self.numbers if type(cache.layers[n]) is DynamicLayer]
        for place, n in enumerate(plain):
            cache.layers[n] = KeptLayer(self.policy.at_layer(place, len(plain)), self)


def keeping(
    model: Any, policy: CachePolicy, chosen: Sequence[tuple[Layer, Any]], about: dict[str, About]
) -> tuple[Keeping, list[str]]:
    """The policy for those layers that can take it, and notes on the others."""
    if not isinstance(policy, CachePolicy):
        wanted = "a cache policy or its name, such as 'snapkv(budget=512)'"
        refuse("swap", "cache", "has the wrong type", type(policy).__name__, wanted, error=TypeError)
    if getattr(model.config, "is_encoder_decoder", False):
        refuse("swap", "cache", "is for a decoder alone", type(model).__name__, "a causal language model")
    numbers, notes, turns = [], [], {}
    for layer, parts in chosen:
        n, facts = getattr(layer.module, "layer_idx", None), about[layer.name]
        if not parts.placeless:
            got = f"{', '.join(parts.filled())} of {layer.name}"
            refuse("swap", "mechanism", "counts keys that a policy drops", got, "one that asks for no places, or none")
        if n is None or not facts.causal or facts.windowed or facts.cross:
            why = "has no number in the cache" if n is None else "sees few keys" if facts.windowed else "is not causal"
            notes.append(f"{layer.name} keeps its own cache: it {why}")
            continue
        numbers.append(int(n))
        turns[int(n)] = turn_of(model, layer.module, needed=getattr(policy, "needs_turn", False))
    if not numbers:
        refuse("swap", "cache", "has no layer to work in", "; ".join(notes) or "none", "a causal layer with a cache")
    return Keeping(policy, tuple(numbers), turns), notes


def giving(model: nn.Module, told: Keeping) -> list[Callable[[], None]]:
    """Have the model, and its sub-models, use such caches. Gives what undoes it."""
    undo: list[Callable[[], None]] = [partial(setattr, told, "lasts", False)]
    for part in model.modules():
        if hasattr(part, "set_attn_implementation") and "past_key_values" in inspect.signature(part.forward).parameters:
            undo.append(part.register_forward_pre_hook(partial(_give, told), with_kwargs=True).remove)
    return undo


def _give(told: Keeping, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    cache, asked = kwargs.get("past_key_values"), kwargs.get("use_cache")
    config = model.config.get_text_config(decoder=True)
    if cache is None and (getattr(config, "use_cache", False) if asked is None else asked):
        cache = DynamicCache(config=config)
        kwargs = {**kwargs, "past_key_values": cache}
    if cache is not None:
        told.fill(cache, config)
    return args, kwargs


def kept_call(layer: KeptLayer, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Call:
    """The call over what the layer's policy keeps for it."""
    if options.get("position_bias") is not None:
        refuse(
            "swap",
            "cache",
            "drops keys that a position bias counts on",
            type(module).__name__,
            "rotary or no positions",
        )
    (B, H, t, D), first = q.shape, layer.length == 0
    keep = _padding(module, mask, t)
    scale = options.get("scaling")
    turn = layer.keeping.turns.get(getattr(module, "layer_idx", -1))
    kept = layer.take(k, v, q, keep, D**-0.5 if scale is None else float(scale), turn)
    if first and t > 1:  # a prompt, which sees itself alone
        return read(module, q, k, v, mask, **options)
    n = kept.k.shape[2]
    told = Structure(may_see(kept, H, t), 0, n, None)
    seen = LazyMask((B, H, t, n), q.device, told, partial(_unformed, n), partial(_unformed, n))
    call = read(module, q, kept.k, kept.v, seen, **options)
    if kept.bias is None:
        return call
    bias = kept.bias.repeat_interleave(H // kept.bias.shape[1], 1)[:, :, None]
    return replace(call, problem=replace(call.problem, bias=bias))


def _unformed(n: int) -> Tensor:
    raise ValueError(f"swap: the mask over {n} kept keys was asked for by the original attention, which doesn't run")


def _padding(module: nn.Module, mask: Any, t: int) -> Bool[Tensor, "B t"] | None:
    """Which of the last t tokens are none, where that is known; other masks are refused."""
    if mask is None:
        return None
    told = mask.structure if isinstance(mask, LazyMask) else None
    parts = () if told is None or told.mask is None else told.mask.parts if isinstance(told.mask, And) else (told.mask,)
    if told is None or not all(part == causal() or isinstance(part, Padding) for part in parts):
        got = "a tensor" if told is None else repr(told.mask)
        refuse(
            "swap", "cache", f"meets a mask in {type(module).__name__} that counts places", got, "causal, and padding"
        )
    if told.keep is None:
        return None
    keep = told.keep[:, told.keep.shape[1] - t :]
    return None if bool(keep.all()) else keep


def turn_of(model: nn.Module, module: nn.Module, *, needed: bool = False) -> Turn | None:
    """How the model turns this layer's queries and keys, where its file has that as all files do; None where it turns
    none. What can't be told is None too, and refused where it is needed."""
    file = sys.modules[type(module).__module__]
    apply = getattr(file, "apply_rotary_pos_emb", None)
    found = [_rotary(part) for part in (module, model)]
    rotary = found[0] or found[1]
    if not rotary and not any("rotary" in name.lower() for name in vars(file)):
        return None
    if apply is None or len(rotary) != 1:
        got = f"{len(rotary)} rotary modules"
    elif len(inspect.signature(rotary[0].forward).parameters) != 2:
        got = "a rotary module that asks for more than positions"
    elif getattr(rotary[0], "rope_type", "default") in ("dynamic", "longrope"):
        got = "frequencies that change with the length"
    else:
        return partial(_turned, apply, rotary[0])
    if needed:
        wanted = "one rotary module of fixed frequencies, or none"
        refuse("swap", "cache", f"must know how {type(module).__name__} rotates queries", got, wanted)
    return None


def _rotary(module: nn.Module) -> list[Any]:
    return [m for name, m in module.named_modules() if name.rpartition(".")[2] == "rotary_emb"]


def _turned(apply: Any, rotary: Any, z: Float[Tensor, "B H T D"], at: Int[Tensor, "*b T"], /) -> Tensor:
    """A rotation alone: a factor that the model puts on top stays where it is, in the queries and keys."""
    cos, sin = (c / getattr(rotary, "attention_scaling", 1.0) for c in rotary(z, at if at.dim() == 2 else at[None]))
    turned: Tensor = apply(z, z, cos, sin)[0]
    return turned

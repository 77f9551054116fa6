"""Anybody's attention as a subject: how it is built and called is read from its signatures, never guessed from values.

A class, or a function that makes a module, is handed the sizes under the names the field uses (`WORDS`). A module is
called as (x[, context]) or as (query, key, value); a function as (q, k, v) with heads. Masks go in as it takes them:

    mask or attn_mask     bool, True = may attend, (B, 1, 1, S) for padding and (B, 1, T, S) for pairs; torch's own
                          polarity and shapes where the module is called as torch.nn.MultiheadAttention is
    key_padding_mask      bool (B, S), True = hidden, as in torch
    attention_mask        int (B, S), 1 = a real token, as in transformers
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from regard import masks
from regard.cards import FEATURES, TRAITS, Card
from regard.checks import choice, whole
from regard.laws.agreement import does_not_apply
from regard.laws.subject import Subject, of
from regard.masks import Mask
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import key_padding

WORDS = {
    "dim": ("dim", "embed_dim", "d_model", "hidden_size", "hidden_dim", "n_embd", "embed_size", "model_dim"),
    "num_heads": ("num_heads", "n_heads", "nhead", "n_head", "heads", "num_attention_heads"),
    "causal": ("causal", "is_causal"),
    "num_kv_heads": ("num_kv_heads", "n_kv_heads", "num_key_value_heads", "kv_heads"),
    "dropout": ("dropout", "dropout_p", "attn_drop", "attention_dropout", "attn_dropout"),
    "head_dim": ("head_dim", "dim_head", "d_head", "d_k"),
}
"""What `create` hands over -> how the field's classes call it."""

QKV = (("q", "query"), ("k", "key"), ("v", "value"))


def subject(
    thing: Any,
    *,
    protocol: str | None = None,
    supports: Iterable[str] | None = None,
    traits: Iterable[str] = (),
    dim: int | None = None,
    heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Callable[..., tuple[Any, ...]] | None = None,
) -> Subject:
    """What is to be put through the laws; see `regard.check` for the arguments."""
    if isinstance(thing, str) and ":" not in thing:
        return _sized(of(thing), dim, heads, options)
    name = thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)
    if isinstance(thing, str):
        thing = _found(thing)
    if isinstance(thing, Card):
        return _sized(of(thing.name), dim, heads, options)
    made = _module(thing, name, dict(options or {})) if not _is_function(thing) else _projected(thing, name)
    kind = str(protocol or getattr(thing, "protocol", "TokenMixer"))
    choice("check", ("TokenMixer", "CrossMixer", "FeatureMixer", "GraphMixer", "Pooler", "Pointer"), protocol=kind)
    claimed = getattr(thing, "supports", None) if supports is None else supports
    whole("check", dim=24 if dim is None else dim, heads=6 if heads is None else heads)
    found = Subject(
        str(name),
        made,
        kind,
        frozenset(),
        frozenset(traits),
        given=inputs,
        function=functools.partial(_called, thing) if _is_function(thing) else None,
    )
    if isinstance(thing, nn.Module):  # built once: its sizes are its own
        dim, heads = _said(thing, "dim", dim), _said(thing, "num_heads", heads)
    found = _sized(found, dim, heads, None)
    probe = _built(found)
    if claimed is None:
        claimed = frozenset(probe.supports) | frozenset(getattr(made, "claims", ()))
    claims = frozenset(claimed)
    for given, known, what in ((claims, FEATURES, "supports"), (found.traits, TRAITS, "traits")):
        for word in given:
            choice("check", sorted(known), **{what: word})
    if not claims & {"causal", "bidirectional"}:
        claims |= {"bidirectional"}
    return replace(found, supports=claims)


def _sized(s: Subject, dim: int | None, heads: int | None, options: Mapping[str, Any] | None) -> Subject:
    changes: dict[str, Any] = {"dim": dim, "heads": heads, "example": {**s.example, **options} if options else None}
    return replace(s, **{key: value for key, value in changes.items() if value is not None})


def _built(s: Subject) -> Any:
    """One instance, so that what can't be built is said before any law is looked at."""
    with torch.random.fork_rng(devices=[]):
        return s.make(dim=s.dim, num_heads=s.heads, causal=False)


def _found(name: str) -> Any:
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"check: {name!r} can't be found ({error}); expected package.module:Thing") from error


def _said(module: nn.Module, what: str, given: int | None) -> int | None:
    """A size of a built module, by whatever name it goes there."""
    return next((n for w in WORDS[what] if isinstance(n := getattr(module, w, None), int)), given)


def _parameters(thing: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(thing).parameters
    except (ValueError, TypeError):
        return {}


def _is_qkv(names: Iterable[str]) -> bool:
    first = list(names)[:3]
    return len(first) == 3 and all(name in known for name, known in zip(first, QKV))


def _is_function(thing: Any) -> bool:
    """Whether it is called with queries, keys and values, rather than built."""
    return not inspect.isclass(thing) and not isinstance(thing, nn.Module) and _is_qkv(_parameters(thing))


# --- modules ------------------------------------------------------------------------------------------------


def _module(thing: Any, name: object, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """How to make a module of this class, function or built module."""
    if isinstance(thing, nn.Module):

        def copied(*, causal: bool, dropout: float = 0.0, **sizes: Any) -> nn.Module:
            if "num_kv_heads" in sizes or dropout or "device" in sizes:
                does_not_apply("it was built by its owner; hand over its class to see other options")
            return _adapted(copy.deepcopy(thing), causal, told=False)

        return copied
    if not callable(thing):
        raise TypeError(
            f"check: thing has the wrong type (got {thing!r}); expected a class, a function, a module, or a name"
        )
    parameters = _parameters(thing)
    if not parameters:
        raise ValueError(
            f"check: {name} has no signature to read; expected a class or function written in Python, as "
            "`def attend(q, k, v, mask=None): ...` around it"
        )
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    words = {given: next((w for w in names if w in parameters), None) for given, names in WORDS.items()}
    if anything:
        words |= {given: words[given] or given for given in ("dim", "num_heads", "causal")}
    claims = {feature for feature, given in (("dropout", "dropout"), ("gqa", "num_kv_heads")) if words[given]}
    rest = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {word for word, p in parameters.items() if p.default is p.empty and p.kind not in rest}

    def make(*, dim: int, num_heads: int, causal: bool, device: Any = None, dtype: Any = None, **own: Any) -> nn.Module:
        given: dict[str, Any] = {"dim": dim, "num_heads": num_heads, "causal": causal, **own}
        if words["head_dim"] in needed:
            given["head_dim"] = dim // num_heads
        passed = {}
        for key, value in given.items():
            if (word := words.get(key, key)) is not None:
                passed[word] = value
            elif key in ("num_kv_heads", "dropout"):
                does_not_apply(f"{name} takes no {key}")
        if "batch_first" in parameters:
            passed["batch_first"] = True
        if missing := needed - passed.keys() - options.keys():
            raise ValueError(
                f"check: {name} needs {', '.join(sorted(missing))}; expected values in options, as "
                f"{name}({sorted(missing)[0]}=...)"
            )
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            made = thing(**{**passed, **options})
        if not isinstance(made, nn.Module):
            raise TypeError(f"check: {name} made a {type(made).__name__}; expected a torch.nn.Module")
        return _adapted(made, causal, told=words["causal"] is not None).to(device=device, dtype=dtype)

    make.claims = claims  # type: ignore[attr-defined]
    return make


def _adapted(module: nn.Module, causal: bool, *, told: bool) -> nn.Module:
    return module if isinstance(module, Attention | HeadMixer) else Adapter(module, causal, told=told)


class Adapter(nn.Module):
    """Somebody's module, called as regard calls its own: (x[, context], *, mask=), with one tensor back."""

    def __init__(self, inner: nn.Module, causal: bool, *, told: bool):
        super().__init__()
        self.inner, self.causal, self.told = inner, causal, told
        names = _parameters(inner.forward)
        self.qkv = _is_qkv(names)
        self.asks = frozenset(names)
        self.second = next((n for n in list(names)[1:2] if names[n].kind is not inspect.Parameter.KEYWORD_ONLY), None)
        self.context = next((n for n in ("context", "encoder_hidden_states", "memory") if n in names), None)
        self.pairs = next((n for n in ("mask", "attn_mask") if n in names), None)
        self.keys = next((n for n in ("key_padding_mask", "attention_mask") if n in names), None)
        self.hears = {"x"} | {"context"} & ({"context"} if self.qkv or self.context else set())
        self.hears |= {"mask"} if self.pairs or self.keys else set()
        self.hears |= {"positions"} & self.asks
        self.supports = frozenset(self.claims())
        for name in ("init_state", "step"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def claims(self) -> set[str]:
        """What its signatures say that it can do."""
        found = {"bidirectional"} | ({"causal"} if self.told or self.pairs else set())
        found |= {"cross"} if self.qkv or self.context else set()
        found |= {"padding"} if self.pairs or self.keys else set()
        found |= {"mask"} if self.pairs else set()
        return found | ({"streaming"} if hasattr(self, "step") and hasattr(self, "init_state") else set())

    def takes(self, argument: str) -> bool:
        return argument in self.hears

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *more: Tensor,
        mask: Mask | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if context is not None and not (self.qkv or self.context) and self.second in (None, self.pairs, self.keys):
            raise TypeError(f"{type(self.inner).__name__}: context is an unexpected argument")
        named: dict[str, Any] = {} if positions is None else {"positions": positions}
        source = x if context is None else context
        if x.dim() == 3:
            named |= self._masks(mask, x, source)
        if self.qkv:
            out = self.inner(x, source, source, **named)
        elif context is not None and self.context:
            out = self.inner(x, **{self.context: context}, **named)
        else:
            out = self.inner(x, *(() if context is None else (context,)), *more, **named)
        return out[0] if isinstance(out, tuple | list) else out

    def _masks(self, mask: Mask | Tensor | None, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        """The mask, and causality where the module was not told of it, as the module takes them."""
        named: dict[str, Tensor] = {}
        causal = masks.causal() if self.causal and not self.told and self.pairs else None
        keep = None
        if mask is not None:
            if not self.pairs and not self.keys:
                raise TypeError(f"{type(self.inner).__name__}: mask is an unexpected argument")
            try:
                keep = key_padding(self, mask, source)
            except ValueError:
                if not self.pairs:
                    raise
        if keep is not None and self.keys:
            named[self.keys] = ~keep if self.keys == "key_padding_mask" else keep.long()
            mask = None
        whole = masks.dense(mask) if isinstance(mask, Tensor) and mask.dim() == 4 else mask
        if isinstance(whole, Tensor):
            whole = masks.padding(whole)
        whole = causal if whole is None else whole if causal is None else whole & causal
        if whole is None or self.pairs is None:
            return named
        if keep is not None and causal is None and not self.qkv:
            return named | {self.pairs: keep[:, None, None]}
        allowed = whole.to(x.device).dense(x.shape[1], source.shape[1], device=x.device)
        if not self.qkv:
            return named | {self.pairs: allowed.expand(x.shape[0], -1, -1, -1)}
        heads = _said(self.inner, "num_heads", None) or 1
        if allowed.shape[:2] == (1, 1):
            return named | {self.pairs: ~allowed[0, 0]}
        return named | {self.pairs: ~allowed.expand(x.shape[0], heads, -1, -1).flatten(0, 1)}


# --- functions of queries, keys and values --------------------------------------------------------------------


def _called(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Call it with what it takes; what it has no argument for says nothing about it."""
    parameters = _parameters(function)
    named: dict[str, Any] = {}

    def put(what: str, value: Any, *words: str) -> None:
        word = next((w for w in words if w in parameters), None)
        if word is None:
            does_not_apply(f"the function takes no {what}")
        named[word] = value

    takes_causal = any(w in parameters for w in WORDS["causal"])
    whole = masks.dense(mask) if isinstance(mask, Tensor) else mask
    if causal and (whole is not None or not takes_causal):
        whole = masks.causal() if whole is None else whole & masks.causal()
    elif causal:
        put("causality", True, *WORDS["causal"])
    if whole is not None:
        allowed = whole.to(q.device).dense(q.shape[2], k.shape[2], device=q.device).expand(q.shape[0], -1, -1, -1)
        put("mask", allowed, "mask", "attn_mask")
    if bias is not None:
        put("bias", bias, "bias", "attn_bias")
    if scale is not None:
        put("scale", scale, "scale", "softmax_scale")
    if q.shape[1] != k.shape[1] and "enable_gqa" in parameters:
        named["enable_gqa"] = True
    out = function(q, k, v, **named)
    return out[0] if isinstance(out, tuple | list) else out


class Projected(HeadMixer):
    """A function of queries, keys and values between projections."""

    def __init__(self, function: Callable[..., Any], dim: int, num_heads: int, **sizes: Any):
        super().__init__(dim, num_heads, **sizes)
        self.function = function
        parameters = _parameters(function)
        masked = any(w in parameters for w in ("mask", "attn_mask"))
        found = {"bidirectional", "cross"} | ({"padding", "mask"} if masked else set())
        found |= {"causal"} if masked or any(w in parameters for w in WORDS["causal"]) else set()
        self.supports = frozenset(found)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None
    ) -> Tensor:
        source = x if context is None else context
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = masks.padding(mask)
        return self.merge(_called(self.function, *self.split(x, source), causal=self.causal, mask=mask))


def _projected(function: Any, name: object) -> Callable[..., nn.Module]:
    def make(*, dim: int, num_heads: int, causal: bool, device: Any = None, dtype: Any = None, **own: Any) -> nn.Module:
        if own.keys() - {"num_kv_heads", "head_dim"}:
            does_not_apply(f"{name} is called by the laws without {', '.join(own)}")
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            return Projected(function, dim, num_heads, causal=causal, **own).to(device=device, dtype=dtype)

    return make

"""Anybody's attention as a subject of the laws: how it is built, and what it claims.

A class, or a function that makes a module, is handed the sizes under the names that the field uses (`WORDS`). What it
can do is what its attribute `supports` says, or else its signatures; `traits`, `protocol` and `exceptions` may be
attributes of it, too. `regard.laws.adapter` says how it is called.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from regard.cards import FEATURES, TRAITS, Card
from regard.catalog import placed
from regard.checks import choice, refuse, whole
from regard.laws.adapter import CAUSAL, Adapter, Function, Projected, is_qkv, parameters
from regard.laws.agreement import does_not_apply
from regard.laws.registry import MIXERS
from regard.laws.subject import Subject, of, reaches
from regard.masks import padding
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.layer import Attention

WORDS = {
    "dim": ("dim", "embed_dim", "d_model", "hidden_size", "hidden_dim", "n_embd", "embed_size", "model_dim"),
    "num_heads": ("num_heads", "n_heads", "nhead", "n_head", "heads", "num_attention_heads"),
    "causal": CAUSAL,
    "num_kv_heads": ("num_kv_heads", "n_kv_heads", "num_key_value_heads", "kv_heads"),
    "dropout": ("dropout", "dropout_p", "attn_drop", "attention_dropout", "attn_dropout"),
    "head_dim": ("head_dim", "dim_head", "d_head", "d_k"),
}
"""What `create` hands over -> how the field's classes call it."""


def subject(
    thing: Any,
    *,
    protocol: str | None = None,
    supports: Iterable[str] | None = None,
    traits: Iterable[str] | None = None,
    dim: int | None = None,
    heads: int | None = None,
    options: Mapping[str, Any] | None = None,
    inputs: Callable[..., tuple[Any, ...]] | None = None,
    exceptions: Mapping[str, str] | None = None,
) -> Subject:
    """What is to be put through the laws; see `regard.check` for the arguments."""
    for size, number in (("dim", dim), ("heads", heads)):
        if number is not None:
            whole("check", **{size: number})
    if isinstance(thing, Card) or (isinstance(thing, str) and ":" not in thing):
        told = {"protocol": protocol, "supports": supports, "traits": traits, "inputs": inputs}
        for name, value in (told | {"exceptions": exceptions}).items():
            if value:
                refuse("check", name, "is what the card of a mechanism says", repr(value), "none")
        found = of(thing.name if isinstance(thing, Card) else thing)
        found = _sized(found, dim, heads)
        found = replace(found, example={**found.example, **(options or {})})
        _built(found, "bidirectional" not in found.supports)
        return found
    name = thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)
    thing = _found(thing) if isinstance(thing, str) else thing

    def said(attribute: str, given: Any, default: Any) -> Any:
        return given if given is not None else getattr(thing, attribute, default)

    kind = str(said("protocol", protocol, "TokenMixer"))
    choice("check", MIXERS.split(), protocol=kind)
    function = Function(thing, dict(options or {})) if _is_function(thing) else None
    make = _between(function, name) if function else _maker(thing, name, kind, dict(options or {}))
    found = Subject(
        str(name),
        make,
        kind,
        traits=frozenset(said("traits", traits, ())),
        given=inputs,
        exceptions=dict(said("exceptions", exceptions, {})),
        function=function,
        foreign=True,
        fixed=isinstance(thing, nn.Module),
    )
    if isinstance(thing, nn.Module):
        dim, heads = (_size(thing, "dim") if dim is None else dim), (_size(thing, "num_heads") or heads)
    found = _sized(found, dim, heads)
    claimed = said("supports", supports, None)
    claims = _claims(found, make) if claimed is None else frozenset(claimed)
    for given, known, what in ((claims, FEATURES, "supports"), (found.traits, TRAITS, "traits")):
        for word in given:
            choice("check", sorted(known), **{what: word})
    if not claims & {"causal", "bidirectional"}:
        claims |= {"bidirectional"}
    found = replace(found, supports=claims)
    _answers(found)
    return found


def _sized(s: Subject, dim: int | None, heads: int | None) -> Subject:
    return replace(s, dim=dim or s.dim, heads=heads or s.heads)


def _found(name: str) -> Any:
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"check: {name!r} can't be found ({error}); expected package.module:Thing") from error


def _size(module: nn.Module, what: str) -> int | None:
    """A size of a built module, by whatever name it goes there."""
    return next((n for w in WORDS[what] if isinstance(n := getattr(module, w, None), int)), None)


def _is_function(thing: Any) -> bool:
    """Whether it is called with queries, keys and values, rather than built."""
    made = isinstance(thing, type | nn.Module) or not callable(thing)
    return not made and is_qkv(parameters(thing))


# --- before any law is looked at ------------------------------------------------------------------------------


def _built(s: Subject, causal: bool) -> Any:
    """One instance. What keeps it from being built is said once, and not by every law."""
    try:
        with torch.random.fork_rng(devices=[]):
            return s.make(**{"dim": s.dim, "num_heads": s.heads, "causal": causal, **s.example})
    except (ValueError, TypeError) as error:
        if str(error).startswith("check:"):
            raise
        raise type(error)(f"check: {s.name} can't be built: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"check: {s.name} can't be built with dim={s.dim}, num_heads={s.heads}: {reason}") from error


def _claims(s: Subject, make: Callable[..., Any]) -> frozenset[str]:
    """What it can do, by its signatures; which directions, where those don't say, by what it is built as and sees."""
    try:
        module, refused = _built(s, False), False
    except (ValueError, TypeError):
        module, refused = _built(s, True), True
    found = set(module.supports) | getattr(make, "claims", set())
    if s.fixed and getattr(module, "told", False):  # it was built as the one or the other
        found -= {"bidirectional" if module.inner.causal else "causal"}
    elif refused:
        found -= {"bidirectional"}
    elif "causal" not in found and s.protocol == "TokenMixer" and _sees_no_future(s):
        found = found - {"bidirectional"} | {"causal"}
    return frozenset(found)


def _sees_no_future(s: Subject) -> bool:
    """Whether tokens see others, but none that comes later: it is causal without being told."""
    try:
        seen = reaches(replace(s, supports=frozenset({"bidirectional"})).build(), s.tokens(1, 6))
    except Exception:  # what is wrong with a call is said by `_answers`
        return False
    return bool(seen.tril(-1).any()) and not bool(seen.triu(1).any())


def _answers(s: Subject) -> None:
    """A plain call, and one with a mask where masks are taken: what is wrong with all calls is said once."""
    with torch.random.fork_rng(devices=[]):
        module, given = s.build(), s.inputs()
        calls: dict[str, dict[str, Any]] = {"": {}}
        if "padding" in s.supports and s.protocol == "TokenMixer":
            calls[" and a mask"] = {"mask": padding(torch.ones(given[0].shape[:2], dtype=torch.bool))}
        for what, named in calls.items():
            shapes = ", ".join(str(tuple(g.shape)) for g in given)
            try:
                out = module(*given, **named)
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise ValueError(
                    f"check: {s.name} can't be called with float64 tensors {shapes}{what} ({said}); expected a "
                    f"{s.protocol}, or another protocol, inputs or supports"
                ) from error
            if not isinstance(out, Tensor):
                raise TypeError(f"check: {s.name} gives a {type(out).__name__}; expected a tensor, or a tuple of it")


# --- how it is built ------------------------------------------------------------------------------------------


def _maker(thing: Any, name: object, protocol: str, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """How to make a module of this class, function or built module."""
    if isinstance(thing, nn.Module):
        if options:
            refuse("check", "options", "are of no use to a module that is built", options, "none, or its class")
        told = isinstance(getattr(thing, "causal", None), bool)
        return functools.partial(_copied, thing, told, protocol)
    if not callable(thing):
        raise TypeError(
            f"check: thing has the wrong type (got {thing!r}); expected a class, a function, a module, or a name"
        )
    asks = parameters(thing)
    if not asks:
        raise ValueError(
            f"check: {name} has no signature to read; expected a class or function written in Python, as "
            "`def attend(q, k, v, mask=None): ...` around it"
        )
    words = {given: next((w for w in names if w in asks), None) for given, names in WORDS.items()}
    if any(p.kind is p.VAR_KEYWORD for p in asks.values()):
        words |= {given: words[given] or given for given in ("dim", "num_heads", "causal")}
    needed = {w for w, p in asks.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

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
        if "batch_first" in asks:
            passed["batch_first"] = True
        if missing := sorted(needed - passed.keys() - options.keys()):
            raise ValueError(
                f"check: {name} needs {', '.join(missing)}; expected values in options, as {name}({missing[0]}=...)"
            )
        with placed(device):
            made = thing(**{**passed, **options})
        if not isinstance(made, nn.Module):
            raise TypeError(f"check: {name} made a {type(made).__name__}; expected a torch.nn.Module")
        told = words["causal"] is not None
        return _adapted(made, causal, told, protocol).to(device=device, dtype=dtype)

    make.claims = {f for f, word in (("dropout", "dropout"), ("gqa", "num_kv_heads")) if words[word]}  # type: ignore[attr-defined]
    return make


def _copied(thing: nn.Module, told: bool, protocol: str, *, causal: bool, **asked: Any) -> nn.Module:
    if asked.keys() & {"num_kv_heads", "device"} or asked.get("dropout"):
        does_not_apply("it was built by its owner; its class would show other options")
    return _adapted(copy.deepcopy(thing), causal, told, protocol)


def _adapted(module: nn.Module, causal: bool, told: bool, protocol: str) -> nn.Module:
    if isinstance(module, Attention | HeadMixer):
        return module
    return Adapter(module, causal, told=told, protocol=protocol)


def _between(function: Function, name: object) -> Callable[..., nn.Module]:
    """How to make projections with the function between them."""

    def make(*, dim: int, num_heads: int, causal: bool, device: Any = None, dtype: Any = None, **own: Any) -> nn.Module:
        if own.keys() - {"num_kv_heads", "head_dim"}:
            does_not_apply(f"{name} is called by the laws without {', '.join(own)}")
        with placed(device):
            return Projected(function, dim, num_heads, causal=causal, **own).to(device=device, dtype=dtype)

    return make

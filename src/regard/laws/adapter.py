"""Somebody's module or function, called as regard calls its own: (x[, context], *, mask=) with one tensor back.

How it is called is read from its signature. Masks go in as it takes them:

    mask or attn_mask     bool, True = may attend, (B, 1, 1, S) for padding and (B, 1, T, S) for pairs; torch's own
                          polarity and shapes where it is called as torch.nn.MultiheadAttention is
    key_padding_mask      bool (B, S), True = hidden, as in torch
    attention_mask        int (B, S), 1 = a real token, as in transformers
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regard import masks
from regard.laws.agreement import does_not_apply
from regard.masks import Mask
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import key_padding

CAUSAL = ("causal", "is_causal")
PAIRS = ("mask", "attn_mask")
PADDING = ("key_padding_mask", "attention_mask")
CONTEXT = ("context", "encoder_hidden_states", "memory")
QKV = (("q", "query", "queries"), ("k", "key", "keys"), ("v", "value", "values"))


def parameters(thing: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of what can be called; none where it does not tell."""
    try:
        return inspect.signature(thing).parameters
    except (ValueError, TypeError):
        return {}


def is_qkv(names: Iterable[str]) -> bool:
    """Whether the first three are queries, keys and values."""
    first = list(names)[:3]
    return len(first) == 3 and all(name in known for name, known in zip(first, QKV, strict=True))


def first_of(words: Iterable[str], names: Iterable[str]) -> str | None:
    """The word that is among the names."""
    return next((word for word in words if word in names), None)


# --- modules ------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Somebody's module. What this one does not have is looked for in `inner`.

    Args:
        causal: whether no query may see a later key.
        told: whether the module knows that by itself; else it is handed a mask.
        protocol: what it takes, see `regard.kinds`.
    """

    def __init__(self, inner: nn.Module, causal: bool, *, told: bool, protocol: str):
        super().__init__()
        self.inner, self.causal, self.told = inner, causal, told
        names = parameters(inner.forward)
        self.qkv = is_qkv(names)
        self.pairs, self.padding = first_of(PAIRS, names), first_of(PADDING, names)
        self.context = None if self.qkv else first_of(CONTEXT, names)
        self.beside = self.qkv or self.context is not None or protocol != "TokenMixer"
        masked = {"mask"} if self.pairs or self.padding else set()
        self.hears = {"x"} | masked | ({"context"} if self.beside else set()) | {"positions"} & names.keys()
        self.supports = frozenset(self.claims())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def claims(self) -> set[str]:
        """What its signatures say that it can do."""
        found = {"bidirectional"} | ({"causal"} if self.told or self.pairs else set())
        found |= {"cross"} if self.qkv or self.context else set()
        found |= {"padding"} if self.pairs or self.padding else set()
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
        if context is not None and not self.beside:
            raise TypeError(f"{type(self.inner).__name__}: context is an unexpected argument")
        named: dict[str, Any] = {} if positions is None else {"positions": positions}
        source = x if context is None else context
        if x.dim() == 3:
            named |= self.masks(mask, x, source)
        turned = getattr(self.inner, "batch_first", True) is False
        x, source = (z.transpose(0, 1) if turned else z for z in (x, source))
        if self.qkv:
            out = self.inner(x, source, source, **named)
        elif context is None:
            out = self.inner(x, *more, **named)
        elif self.context:
            out = self.inner(x, *more, **{self.context: source}, **named)
        else:
            out = self.inner(x, source, *more, **named)
        out = out[0] if isinstance(out, tuple | list) else out
        return out.transpose(0, 1) if turned else out

    def masks(self, mask: Mask | Tensor | None, x: Tensor, source: Tensor) -> dict[str, Tensor]:
        """The mask, and causality where the module was not told of it, as the module takes them."""
        if mask is not None and not (self.pairs or self.padding):
            raise TypeError(f"{type(self.inner).__name__}: mask is an unexpected argument")
        named: dict[str, Tensor] = {}
        keep = self.keys(mask, source)
        if keep is not None and self.padding:
            named[self.padding] = ~keep if self.padding == "key_padding_mask" else keep.long()
            mask = None
        whole = masks.dense(mask) if isinstance(mask, Tensor) and mask.dim() == 4 else mask
        whole = masks.padding(whole) if isinstance(whole, Tensor) else whole
        if self.causal and not self.told and self.pairs:
            whole = masks.causal() if whole is None else whole & masks.causal()
        elif keep is not None and mask is not None and not self.qkv:
            return {str(self.pairs): keep[:, None, None]}
        if whole is None or self.pairs is None:
            return named
        allowed = whole.to(x.device).dense(x.shape[1], source.shape[1], device=x.device)
        if not self.qkv:
            return named | {self.pairs: allowed.expand(x.shape[0], -1, -1, -1)}
        if allowed.shape[:2] == (1, 1):
            return named | {self.pairs: ~allowed[0, 0]}
        heads = getattr(self.inner, "num_heads", 1)
        return named | {self.pairs: ~allowed.expand(x.shape[0], heads, -1, -1).flatten(0, 1)}

    def keys(self, mask: Mask | Tensor | None, source: Tensor) -> Tensor | None:
        """(B, S), where the mask hides keys alone."""
        try:
            return key_padding(self, mask, source)
        except ValueError:
            if self.pairs is None:
                raise
            return None


# --- functions of queries, keys and values --------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """Somebody's function, called with what it takes; what it has no argument for says nothing about it."""

    call: Callable[..., Any]
    options: Mapping[str, Any]

    def takes(self, *words: str) -> str | None:
        """The word of these that is an argument of it."""
        return first_of(words, parameters(self.call))

    def __call__(
        self,
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
        own, word = self.takes(*CAUSAL), self.takes(*PAIRS)
        given = dict(self.options)
        for what, value, known in (("bias", bias, ("bias", "attn_bias")), ("scale", scale, ("scale", "softmax_scale"))):
            if value is not None:
                given[self.takes(*known) or does_not_apply(f"it takes no {what}")] = value
        if q.shape[1] != k.shape[1] and self.takes("enable_gqa"):
            given["enable_gqa"] = True
        whole = masks.dense(mask) if isinstance(mask, Tensor) else mask
        beside = {own: causal} if own else {}
        if causal and not own:
            whole = masks.causal() if whole is None else whole & masks.causal()
        if whole is None:
            return first(self.call(q, k, v, **given, **beside))
        if word is None:
            does_not_apply("it takes no mask")

        def dense(mask: Mask) -> dict[str, Tensor]:
            allowed = mask.to(q.device).dense(q.shape[2], k.shape[2], device=q.device)
            return {word: allowed.expand(q.shape[0], -1, -1, -1)}

        if not (causal and own):
            return first(self.call(q, k, v, **given, **beside, **dense(whole)))
        try:
            return first(self.call(q, k, v, **given, **beside, **dense(whole)))
        except (ValueError, RuntimeError, NotImplementedError, AssertionError):  # as torch's own, it wants them joined
            return first(self.call(q, k, v, **given, **dense(whole & masks.causal())))


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple | list) else out


class Projected(HeadMixer):
    """A function of queries, keys and values between projections."""

    def __init__(self, function: Function, dim: int, num_heads: int, **sizes: Any):
        super().__init__(dim, num_heads, **sizes)
        self.function = function
        masked = function.takes(*PAIRS) is not None
        found = {"bidirectional", "cross"} | ({"padding", "mask"} if masked else set())
        self.supports = frozenset(found | ({"causal"} if masked or function.takes(*CAUSAL) else set()))

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None
    ) -> Tensor:
        source = x if context is None else context
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = masks.padding(mask)
        return self.merge(self.function(*self.split(x, source), causal=self.causal, mask=mask))

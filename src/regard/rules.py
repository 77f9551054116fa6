"""Functions of indices as users write them: asked for many entries at once, and watched for the tensors that they read.

A rule is written for one entry: f(b, h, q_idx, kv_idx), or f(score, b, h, q_idx, kv_idx). Most rules say the same of
index tensors that broadcast, and are asked so. One that does not is asked entry by entry, under torch.vmap.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from regard.checks import refuse
from regard.tracing import active, readable

Rule = Callable[..., Tensor]

_APART: "WeakKeyDictionary[Any, dict[tuple[bool, ...], bool]]" = WeakKeyDictionary()
"""Rule -> which axes had more than one entry -> whether it must be asked entry by entry."""


def takes(function: object, arguments: int) -> bool:
    """Whether this can be called with so many arguments. A class can't: it would be built."""
    if not callable(function) or isinstance(function, type):
        return False
    if torch.compiler.is_compiling():  # which can't read signatures
        return True
    try:
        inspect.signature(getattr(function, "forward", function)).bind(*range(arguments))
    except (TypeError, ValueError):
        return False
    return True


def entries(who: str, rule: Rule, *index: Tensor, key: Any = None) -> Tensor:
    """`rule` of index tensors that broadcast, as if it were asked about each entry: what broadcasts to their shape.

    Args:
        key: what the rule is known by, if it is made anew for every call; default the rule.

    Raises:
        ValueError: a rule that branches on what its tensors hold, or fails for another reason.
    """
    if not index[0].is_cpu and index[0].is_meta:
        return index[0]
    if _apart(who, rule, index, rule if key is None else key):
        return _one_by_one(rule, index)
    answer = rule(*index)
    if not _fits(answer, torch.broadcast_shapes(*(n.shape for n in index))):
        got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        refuse(who, "function", "gives something else than one value an entry", got, "what broadcasts with the indices")
    return answer


def _apart(who: str, rule: Rule, index: tuple[Tensor, ...], key: Any) -> bool:
    """Whether the rule must be asked entry by entry: found out once, at the corners of the first tile."""
    if torch.compiler.is_compiling() or active() or not readable(*index):
        return False
    axes = tuple(n > 1 for n in torch.broadcast_shapes(*(n.shape for n in index)))
    try:
        known = _APART.setdefault(key, {})
    except TypeError:  # no weak reference, or no hash
        known = {}
    if axes not in known:
        with torch._C.DisableTorchFunction():  # whoever watches is not told of this
            known[axes] = _decided(who, rule, tuple(_corners(n.detach()) for n in index))
    return known[axes]


@torch.no_grad()
def _decided(who: str, rule: Rule, index: tuple[Tensor, ...]) -> bool:
    shape = torch.broadcast_shapes(*(n.shape for n in index))
    together = apart = None
    try:
        together = rule(*index)
    except Exception as error:  # whatever a rule may raise; it is shown if there is no other way
        wrong = error
    else:
        wrong = ValueError(f"an answer of {type(together).__name__} {tuple(getattr(together, 'shape', ()))}")
    try:
        apart = _one_by_one(rule, index)
    except Exception:  # torch.vmap has no rule for something; then all depends on the other way
        apart = None
    fits = _fits(together, shape)
    if fits and (apart is None or _agree(together.expand(shape), apart)):  # type: ignore[union-attr]
        return False
    if apart is None:
        told = "a function of tensors, without `if` on what they hold, that has an answer for every pair"
        what = f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}"
        try:
            refuse(who, "function", "can't be asked about many pairs", what, told)
        except ValueError as error:
            raise error from wrong
    return True


def _fits(answer: object, shape: torch.Size) -> bool:
    if not isinstance(answer, Tensor) or answer.dim() > len(shape):
        return False
    return all(n in (1, m) for n, m in zip(reversed(answer.shape), reversed(shape), strict=False))


def _agree(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-6, equal_nan=True)


def _corners(index: Tensor) -> Tensor:
    """The first and the last along each axis."""
    for axis, n in enumerate(index.shape):
        if n > 2:
            index = index.index_select(axis, torch.tensor([0, n - 1], device=index.device))
    return index


def _one_by_one(rule: Rule, index: tuple[Tensor, ...]) -> Tensor:
    shape = torch.broadcast_shapes(*(n.shape for n in index))
    flat = (n.expand(shape).reshape(-1) for n in index)
    answer = torch.vmap(rule)(*flat)
    with torch._C.DisableTorchFunction():  # vmap's own tensors are nothing that the rule reads
        return answer.view(shape)


class Watch(TorchFunctionMode):
    """While entered, notes every tensor that torch's functions are handed and that they did not make: what a rule
    reads of its own. `given` are the indices; `swap` puts others in the place of tensors, by id.

    What is called past torch's functions, as a torch.autograd.Function, is not seen.
    """

    def __init__(self, given: tuple[Tensor, ...] = (), swap: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self.given, self.swap = given, swap or {}
        self.made: dict[int, Tensor] = {id(t): t for t in given}  # kept, or another would get its id
        self.found: dict[int, Tensor] = {}
        self.touched: set[int] = set()
        self.inside, self.wrapped = active(), False
        """Whether torch.func is at work outside, and on something that was read; a rule's own use of it is its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor):
                self._note(t)
        if self.swap:
            args, kwargs = tree_map(lambda t: self.swap.get(id(t), t), (args, kwargs))
        out = func(*args, **kwargs)
        self.made |= {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out

    def _note(self, t: Tensor) -> None:
        self.touched.add(id(t))
        if id(t) in self.made:
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(t):
            self.wrapped |= self.inside
        else:
            self.found[id(t)] = t


def reads(rule: Rule, *index: Tensor) -> list[Tensor] | None:
    """The tensors that a rule reads beside its indices. None where they can't be told: it failed, or torch.func is at
    work on some."""
    with torch.no_grad(), Watch(index) as watch:
        try:
            rule(*index)
        except Exception:  # it may have to be asked entry by entry, or not at all here
            return None
    return None if watch.wrapped else list(watch.found.values())

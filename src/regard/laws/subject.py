"""What is put through the laws: how to build small instances of it, what they are called with, and what is claimed."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from regard import catalog
from regard.cards import Card
from regard.kernels import KERNELS
from regard.laws.agreement import naive_precision, near, run
from regard.laws.form import Form
from regard.masks import Mask
from regard.shapes import HeadShape
from regard.stages import Position, Stage


@dataclass(frozen=True, eq=False)
class Subject:
    """A mechanism, as the laws see it: a way to build it, and what is said of it."""

    name: str
    make: Callable[..., Any]
    """make(dim=, num_heads=, causal=, **options) -> a module that is called as its protocol says."""
    protocol: str = "TokenMixer"
    supports: frozenset[str] = frozenset()
    traits: frozenset[str] = frozenset()
    example: Mapping[str, Any] = field(default_factory=dict)
    """Options that make a small instance exercise the mechanism."""
    given: Callable[[HeadShape], tuple[Any, ...]] | None = None
    """What it is called with, where its protocol alone doesn't say."""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    """Law id, or id and name -> why it need not hold."""
    card: Card | None = None
    """Its card in the catalogue; None for anything else."""
    function: "Any" = None
    """Itself, where it is a function of queries, keys and values."""
    foreign: bool = False
    """Whether it is anybody's code, which need not keep the catalogue's conventions."""
    fixed: bool = False
    """Whether it was built by its owner, so that its sizes are its own."""
    batch: int = 2
    length: int = 12
    dim: int = 24
    heads: int = 6
    """No two of the sizes that can be mixed up are equal."""
    drawn: list[tuple[int, int]] = field(default_factory=list, repr=False)
    """(B, T) of all tokens that were drawn for it."""

    @property
    def nan_safe(self) -> bool:
        """Whether what masks hide may hold NaN; most code multiplies it by zero, and has NaN everywhere."""
        return not self.foreign or "nan_safe" in self.traits

    def reason(self, id: str, name: str) -> str:
        """Why it is excepted from the law; '' if it is not."""
        return self.exceptions.get(f"{id} {name}", "") or self.exceptions.get(id, "")

    @property
    def width(self) -> int:
        """Of a head."""
        return self.dim // self.heads

    @property
    def is_part(self) -> bool:
        """Whether it fills slots of `regard.Attention`."""
        return self.card is not None and self.card.is_part

    @property
    def groups(self) -> Mapping[str, Any]:
        """The option that gives it fewer key heads than query heads; none where it has such by itself."""
        own = self.card is not None and self.card.made is not None and self.card.made.slot == "num_kv_heads"
        return {} if own else {"num_kv_heads": 2}

    @property
    def causalities(self) -> list[bool]:
        """The values of `causal` that it can be built with."""
        return [c for c, feature in ((False, "bidirectional"), (True, "causal")) if feature in self.supports]

    @property
    def crossings(self) -> list[bool]:
        """The values of `causal` with which it takes a context; only the pipeline's causality knows two lengths."""
        return [c for c in self.causalities if self.is_part or not c]

    def build(
        self, *, causal: bool | None = None, dtype: torch.dtype = torch.float64, noise: float = 0.3, **settings: Any
    ) -> Any:
        """A small instance, in eval mode, its parameters moved by `noise` so that identity and zero hide nothing."""
        causal = self.causalities[-1] if causal is None else causal
        torch.manual_seed(0)
        sizes = {"dim": self.dim, "num_heads": self.heads, "causal": causal}
        module = self.make(**{**sizes, **self.example, **settings})
        if not isinstance(module, nn.Module):  # a cache policy, say
            return module
        if noise and any(True for _ in module.parameters()):
            perturb(module, size=noise)
        return module.to(dtype).eval()

    def tokens(
        self, batch: int | None = None, length: int | None = None, *, seed: int = 2, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """N(0, 1) tokens (B, T, M)."""
        B, T = self.batch if batch is None else batch, self.length if length is None else length
        self.drawn.append((B, T))
        return tokens(B, T, dim=self.dim, seed=seed, dtype=dtype)

    def context(self, batch: int | None = None, length: int = 7, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Other tokens, of another number."""
        return self.tokens(batch, length, seed=5, dtype=dtype)

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """What its protocol is called with."""
        if self.given is not None:
            found = self.given(HeadShape(self.dim, self.heads, self.heads, self.width))
            return tuple(g.to(dtype) if g.is_floating_point() else g for g in found)
        if self.protocol == "FeatureMixer":
            return (self.tokens(length=64, dtype=dtype).mT.reshape(self.batch, self.dim, 8, 8).contiguous(),)
        if self.protocol == "GraphMixer":
            source = torch.arange(self.length)
            edges = torch.cat([torch.stack([source, (source + hop) % self.length]) for hop in (1, 2, 5)], 1)
            return (self.tokens(1, dtype=dtype)[0], edges)
        if self.protocol in ("CrossMixer", "Pointer"):
            return (self.tokens(dtype=dtype), self.context(dtype=dtype))
        return (self.tokens(dtype=dtype),)

    def form(self, *, kv_heads: int | None = None, width: int | None = None) -> Form | None:
        """Its function form; None where it needs a module (it reads tokens, changes heads, or gates)."""
        if self.function is not None:
            return Form({}, HeadShape(self.dim, self.heads, kv_heads or self.heads, width or self.width), self)
        card = self.card
        if card is None or not card.is_part:
            return None
        own = {k: v for k, v in card.example.items() if k in card.options}
        width = width or self.width
        shape = HeadShape(self.heads * width, self.heads, kv_heads or self.heads, width)
        torch.manual_seed(0)
        parts = card.parts({**vars(shape), "causal": True, "dropout": 0.0}, own)
        if parts.keys() & {"gate", "heads", "selector"}:
            return None
        for part in parts.values():
            if isinstance(part, nn.Module):
                if "tokens" in getattr(part, "needs", ()) or (isinstance(part, Stage) and part.prepares()):
                    return None
                part.double().eval()
                perturb(part)
        if kv_heads is None and parts.get("num_kv_heads"):
            shape = HeadShape(self.heads * width, self.heads, parts["num_kv_heads"], width)
        return Form(parts, shape, self)


@functools.cache
def of(name: str) -> Subject:
    """A mechanism of the catalogue, by name; joined names as in `create`."""
    parts = [catalog.card(part.strip()) for part in name.split("+")]
    first = parts[0]
    example: dict[str, Any] = {}
    for card in parts:
        example |= card.example
    together = len(parts) > 1
    return Subject(
        name,
        lambda **settings: catalog.create(name, **settings),
        first.protocol,
        frozenset.intersection(*(frozenset(c.supports) for c in parts)),
        frozenset() if together else frozenset(first.traits),
        example,
        first.inputs,
        {} if together else first.exceptions,
        None if together else first,
    )


# --- building and calling -----------------------------------------------------------------------------------


def tokens(
    batch: int = 2, length: int = 12, *, dim: int = 24, seed: int = 2, dtype: torch.dtype = torch.float64
) -> Tensor:
    """N(0, 1) tokens (B, T, M)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)


def perturb(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Add noise to every parameter, so that identity and zero inits hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=size)


def takes(module: Any, argument: str) -> bool:
    """Whether `forward` has an argument of that name; an adapter says so for what it stands around."""
    if hasattr(module, "takes"):
        return module.takes(argument)
    return argument in inspect.signature(module.forward).parameters


def field_of(module: Any, length: int, keys: int | None = None) -> Tensor:
    """(T, S) bool: which keys may reach which queries, by the module's own word."""
    if hasattr(module, "receptive_field"):
        return module.receptive_field().dense(length, keys).any(1).any(0)
    keys = length if keys is None else keys
    allowed = torch.ones(length, keys, dtype=torch.bool)
    return allowed.tril(keys - length) if getattr(module, "causal", False) else allowed


def reaches(module: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    """(T, S) bool: whether token j of the context (or of x itself) changes output i at all."""
    source = (x if context is None else context).clone().requires_grad_()
    out = module(source) if context is None else module(x, source)
    direction = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    rows = [torch.autograd.grad((row * direction).sum(), source, retain_graph=True)[0] for row in out[0]]
    return torch.stack(rows)[:, 0].ne(0).any(-1)


def moves_freely(s: Subject, module: Any) -> bool:
    """Whether its tokens may stand further on: it asks for distances alone, or can be told the positions."""
    if hasattr(module, "receptive_field") and s.is_part and not module.receptive_field().is_shift_invariant:
        return False
    position = getattr(module, "position", None)
    told = isinstance(position, Position) and not (position.changes("bias") or position.changes("values"))
    return told or bool(s.traits & {"shift_invariant", "position_free"})


def placed(module: Any) -> bool:
    """Whether its own mask or a stage counts places from the first of a row, padding among them."""
    mask = getattr(module, "mask", None)
    counts = any(part.placed for part in module.children() if isinstance(part, Stage))
    return counts or (isinstance(mask, Mask) and not mask.is_shift_invariant)


def pairs(batch: int, length: int) -> Tensor:
    """(B, 1, T, T) bool: any pattern, every query sees itself."""
    allowed = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(7)) < 0.4
    return allowed | torch.eye(length, dtype=torch.bool)


# --- precision ----------------------------------------------------------------------------------------------


def no_worse_than_naive(
    s: Subject, dtype: torch.dtype, given: list[tuple[Tensor, ...]], change: Callable[[Any], None] = lambda module: None
) -> None:
    """The layer in this dtype and its gradients, next to the plain computation's distance from float64."""
    module = s.build(dtype=dtype)
    change(module)
    exact = s.build(dtype=dtype)
    change(exact)
    exact = exact.double()
    want = [run(exact, *(x.double() if x.is_floating_point() else x for x in xs)) for xs in given]
    got = [run(module, *xs) for xs in given]
    if isinstance(getattr(module, "kernel", None), str):  # and not the width of a convolution
        module.kernel = "eager"
    with naive_precision():
        naive = [run(module, *xs) for xs in given]
    for key in want[0]:
        g, w, n = (torch.stack([r[key] for r in results]) for results in (got, want, naive))
        near(g, w, n, key, grad=key != "out")


@contextlib.contextmanager
def small_tiles(block: int = 4, keys: int = 5) -> Iterator[None]:
    """Chunks and blocks so small that a few tokens straddle many of them."""
    block_sparse, chunked, window = (KERNELS[name] for name in ("block_sparse", "chunked", "window"))
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (block_sparse, "BLOCK", block),
            (chunked, "KEYS", keys),
            (window, "SMALLEST", block),
            (window, "LARGEST", block),
            (chunked, "TILE_BYTES", 0),  # 16 rows a chunk, the least
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield

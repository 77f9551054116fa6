"""What the laws are run on: small instances of every card, inputs for them, and the tolerance rules."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.masks import Mask
from regard.shapes import HeadShape
from regard.stages import IN_KERNELS

B, T, DIM, HEADS, WIDTH = 2, 12, 24, 6, 4
"""No two of the sizes that can be mixed up are equal."""

# Analyses are functions of attention maps, no layers: `regard.mechanisms()` leaves them out, and so do the laws.
ALL = "TokenMixer CrossMixer FeatureMixer GraphMixer Pooler Pointer Loss"
BATCHED = "TokenMixer CrossMixer FeatureMixer Pooler Pointer"


# --- which cards a law is about -----------------------------------------------------------------------------


def names(
    *,
    needs: str = "",
    traits: str = "",
    pipeline: bool = False,
    function: bool = False,
    protocols: str = "TokenMixer",
    where: Callable[[regard.Card], bool] = lambda card: True,
) -> list[str]:
    """Cards that claim all of `needs` and have all of `traits`."""
    found = []
    for name in regard.mechanisms():
        card = regard.card(name)
        if not set(needs.split()) <= card.supports or not set(traits.split()) <= card.traits:
            continue
        if card.protocol not in protocols.split() or (pipeline and not card.is_part) or not where(card):
            continue
        if function and form(name) is None:
            continue
        found.append(name)
    return found


def law(id: str, **which: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrise a law over the cards it is about. The test stays a plain function of the card's name."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        cells = [pytest.param(name, id=f"{id}-{name}") for name in names(**which)]
        return pytest.mark.law(id)(pytest.mark.parametrize("name", cells)(test))

    return mark


def causalities(name: str) -> list[bool]:
    """The values of `causal` that the card can be built with."""
    supports = regard.card(name).supports
    return [c for c, feature in ((False, "bidirectional"), (True, "causal")) if feature in supports]


def crossings(name: str) -> list[bool]:
    """The values of `causal` with which it takes a context; only the pipeline's causality knows two lengths."""
    return [c for c in causalities(name) if regard.card(name).is_part or not c]


# --- instances ----------------------------------------------------------------------------------------------


def perturb(module: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Add noise to every parameter, so that identity and zero inits hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=size)


def build(
    name: str,
    *,
    causal: bool | None = None,
    dtype: torch.dtype = torch.float64,
    dim: int = DIM,
    num_heads: int = HEADS,
    noise: float = 0.3,
    **settings: Any,
) -> Any:
    """A small instance, in eval mode."""
    causal = causalities(name)[-1] if causal is None else causal
    torch.manual_seed(0)
    options = {**regard.card(name).example, **settings}
    module = regard.create(name, dim=dim, num_heads=num_heads, causal=causal, **options)
    if noise:
        perturb(module, size=noise)
    return module.to(dtype).eval()


def tokens(
    batch: int = B, length: int = T, *, dim: int = DIM, seed: int = 2, dtype: torch.dtype = torch.float64
) -> Tensor:
    """N(0, 1) tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    name: str, dtype: torch.dtype = torch.float64, *, dim: int = DIM, num_heads: int = HEADS
) -> tuple[Tensor, ...]:
    """What the card's protocol is called with."""
    card = regard.card(name)
    if card.inputs is not None:
        given = card.inputs(HeadShape(dim, num_heads, num_heads, dim // num_heads))
        return tuple(g.to(dtype) if g.is_floating_point() else g for g in given)
    if card.protocol == "FeatureMixer":
        return (tokens(B, 8 * 8, dim=dim, dtype=dtype).mT.reshape(B, dim, 8, 8).contiguous(),)
    if card.protocol == "GraphMixer":
        source = torch.arange(T)
        edges = torch.cat([torch.stack([source, (source + hop) % T]) for hop in (1, 2, 5)], 1)
        return (tokens(1, dim=dim, dtype=dtype)[0], edges)
    if card.protocol in ("CrossMixer", "Pointer"):
        return (tokens(dim=dim, dtype=dtype), tokens(B, 7, dim=dim, seed=5, dtype=dtype))
    return (tokens(dim=dim, dtype=dtype),)


def takes(module: nn.Module, argument: str) -> bool:
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


# --- the mechanism as a function of queries, keys and values ------------------------------------------------


@dataclass
class Form:
    """`regard.attention` with a card's parts in its slots."""

    parts: dict[str, Any]
    shape: HeadShape
    card: regard.Card = field(repr=False)

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
        return regard.attention(q, k, v, **self.arguments(causal, mask, bias, scale, kernel))

    def arguments(
        self,
        causal: bool = False,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        scale: float | None = None,
        kernel: str | None = None,
    ) -> dict[str, Any]:
        """The options of `regard.attention` and `regard.plan`."""
        whole = masks.dense(mask) if isinstance(mask, Tensor) else mask
        for own in (self.parts.get("mask"), masks.causal() if causal else None):
            if own is not None:
                whole = own if whole is None else own & whole
        slots = {n: self.parts[n] for n in IN_KERNELS if n in self.parts}
        kernel = kernel or self.parts.get("kernel", "auto")
        return {**slots, "mask": whole, "bias": bias, "scale": scale, "kernel": kernel}

    @property
    def rotates(self) -> bool:
        return "position" in self.parts and self.parts["position"].changes("rotate")

    @property
    def reads_only_scores(self) -> bool:
        """Whether queries and keys count by their products alone."""
        position = self.parts.get("position")
        mixes = self.parts.keys() & {"score_mix", "weight_mix"}
        return not mixes and (position is None or not (position.changes("bias") or position.changes("values")))

    def qkv(
        self,
        batch: int = B,
        length: int = T,
        keys: int | None = None,
        *,
        value_width: int | None = None,
        seed: int = 3,
    ) -> list[Tensor]:
        """Random queries, keys and values that want gradients."""
        generator = torch.Generator().manual_seed(seed)
        keys, s = length if keys is None else keys, self.shape
        sizes = (
            (batch, s.num_heads, length, s.head_dim),
            (batch, s.num_kv_heads, keys, s.head_dim),
            (batch, s.num_kv_heads, keys, value_width or s.head_dim),
        )
        return [torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes]


def form(name: str, *, heads: int = HEADS, kv_heads: int | None = None, width: int = WIDTH) -> Form | None:
    """The card's function form; None where it needs a module (it reads tokens, changes heads, or gates)."""
    card = regard.card(name)
    if not card.is_part:
        return None
    own = {k: v for k, v in card.example.items() if k in card.options}
    shape = HeadShape(heads * width, heads, kv_heads or heads, width)
    torch.manual_seed(0)
    parts = card.parts({**vars(shape), "causal": True, "dropout": 0.0}, own)
    if parts.keys() & {"gate", "heads", "selector"}:
        return None
    for part in parts.values():
        if isinstance(part, nn.Module):
            if "tokens" in getattr(part, "needs", ()):
                return None
            part.double().eval()
            perturb(part)
    if kv_heads is None and parts.get("num_kv_heads"):
        shape = HeadShape(heads * width, heads, parts["num_kv_heads"], width)
    return Form(parts, shape, card)


def able(plan: regard.Plan, reasons: Callable[[str], list[str]]) -> Iterator[str]:
    """Kernels that can run what the plan is about."""
    for kernel in (plan.kernel, *plan.why_not):
        if not reasons(kernel):
            yield kernel


# --- running and comparing ----------------------------------------------------------------------------------


def run(
    module: Any,
    *given: Tensor,
    grad_out: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Output and all gradients, by name: "out", "input0", ... and the parameters' own names."""
    leaves = [g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given]
    params = dict(module.named_parameters())
    with torch.enable_grad():
        out = module(*leaves, **options)
        if grad_out is None:
            generator = torch.Generator().manual_seed(9)
            grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        wanted = {f"input{n}": leaf for n, leaf in enumerate(leaves) if leaf.requires_grad} | params
        grads = torch.autograd.grad(out, list(wanted.values()), grad_out, allow_unused=True)
    filled = (torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted.values(), strict=True))
    return {"out": out.detach(), **dict(zip(wanted, filled, strict=True))}


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The whole, and every batch (and head) slice of activations."""
    yield tensors
    if tensors[0].dim() > 2:
        yield from zip(*(t.flatten(0, -3) for t in tensors), strict=True)


def same(got: Tensor, want: Tensor, what: str = "") -> None:
    """EXACT."""
    assert torch.equal(got, want), f"{what} differs by up to {(got - want).abs().max():.3g}"


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    """T64: max |difference| <= 1e-10 (1 + max |reference|), on the whole and on every slice."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    if want.numel() == 0:
        return
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: NaN or inf at other places than in the reference"
    for g, w in slices(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)):
        off, bound = (g - w).abs().max(), 1e-10 * (1 + w.abs().max())
        assert off <= bound, f"{what} differs by up to {off:.3g}, allowed {bound:.3g}"


def close_all(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], name)


def near(got: Tensor, want: Tensor, naive: Tensor, what: str = "", *, grad: bool = False) -> None:
    """TLP for half precision, T32 for fp32: no worse than a plain computation in that dtype, up to a factor.

    The bounds come from the naive computation's errors over all inputs. They hold for the whole and, for
    outputs, for every slice: a bound from one small slice alone would rest on a handful of roundings.
    """
    assert got.dtype == naive.dtype, f"{what}: dtype {got.dtype}, expected {naive.dtype}"
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: NaN or inf at other places than in float64"
    if want.numel() == 0:
        return
    off, naive_off = (got.double() - want).abs(), (naive.double() - want).abs()
    naive_off = naive_off.nan_to_num(torch.inf)  # where the plain computation fails, anything finite is no worse
    if got.dtype == torch.float32:
        bound = max(1e-6, 10 * float(naive_off.mean()))
        assert off.mean() <= bound, f"{what}: mean error {off.mean():.3g}, allowed {bound:.3g}"
        return
    ref = want.to(got.dtype)
    floor = 2 * float((ref + 0.3 - 0.3 - ref).abs().max())
    most, mean = (3.0, 1.5) if grad else (2.0, 1.1)
    worst = max(float(n.mean()) for (n,) in slices(naive_off)) if not grad else float(naive_off.mean())
    bound = max(floor, most * float(naive_off.max()))
    assert off.max() <= bound, f"{what}: largest error {off.max():.3g}, allowed {bound:.3g}"
    bound = max(floor, mean * float(naive_off.mean()))
    assert off.mean() <= bound, f"{what}: mean error {off.mean():.3g}, allowed {bound:.3g}"
    bound = max(floor, mean * worst)
    for (o,) in () if grad else slices(off):
        assert o.mean() <= bound, f"{what}: mean error of a slice {o.mean():.3g}, allowed {bound:.3g}"


def no_worse_than_naive(
    name: str, dtype: torch.dtype, given: list[tuple[Tensor, ...]], change: Callable[[Any], None] = lambda module: None
) -> None:
    """The layer in this dtype and its gradients, next to the plain computation's distance from float64."""
    module = build(name, dtype=dtype)
    change(module)
    exact = build(name, dtype=dtype)
    change(exact)
    exact = exact.double()
    want = [run(exact, *(x.double() if x.is_floating_point() else x for x in xs)) for xs in given]
    got = [run(module, *xs) for xs in given]
    if hasattr(module, "kernel"):
        module.kernel = "eager"
    with naive_precision():
        naive = [run(module, *xs) for xs in given]
    for key in want[0]:
        g, w, n = (torch.stack([r[key] for r in results]) for results in (got, want, naive))
        near(g, w, n, key, grad=key != "out")


def says(error: Exception, *words: object) -> None:
    """The refusal names what it is about."""
    assert all(str(word) in str(error) for word in words), error


@contextlib.contextmanager
def naive_precision() -> Iterator[None]:
    """Everything in the inputs' own dtype: what a plain half-precision implementation would do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "promote_types", lambda a, b: a)
        yield


@contextlib.contextmanager
def small_tiles(block: int = 4, keys: int = 5) -> Iterator[None]:
    """Chunks and blocks so small that a few tokens straddle many of them."""
    from regard.kernels import block_sparse, chunked, window

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse, "BLOCK", block)
        patch.setattr(chunked, "KEYS", keys)
        patch.setattr(window, "SMALLEST", block)
        patch.setattr(window, "LARGEST", block)
        patch.setattr(chunked, "TILE_BYTES", 0)  # 16 rows a chunk, the least
        yield

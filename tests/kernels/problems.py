"""Attention problems drawn at random: what is asked of a kernel, said by a description that a seed gives.

The description alone rebuilds the problem, tensors included: its `repr` can be pasted back. Masks are trees of tuples
such as ("and", ("causal",), ("per_head", ("window", 2), ("window", 3))), stages are names of `STAGES`.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard import masks
from regard.kernels import block_sparse, chunked, few, grouped, neighborhood, sdpa, window
from regard.kernels.native import blocks as native_blocks
from regard.kernels.problem import Problem
from regard.masks import Mask
from regard.normalizers import AdaptiveEntmax, Cog, Entmax, SinkSoftmax, Softmax, Sparsemax, TopK
from regard.pipeline.function import problem as checked_problem
from regard.positions import Alibi, CoPE, Kerple, KerplePower, Rotary, Shaw, rotary_linear, rotary_ntk, rotary_yarn
from regard.scores.mta import HeadMix, KeyQueryConv, MixSequence
from regard.scores.soft_cap import SoftCap
from regard.stages import Position, Rows, Score, Stage
from regard.training.temperature import HeadTemperature

Tree = tuple[Any, ...]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = (
    *("plain", "transposed", "packed", "sliced", "skipping", "offset", "turned", "heads last", "batch last"),
    *("overlapping", "one token", "one head", "one batch row", "one width", "one number"),
)
"""How a tensor lies in memory: heads after tokens, alone or beside two others; every other token or number; an odd
start; width before tokens, heads or batch after all; rows that share numbers; stride 0 along an axis, or all."""
RELAID = ("plain", "skipping", "offset", "turned", "first last", "one batch row")
"""How a mask's tensor does."""
EQUAL = ("one token", "one number")
"""Layouts by which all tokens are equal."""


@dataclass(frozen=True, repr=False)
class Description:
    """One problem. What is left at its default is not shown."""

    seed: int
    """Of all numbers in tensors."""
    B: int = 1
    H: int = 1
    G: int = 1
    T: int = 1
    S: int = 1
    D: int = 2
    V: int = 2
    dtype: str = "fp64"
    mask: Tree | None = None
    bias: str = ""
    """Of "BHTS", the axes along which a bias tensor varies, perhaps with "-" for entries at -inf; "1" is one number."""
    bias_learns: bool = False
    position: str = ""
    score: str = ""
    score_mix: str = ""
    normalizer: str = ""
    weight_mix: str = ""
    scale: float | None = None
    first_key: int = 0
    layouts: tuple[str, str, str, str] = ("plain",) * 4
    """Of q, k, v and the gradient of the output."""
    bias_layout: str = "plain"
    mask_layout: str = "plain"
    """Of all tensors of the mask, one of `RELAID`."""
    size: float = 1.0
    """What queries are multiplied by."""
    cut: int = 0
    """Tokens in a block of kernels that cut; 0 leaves each kernel its own sizes."""

    def __repr__(self) -> str:
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Description({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @property
    def stages(self) -> dict[str, str]:
        """Slot -> the name of what fills it."""
        return {slot: name for slot in STAGES if (name := getattr(self, slot))}

    @property
    def parts(self) -> set[str]:
        """The names of all parts of the mask."""
        return set() if self.mask is None else set(_parts(self.mask))


def _parts(tree: Tree) -> Iterator[str]:
    yield tree[0]
    for child in tree[1:]:
        if _is_tree(child):
            yield from _parts(child)


def _is_tree(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], str)


# --- stages that no file of regard has ----------------------------------------------------------------------------


class Slanted(Position):
    """-(q_i . u + k_j . w) d / (1 + d), d = |i - j|: a bias that reads queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u, self.w = (nn.Parameter(torch.zeros(width)) for _ in "uw")

    def bias(self, rows: Rows) -> Tensor:
        q, k, u, w = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (rows.q, rows.k, self.u, self.w))
        by_key = (k @ w).repeat_interleave(q.shape[1] // k.shape[1], 1)
        away = (rows.i[:, None] - rows.j).abs().to(q.dtype)
        return (-((q @ u)[..., None] + by_key[:, :, None]) * away / (1 + away)).to(rows.q.dtype)


class Tabled(Position):
    """a[i mod 7] + b[j mod 5]: a bias of absolute places, one for all heads and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(5))

    def bias(self, rows: Rows) -> Tensor:
        return (self.a[rows.i % 7][:, None] + self.b[rows.j % 5])[None, None]


class Echo(Position):
    """c tanh(s): a bias that reads the scores."""

    needs = frozenset({"scores"})

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))

    def bias(self, rows: Rows) -> Tensor:
        return self.c * rows.scores.tanh()


class Added(Position):
    """sum_j weight_ij c_h j: something is added to the outputs, nothing to the scores."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(heads))

    def values(self, weights: Tensor, rows: Rows) -> Tensor:
        return (weights * rows.j).sum(-1, keepdim=True) * self.c[:, None, None].to(weights.dtype)


class Bilinear(Score):
    """scale q W k."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, rows: Rows, scale: float) -> Tensor:
        keys = rows.k.repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1)
        q, k, weight = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (rows.q, keys, self.weight))
        return scale * (q @ weight) @ k.mT


class Gated(Score):
    """sigmoid(g_h) s: it reads the dot products."""

    needs = frozenset({"scores"})

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(heads))

    def forward(self, rows: Rows, scale: float) -> Tensor:
        return rows.scores * self.g.sigmoid()[:, None, None].to(rows.scores.dtype)


STAGES: dict[str, dict[str, Callable[[Description], Stage]]] = {
    "position": {
        "alibi": lambda d: Alibi(d.H),
        "kerple": lambda d: Kerple(d.H),
        "kerple_power": lambda d: KerplePower(d.H),
        "cope": lambda d: CoPE(d.D, max_positions=4),
        "rotary": lambda d: Rotary(d.D),
        "rotary_interleaved": lambda d: Rotary(d.D, interleaved=True, base=50.0),
        "rotary_linear": lambda d: rotary_linear(d.D, factor=2.0),
        "rotary_ntk": lambda d: rotary_ntk(d.D, factor=2.0),
        "rotary_yarn": lambda d: rotary_yarn(d.D, factor=2.0, original_max=8, beta_fast=2.0, beta_slow=0.5),
        "shaw": lambda d: Shaw(d.D, max_distance=3, value_dim=d.V),
        "shaw_per_head": lambda d: Shaw(d.D, d.H, max_distance=3, per_head=True, value_dim=d.V),
        "slanted": lambda d: Slanted(d.D),
        "tabled": lambda d: Tabled(),
        "echo": lambda d: Echo(),
        "added": lambda d: Added(d.H),
    },
    "score": {"bilinear": lambda d: Bilinear(d.D), "gated": lambda d: Gated(d.H)},
    "score_mix": {
        "capped": lambda d: SoftCap(cap=1.5),
        "temperature": lambda d: HeadTemperature(d.H, max_length=5),
        "head_mix": lambda d: HeadMix(d.H),
        "conv": lambda d: KeyQueryConv(d.H, query_size=3, key_size=3),
        "key_conv": lambda d: KeyQueryConv(d.H, query_size=1, key_size=3),
        "conv_then_heads": lambda d: MixSequence([KeyQueryConv(d.H, query_size=2, key_size=3), HeadMix(d.H)]),
    },
    "normalizer": {
        "softmax": lambda d: Softmax(),
        "sinks": lambda d: SinkSoftmax(d.H),
        "entmax15": lambda d: Entmax(alpha=1.5),
        "entmax12": lambda d: Entmax(alpha=1.2),
        "sparsemax": lambda d: Sparsemax(),
        "adaptive_entmax": lambda d: AdaptiveEntmax(d.H),
        "topk": lambda d: TopK(k=3),
        "cog": lambda d: Cog(),
    },
    "weight_mix": {
        "head_mix": lambda d: HeadMix(d.H, group=d.H // d.G),
        "conv": lambda d: KeyQueryConv(d.H, query_size=3, key_size=3, on="weights"),
        "key_conv": lambda d: KeyQueryConv(d.H, query_size=1, key_size=3, on="weights"),
    },
}
"""Slot -> name -> what fills it."""
SELECTING = ("topk", "sparsemax", "cog", "entmax15", "entmax12", "adaptive_entmax")
"""Rounding decides what these drop: no half precision for them."""


# --- masks --------------------------------------------------------------------------------------------------------


def numbers(d: Description, salt: int) -> torch.Generator:
    """The generator of one tensor of the problem."""
    return torch.Generator().manual_seed(1000 * d.seed + salt)


def total(d: Description) -> int:
    """Keys from position 0 on, those that a cache has dropped included: what the masks' tensors are made for."""
    return d.first_key + d.S


def table(d: Description, tree: Tree) -> Tensor:
    """The tensor behind a mask of that tree: who may be seen, how many may, or whose they are."""
    # What is packed is one row of places that rise.
    return relaid(_table(d, tree), "plain" if tree[0] == "packed" and "one" in d.mask_layout else d.mask_layout)


def relaid(x: Tensor, layout: str) -> Tensor:
    """The same numbers in that layout, but for those that an axis of stride 0 makes equal."""
    match layout:
        case "skipping":
            return x.repeat_interleave(2, -1)[..., ::2]
        case "offset":
            return torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape)
        case "turned" if x.ndim > 1:
            return x.mT.contiguous().mT
        case "first last":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        case "one batch row" if len(x):
            return x[:1].expand_as(x)
    return x


def _table(d: Description, tree: Tree) -> Tensor:
    kind, salt, S = tree[0], tree[-1], total(d)
    generator = numbers(d, salt)
    if kind == "dense":
        shape = (d.B if tree[1] else 1, d.H if tree[2] else 1, d.T, S)
        return torch.rand(shape, generator=generator) < 0.6
    if kind == "chosen":
        shape = (d.B if tree[1] else 1, d.H if tree[2] else 1, -(-d.T // tree[3]), -(-S // tree[4]))
        return torch.rand(shape, generator=generator) < 0.5
    if kind == "padding":
        return torch.rand(d.B, S, generator=generator) < 0.7
    if kind in ("lengths", "prefix_lengths"):
        return torch.randint(0, S + 2, (d.B,), generator=generator)
    if kind == "packed":
        cuts = torch.randint(0, S + 1, (2,), generator=generator).sort().values
        return torch.cat((torch.zeros(1, dtype=torch.long), cuts, torch.tensor([S])))
    assert kind == "documents", kind
    return torch.randint(0, 3, (d.B if tree[1] else 1, S), generator=generator)


def mask_of(d: Description, tree: Tree) -> Mask:
    """The tree as a mask."""
    kind, given = tree[0], tree[1:]
    match kind:
        case "and" | "or":
            first, *rest = (mask_of(d, part) for part in given)
            for part in rest:
                first = first & part if kind == "and" else first | part
            return first
        case "not":
            return ~mask_of(d, given[0])
        case "per_head":
            return masks.per_head([mask_of(d, given[h % len(given)]) for h in range(d.H)])
        case "window":
            return masks.window(given[0], ahead=given[1] if len(given) > 1 else None)
        case "dense":
            return masks.dense(table(d, tree))
        case "chosen":
            return masks.chosen(table(d, tree), d.T, total(d), given[2:4])
        case "padding":
            return masks.padding(table(d, tree))
        case "lengths":
            return masks.padding(lengths=table(d, tree))
        case "prefix_lengths":
            return masks.prefix(table(d, tree))
        case "packed":
            return masks.packed(table(d, tree))
        case "documents":
            return masks.documents(table(d, tree))
        case "predicate":
            n, by_row, by_head = given
            sizes = {"batch": d.B if by_row else None, "heads": d.H if by_head else None}

            def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                place = i + 2 * j + (b if by_row else 0)
                return place % n != (h % n if by_head else 0)

            return masks.predicate(rule, **sizes)
        case "neighborhood":
            sizes, wide, dilation, stride, causal = given
            return masks.neighborhood(sizes, wide, dilation=dilation, stride=stride, causal=causal)
    return getattr(masks, kind)(*given)


NUMBERED = ("full", "nothing", "causal", "window", "dilated", "strided", "blocks", "global_tokens", "prefix")
TENSORS = ("dense", "chosen", "padding", "lengths", "prefix_lengths", "packed", "documents")
JOINED = ("and", "or", "not", "per_head")
ALONE = ("predicate", "neighborhood")


def draw_part(r: random.Random, d: Description, kinds: tuple[str, ...], heads: bool) -> Tree:
    """A mask without parts of its own."""
    kind, least = r.choice(kinds), max(2, total(d))
    salt = r.randrange(10, 1000)
    match kind:
        case "full" | "nothing" | "causal":
            # A mask of nothing is rarely worth its time.
            return (kind,) if kind != "nothing" or r.random() < 0.2 else ("causal",)
        case "window":
            return (kind, r.randint(1, 6), *([r.randint(1, 4)] if r.random() < 0.4 else []))
        case "dilated":
            return kind, r.randint(1, 4), r.randint(1, 3)
        case "strided" | "blocks":
            return kind, r.randint(1, 6)
        case "global_tokens" | "prefix":
            return kind, r.randint(1, max(1, least // 2))
        case "dense":
            return kind, r.random() < 0.5, heads and r.random() < 0.5, salt
        case "chosen":
            block = r.choice(((4, 4), (2, 3), (3, 2), (1, 4), (4, 8), (16, 16)))
            return kind, r.random() < 0.5, heads and r.random() < 0.5, *block, salt
        case "documents":
            return kind, r.random() < 0.5, salt
        case "predicate":
            return kind, r.randint(2, 4), d.B > 0 and r.random() < 0.5, heads and r.random() < 0.5
    return kind, salt


def draw_mask(r: random.Random, d: Description, *, numbered: bool = False, heads: bool = True, depth: int = 2) -> Tree:
    """A mask of parts; `numbered`: of numbers only."""
    kinds = NUMBERED if numbered else NUMBERED + 2 * TENSORS + (("predicate",) if d.T and d.S else ())
    if depth == 0 or r.random() < 0.25:
        return draw_part(r, d, kinds, heads)

    def part(heads: bool = heads) -> Tree:
        return draw_mask(r, d, numbered=numbered, heads=heads, depth=depth - 1)

    match r.choice(("and", "and", "or", "not", "per_head", "causal")):
        case "and":
            return "and", part(), part()
        case "or":
            return "or", part(), part()
        case "not":
            return "not", part()
        case "per_head" if heads:
            return "per_head", *(part(False) for _ in range(r.randint(1, d.H)))
    return "and", ("causal",), part()


# --- drawing ------------------------------------------------------------------------------------------------------


def dealt(name: str, options: list[Any], n: int) -> Any:
    """The n-th card from a deck that is shuffled anew whenever it is empty: all options occur, and equally often."""
    return random.Random(f"{name} {n // len(options)}").sample(options, len(options))[n % len(options)]


def draw(seed: int) -> Description:
    """The problem of that number."""
    r = random.Random(seed)
    G = r.choice((1, 1, 2, 3))
    H = G * r.choice((1, 2, 2, 3))
    D = r.choice((4, 6, 8, 12))
    lengths = [r.choice((1, 2, 3, 5, 8, 13, 17, 21, 33)) for _ in "TS"]
    d = Description(seed, r.choice((1, 2, 3)), H, G, *lengths, D, r.choice((1, 3, D, D, 10)))
    if r.random() < 0.4:
        d = replace(d, S=d.T)
    d = replace(d, dtype=dealt("dtype", ["fp64"] * 4 + ["fp32"] * 2 + ["bf16", "fp16"], seed))
    if r.random() < 0.3:
        d = replace(d, scale=r.choice((0.1, 0.5, 1.0)))
    if r.random() < 0.4:
        d = replace(d, layouts=tuple(r.choice(LAYOUTS) for _ in range(4)))  # type: ignore[arg-type]
    if r.random() < 0.2:
        d = replace(d, size=4.0)
    if d.dtype in ("bf16", "fp16"):
        # Where all tokens are equal, gradients are 0, and a plain computation finds that without any rounding.
        d = replace(d, layouts=tuple("plain" if layout in EQUAL else layout for layout in d.layouts))
    d = replace(d, cut=r.choice((0, 0, 4, 4, 5, 8)))
    kinds = (_any, _any, _any, _any, _masked, _masked, _masked, _biased, _laid, _banded, _special, _empty)
    d = dealt("kind", list(kinds), seed)(r, d)
    if d.dtype in ("fp32", "bf16") and d.T <= few.MOST and r.random() < 0.7:
        d = replace(d, D=32, V=32)  # whole vectors on every machine, for who reads nothing else
    if d.bias and d.bias_layout == "plain":
        d = replace(d, bias_layout=r.choice(LAYOUTS))
    return replace(d, mask_layout=dealt("mask lies", list(RELAID), seed)) if d.parts & {*TENSORS} else d


def _masked(r: random.Random, d: Description) -> Description:
    """Plain softmax under any mask, perhaps with keys dropped by a cache."""
    if r.random() < 0.15:
        d = replace(d, first_key=r.randint(1, 4))
    return replace(d, mask=draw_mask(r, d, numbered=r.random() < 0.35))


def _biased(r: random.Random, d: Description) -> Description:
    """Additive terms."""
    d = replace(d, bias=_bias(r), bias_learns=r.random() < 0.6)
    if r.random() < 0.5:
        d = replace(d, position=r.choice(("alibi", "kerple", "kerple_power", "tabled", "slanted")))
    return replace(d, mask=draw_mask(r, d)) if r.random() < 0.6 else d


def _laid(r: random.Random, d: Description) -> Description:
    """A bias by queries and keys in memory of every order, where kernels read it that take no float64."""
    d = replace(d, dtype=r.choice(("fp32", "fp32", "bf16")), bias=r.choice(("BHTS", "HTS", "TS", "BHTS-")))
    d = replace(d, T=max(d.T, 2), S=max(d.S, 2), bias_layout=dealt("bias lies", list(LAYOUTS), d.seed // 12))
    d = replace(d, layouts=tuple("plain" if layout in EQUAL else layout for layout in d.layouts))
    return replace(d, mask=draw_mask(r, d)) if r.random() < 0.5 else d


def _bias(r: random.Random) -> str:
    axes = "".join(axis for axis in "BHTS" if r.random() < 0.6) or "1"
    return axes + "-" if set("TS") <= set(axes) and r.random() < 0.3 else axes


def _any(r: random.Random, d: Description) -> Description:
    """Any stages, mask and bias."""
    d = replace(d, T=min(d.T, 21), S=min(d.S, 21))
    for slot, names in STAGES.items():
        empty = [""] * (len(names) * (1 if slot == "position" else 3) // 2)
        d = replace(d, **{slot: dealt(slot, [*names, *empty], d.seed // 3)})
    if d.normalizer in SELECTING and d.dtype in ("bf16", "fp16"):
        d = replace(d, dtype="fp32")
    if r.random() < 0.3:
        d = replace(d, bias=_bias(r), bias_learns=r.random() < 0.5)
    return replace(d, mask=draw_mask(r, d)) if r.random() < 0.75 else d


def _banded(r: random.Random, d: Description) -> Description:
    """Masks with bounds on both sides."""
    band = r.choice((("window", r.randint(1, 7)), ("blocks", r.randint(2, 7)), ("dilated", 3, 2)))
    more = draw_part(r, d, ("causal", "padding", "lengths", "strided", "dense"), False)
    return replace(d, mask=r.choice((band, ("and", band, more), ("and", ("causal",), band))))


def _special(r: random.Random, d: Description) -> Description:
    """What single kernels are for: one query, a neighborhood, blocks chosen by single queries."""
    match dealt("special", ["one query", "neighborhood", "neighborhood", "grouped"], d.seed // 12):
        case "one query":
            d = replace(d, T=1, S=r.choice((1, 7, 21, 40)), dtype=r.choice(("fp64", "fp32")))
            d = replace(d, first_key=r.choice((0, 0, 3)))
            return replace(d, mask=r.choice((None, ("causal",), draw_mask(r, d))))
        case "neighborhood":
            sizes = r.choice(((9,), (16,), (4, 5), (6, 3), (3, 4, 2)))
            wide = tuple(r.randint(1, n) for n in sizes)
            dilation = tuple(r.randint(1, n // w) for n, w in zip(sizes, wide, strict=True))
            stride = tuple(r.randint(1, w) for w in wide)
            causal = tuple(r.random() < 0.3 for _ in sizes)
            N = torch.Size(sizes).numel()
            tree = ("neighborhood", sizes, wide, dilation, stride, causal)
            d = replace(d, T=N, S=N, mask=tree)
            return d if r.random() < 0.7 else replace(d, mask=("and", tree, draw_part(r, d, NUMBERED, False)))
    d = replace(d, T=70, S=70, B=1, dtype=r.choice(("fp32", "fp32", "bf16")))
    tree = ("chosen", False, r.random() < 0.5, 1, 32, 7)
    return replace(d, mask=r.choice((tree, ("and", tree, ("causal",)))))


def _empty(r: random.Random, d: Description) -> Description:
    """Nothing along some axis."""
    d = replace(d, **r.choice(({"B": 0}, {"T": 0}, {"S": 0}, {"T": 0, "S": 0})))
    if r.random() < 0.5:
        d = replace(d, mask=draw_part(r, d, NUMBERED + TENSORS, True))
    if r.random() < 0.4:
        d = replace(d, bias=_bias(r), bias_learns=True)
    if r.random() < 0.3:
        d = replace(d, normalizer=r.choice(list(STAGES["normalizer"])))
    return d


# --- building -----------------------------------------------------------------------------------------------------


@dataclass
class Built:
    """The tensors and stages of a problem."""

    given: Description
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    bias: Tensor | None
    stages: dict[str, Stage]
    mask: Mask | None
    wanted: dict[str, Tensor] = field(default_factory=dict)
    """Name -> what gradients are wanted of."""

    def problem(self) -> Problem:
        """What kernels are given, by way of `regard.attention`'s own checks."""
        d = self.given
        p = checked_problem(self.q, self.k, self.v, mask=self.mask, bias=self.bias, scale=d.scale, **self.stages)
        return replace(p, first_key=d.first_key)


def build(d: Description) -> Built:
    """The problem of that description."""
    dtype = DTYPES[d.dtype]
    shapes = ((d.B, d.H, d.T, d.D), (d.B, d.G, d.S, d.D), (d.B, d.G, d.S, d.V), (d.B, d.H, d.T, d.V))
    made = [
        laid_out(shape, layout, numbers(d, n), dtype, d.size if n == 0 else 1.0)
        for n, (shape, layout) in enumerate(zip(shapes, d.layouts, strict=True))
    ]
    q, k, v, grad = made
    bias = None
    if d.bias:
        shape = tuple(size if axis in d.bias else 1 for axis, size in zip("BHTS", (d.B, d.H, d.T, d.S), strict=True))
        bias = laid_out(shape, d.bias_layout, numbers(d, 5), dtype, 1.0, holes="-" in d.bias)
    stages = {slot: STAGES[slot][name](d).to(dtype) for slot, name in d.stages.items()}
    wanted = {"q": q, "k": k, "v": v}
    for at, (slot, stage) in enumerate(stages.items()):
        generator = numbers(d, 6 + at)
        for name, parameter in stage.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                # Temperatures divide, KERPLE's kernels must stay on their side of the bounds.
                parameter.copy_(drawn.abs() + 0.5 if name in ("temperature", "r1", "r2") else 0.5 * drawn)
            wanted[f"{slot} {name}"] = parameter
    if bias is not None and d.bias_learns:
        wanted["bias"] = bias
    for tensor in wanted.values():
        tensor.requires_grad_()
    mask = None if d.mask is None else mask_of(d, d.mask)
    return Built(d, q, k, v, grad, bias, stages, mask, wanted)


def laid_out(
    shape: tuple[int, ...],
    layout: str,
    generator: torch.Generator,
    dtype: torch.dtype,
    size: float,
    *,
    holes: bool = False,
) -> Tensor:
    """Random numbers of that shape in that layout, some of them -inf if there are to be holes."""
    B, H, T, D = shape

    def normal(*shape: int) -> Tensor:
        drawn = (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        return drawn.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf) if holes else drawn

    match layout:
        case "transposed":
            return normal(B, T, H, D).transpose(1, 2)
        case "packed":
            return normal(B, T, 3, H, D)[:, :, 1].transpose(1, 2)
        case "sliced":
            return normal(B, H, 2 * T, D + 3)[:, :, ::2, 1 : 1 + D]
        case "skipping":
            return normal(B, H, T, 2 * D)[..., ::2]
        case "offset":
            return normal(B * H * T * D + 3)[3:].view(shape)
        case "turned":
            return normal(B, H, D, T).mT
        case "heads last":
            return normal(B, T, D, H).permute(0, 3, 1, 2)
        case "batch last":
            return normal(H, T, D, B).permute(3, 0, 1, 2)
        case "overlapping" if T and D:
            return normal(B, H, T + D - 1).unfold(2, D, 1)
        case "one token":
            return normal(B, H, 1, D).expand(shape)
        case "one head":
            return normal(B, 1, T, D).expand(shape)
        case "one batch row":
            return normal(1, H, T, D).expand(shape)
        case "one width":
            return normal(B, H, T, 1).expand(shape)
        case "one number":
            return normal(1, 1, 1, 1).expand(shape)
    return normal(*shape)


@contextlib.contextmanager
def cut(block: int) -> Iterator[None]:
    """Kernels that cut the work into pieces take small ones, so that few tokens straddle many."""
    with pytest.MonkeyPatch.context() as patch:
        if block:
            patch.setattr(block_sparse, "BLOCK", block)
            patch.setattr(block_sparse, "SMALLEST", 2)
            patch.setattr(chunked, "KEYS", block + 1)
            patch.setattr(chunked, "TILE_BYTES", 0)  # 16 rows a chunk, the least
            patch.setattr(sdpa, "BIAS_BYTES", 0)
            patch.setattr(window, "SMALLEST", block)
            patch.setattr(window, "LARGEST", block)
            patch.setattr(neighborhood, "TILE", dict.fromkeys((1, 2, 3), block))
            patch.setattr(neighborhood, "ENTRIES", 64)
            patch.setattr(grouped, "GROUP", block)
            patch.setattr(native_blocks, "BLOCK", native_blocks.PANEL)
        yield

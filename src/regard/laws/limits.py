"""L59, L61: what holds beyond small sizes: a million keys, and the memory of long passes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.cost import costs
from regard.laws.agreement import does_not_apply, hold
from regard.laws.form import Form
from regard.laws.registry import MIXERS, law
from regard.laws.slopes import causalities
from regard.laws.subject import Subject
from regard.pipeline.function import plan

# --- L59 ----------------------------------------------------------------------------------------------------

MANY = 10**6
"""Keys: sums of as many float32 numbers, one after another, are off by 1e-3."""
SOME = 10**5
"""Keys, for what takes more memory or time for each."""
OFF = 1e-5


@torch.no_grad()
def rows(s: Subject, keys: int) -> None:
    """Weights of rows of so many scores, in float32: their sum, the sum of their sizes, and their mean place."""
    normalizer = formed(s).parts["normalizer"]
    generator = torch.Generator().manual_seed(3)
    place = torch.linspace(0, 1, keys, dtype=torch.float64)
    for name, scores in (("equal", torch.zeros(keys)), ("random", torch.randn(keys, generator=generator))):
        scores = scores.expand(1, s.heads if getattr(normalizer, "num_heads", 0) else 1, 1, keys)
        got, want = normalizer.float()(scores).double(), normalizer.double()(scores.double())
        for what, by in (("sum of weights", torch.ones_like(place)), ("mean place", place)):
            off = float(((got - want) * by).sum(-1).abs().max())
            hold(off <= OFF, f"{keys} {name} scores: the {what} is off by {off:.2g}")
        off = float((got.abs().sum(-1) - want.abs().sum(-1)).abs().max())
        hold(off <= OFF, f"{keys} {name} scores: the sum of the weights' sizes is off by {off:.2g}")
        if "normalised" in s.traits:
            off = float((got.sum(-1) - 1).abs().max())
            hold(off <= OFF, f"{keys} {name} scores: the weights sum to 1 up to {off:.2g}")


def no_normaliser(s: Subject) -> str:
    form = s.form() if s.is_part else None
    return "" if form is not None and "normalizer" in form.parts else "it is no normaliser"


@law("L59", where=no_normaliser, weight="heavy")
def long_rows_sum(s: Subject) -> None:
    """Weights of 100,000 scores, in float32, have the sums and means that they have in float64."""
    rows(s, SOME)


@law("L59", where=no_normaliser, weight="long")
def very_long_rows_sum(s: Subject) -> None:
    """Weights of 1,000,000 scores, in float32, have the sums and means that they have in float64."""
    rows(s, MANY)


@law("L59", function=True, weight="long")
@torch.no_grad()
def one_query_of_a_million_keys(s: Subject) -> None:
    """In every kernel, a query that likes all keys the same gives in float32 the mean of values that it gives in
    float64, and weights that sum to 1 whatever it likes.
    """
    f, generator = formed(s), torch.Generator().manual_seed(3)
    not_beyond(f, MANY)
    (H, G, D) = f.shape.num_heads, f.shape.num_kv_heads, f.shape.head_dim
    q, k = torch.randn(1, H, 1, D, generator=generator), torch.randn(1, G, MANY, D, generator=generator)
    ones = torch.ones_like(k)
    v = torch.linspace(0, 1, MANY)[:, None] * ones
    want = f(0 * q.double(), k.double(), v.double(), kernel="eager" if s.is_part else None)
    for part in f.parts.values():
        if isinstance(part, nn.Module):
            part.float()
    for kernel in able(f, q, k, v) if s.is_part else (None,):
        off = float((f(0 * q, k, v, kernel=kernel).double() - want).abs().max())
        hold(off <= OFF, f"kernel {kernel}: equal scores of {MANY} keys give values that are off by {off:.2g}")
        if "normalised" in s.traits and "values" not in changes(f):
            off = float((f(q, k, ones, kernel=kernel).double() - 1).abs().max())
            hold(off <= OFF, f"kernel {kernel}: weights of {MANY} keys sum to 1 up to {off:.2g}")


def not_beyond(f: Form, length: int) -> None:
    """Parts with a table of places end with it."""
    for part in f.parts.values():
        if getattr(part, "max_length", length) < length:
            does_not_apply(f"it takes at most {part.max_length} tokens")


def changes(f: Form) -> list[str]:
    """What the position has a part in."""
    position = f.parts.get("position")
    return [what for what in ("bias", "values") if position is not None and position.changes(what)]


def able(f: Form, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """The kernels that can run this here, without those that an interpreter of GPU code would take minutes for."""
    whole = plan(q, k, v, **f.arguments())
    slow = {name for name in whole.costs if q.is_cpu and name.startswith("triton")}
    return [whole.kernel, *(name for name in whole.costs if name not in {whole.kernel, *slow})]


@law("L59", protocols=MIXERS, weight="long")
@torch.no_grad()
def long_inputs_in_float32(s: Subject) -> None:
    """A mixer of linear cost gives in float32 what it gives in float64 for 1,000,000 tokens, and so does one query of
    anything else for 100,000.
    """
    for causal in causalities(s):
        exact, given = long_inputs(s, causal)
        module = copy.deepcopy(exact).float()
        try:
            got = module(*(g.float() if g.is_floating_point() else g for g in given)).double()
        except ValueError as error:
            does_not_apply(f"it has no room for so many: {error}")
        want = exact(*given)
        off, size = float((got - want).abs().max()), float(want.abs().max())
        said = f"causal={causal}, {tuple(given[-1].shape)}: off by {off:.2g}, where {size:.2g} is the largest"
        hold(off <= OFF * (1 + size), said)


def long_inputs(s: Subject, causal: bool | None) -> tuple[Any, tuple[Tensor, ...]]:
    """A module in float64, as narrow as it can be, and tokens much alike, of which each counts; float32 holds them."""
    if s.given is not None:
        does_not_apply("its inputs have their own sizes")
    try:
        s = replace(s, dim=8, heads=2)
        module = s.build(causal=causal, noise=0.02)
    except ValueError:  # its small instance goes with the subject's own sizes
        s = replace(s, dim=Subject.dim, heads=Subject.heads)
        module = s.build(causal=causal, noise=0.02)

    def alike(n: int, seed: int = 2) -> Tensor:
        return (0.1 * s.tokens(1, n, seed=seed) + 1).float().double()

    if s.protocol == "FeatureMixer":
        if not linear(s):
            does_not_apply("its cost grows with the square of pixels")
        side = math.isqrt(SOME)
        return module, (alike(side * side).mT.reshape(1, s.dim, side, side),)
    if s.protocol == "GraphMixer":  # everybody tells one
        edges = torch.stack([torch.arange(SOME), torch.zeros(SOME, dtype=torch.long)])
        return module, (alike(SOME)[0], edges)
    if s.protocol in ("CrossMixer", "Pointer"):
        return module, (alike(1), alike(SOME, 5))
    if s.protocol == "Pooler" or (linear(s) and not s.is_part):
        return module, (alike(MANY),)
    if "cross" not in s.supports or causal not in s.crossings:
        does_not_apply("it has no query alone")
    return module, (alike(1), alike(SOME, 5))


def linear(s: Subject) -> bool:
    """Whether its card says that time grows in proportion to tokens, up to a logarithm."""
    if s.card is None:
        return False
    own = {k: v for k, v in s.example.items() if k in s.card.options}
    one, ten = (costs(s.card, own, batch=1, heads=s.heads, length=n, width=s.width)["time"] for n in (SOME, MANY))
    return isinstance(one, float) and isinstance(ten, float) and ten <= 13 * one


# --- L61 ----------------------------------------------------------------------------------------------------

LONG = 2**14
SHARE = 16


def no_chunks(s: Subject) -> str:
    form = s.form() if s.is_part else None
    return "" if form is not None else "no plan says that it computes in chunks"


@law("L61", where=no_chunks, needs="causal", weight="long")
@torch.no_grad()
def chunks_take_little_memory(s: Subject) -> None:
    """Chunks take at 16,384 tokens at most 1/16 of the memory that the whole score matrix takes.

    The matrix is measured at a quarter of the length, where it takes 1/16.
    """
    f, sizes = formed(replace(s, dim=s.width, heads=1)), {}
    not_beyond(f, LONG)
    for part in f.parts.values():
        if isinstance(part, nn.Module):
            part.float()
    for length, kernel in ((LONG // math.isqrt(SHARE), "eager"), (LONG, "chunked")):
        q, k, v = (t.detach().float() for t in f.qkv(1, length))
        sizes[kernel] = extra_memory(partial(f, q, k, v, causal=True, kernel=kernel))
    chunks, whole = sizes["chunked"], sizes["eager"]
    said = (
        f"chunks of {LONG} tokens take {chunks / 2**20:.0f} MB, 1/{SHARE} of the whole matrix is {whole / 2**20:.0f} MB"
    )
    hold(chunks <= whole, said)


def extra_memory(call: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had handed out at once during the call, beyond what it had before."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def formed(s: Subject) -> Form:
    """Its function form, where a law is about those that have one."""
    form = s.form()
    if form is None:
        does_not_apply("it is no function of queries, keys and values")
    return form

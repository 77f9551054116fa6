"""The pipeline as a function of queries, keys and values.

With every slot empty this is scaled dot-product attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, eq. 1
and section 3.2.2):  softmax(q k^T / sqrt(D)) v.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any, ParamSpec, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import choice, refuse
from regard.kernels import Plan, Problem, choose, execute, few
from regard.kernels.check import check_bias, check_inputs, check_mask, check_options
from regard.kernels.problem import CAUSAL
from regard.masks import Mask, full
from regard.masks.checks import cumulative
from regard.masks.varlen import Varlen
from regard.pairwise import as_mask, as_parts
from regard.slots import InnerSlots
from regard.stages import Made, Normalizer, Selector, Stage

P = ParamSpec("P")


def spelled_out(function: Callable[..., Any], slots: type) -> None:
    """Show `**slots` in the function's signature as what they are: keywords with default None."""
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in slots.__annotations__]
    function.__signature__ = signature.replace(parameters=[*given, *more])  # type: ignore[attr-defined]


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
    layout: str = "bhnd",
    cu_seqlens: Int[Tensor, " P"] | tuple[Int[Tensor, " P"], Int[Tensor, " P"]] | None = None,
    **slots: Unpack[InnerSlots],
) -> Float[Tensor, "B H T V"]:
    """Exact attention with any of the pipeline's stages.

    Query head h reads key head h // (H // G). The last query stands where the last key stands, so with T < S a causal
    mask is aligned bottom-right. A query that may attend to nothing gives 0 (and zero gradients).

    Args:
        mask: True = may attend. A `regard.masks.Mask` keeps its structure, so sparse kernels can use it. A function
            of (b, h, q_idx, kv_idx), as FlexAttention's mask_mod, is `masks.predicate` of it.
        bias: added to the scaled scores; -inf masks.
        scale: multiplies q . k before any bias; default 1 / sqrt(D).
        dropout: probability with which weights are dropped; applied whenever > 0, as torch does.
        kernel: "auto" lets `plan` choose; a name runs that kernel or raises.
        layout: "bhnd" as above, or "bnhd" for q (B, T, H, D), k, v and the result likewise, as flash-attn has them.
            Masks and biases are the same for both. "thd" is for sequences of any lengths end to end without padding,
            q (all T, H, D), k and v likewise, as flash-attn's varlen functions have them.
        cu_seqlens: for "thd", the cumulative lengths (0, len_0, len_0 + len_1, ...), or a pair of them for queries and
            keys. Every sequence is attended to as if by itself, with `mask`, a `Mask`, seen from there: causal is
            bottom-right in each.
        position: rotates q and k, and adds to scores and values, as its hooks say. (`embed` is for tokens, not here.)
        score: takes the place of the dot product.
        score_mix, normalizer, weight_mix: stages before, at and after the softmax. A function of (score, b, h, q_idx,
            kv_idx), as FlexAttention's score_mod, is a score_mix. Positions count from the first key.
        memory: keys and values that every query sees besides these, `regard.heads.Memories(keys, values)`.
        selector: looks at q and k (after rotation) and says which pairs to keep of those the mask allows.

    Raises:
        ValueError, TypeError: inputs that don't fit together, before any work is done.
    """
    plain = kernel == "auto" and layout == "bhnd" and cu_seqlens is None and bias is None and not (dropout or slots)
    if plain and (mask is None or mask is CAUSAL) and (scale is None or (type(scale) is float and abs(scale) < inf)):
        out = few.quick(q, k, v, causal=mask is not None, scale=scale)
        if out is not None:
            return out
    if layout != "bhnd" or cu_seqlens is not None:
        q, k, v = heads_first(layout, q, k, v)
        mask = each_alone(layout, q, k, mask, cu_seqlens, **slots)
    out = execute(problem(q, k, v, mask=mask, bias=bias, scale=scale, dropout=dropout, **slots), kernel)
    if layout == "bhnd":
        return out
    return out.transpose(1, 2) if layout == "bnhd" else out[0].transpose(0, 1)


def heads_first(layout: str, *given: Tensor) -> list[Tensor]:
    """Tensors of that layout as (B, heads, tokens, D): views. What has other axes is left to be refused as it came."""
    choice("attention", ("bhnd", "bnhd", "thd"), layout=layout)
    if layout == "thd":
        for name, t in zip("qkv", given, strict=True):
            if not isinstance(t, Tensor) or t.dim() != 3:
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                refuse("attention", name, "does not have layout 'thd'", got, "(all tokens, heads, width)")
        return [t.transpose(0, 1)[None] for t in given]
    turned = layout == "bnhd"
    return [t.transpose(1, 2) if turned and isinstance(t, Tensor) and t.dim() == 4 else t for t in given]


def each_alone(
    layout: str,
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    mask: Any,
    cu_seqlens: Any,
    **slots: Any,
) -> Mask | Tensor | None:
    """The mask, for "thd" that of sequences end to end, each of which sees only itself."""
    if (layout == "thd") != (cu_seqlens is not None):
        got = f"layout {layout!r} and cu_seqlens={'None' if cu_seqlens is None else '...'}"
        refuse("attention", "cu_seqlens", "goes with layout 'thd', and only with it", got, "both or neither")
    if layout != "thd":
        return mask
    pair = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    cu_q, cu_k = (cumulative("attention: cu_seqlens", each) for each in pair)
    for each, name, n in ((cu_q, "queries", q.shape[2]), (cu_k, "keys", k.shape[2])):
        if each[-1] > n:
            refuse("attention", "cu_seqlens", f"ends behind the last of the {name}", each[-1], f"at most {n}")
    if len(cu_q) != len(cu_k):
        got = f"{len(cu_q) - 1} and {len(cu_k) - 1}"
        refuse("attention", "cu_seqlens", "is of other numbers of sequences for queries and keys", got, "one number")
    if mask is not None and (not isinstance(mask, Mask) or mask.batch > 1):
        wanted = "a regard.masks.Mask for all, which is asked as if each sequence were by itself"
        refuse("attention", "mask", "does not go with layout 'thd'", type(mask).__name__, wanted)
    for name, part in slots.items():
        crosses = name == "selector" or (isinstance(part, Stage) and part.halo)
        if part is not None and (crosses or (name == "position" and cu_q != cu_k)):
            wanted = "sequences in a batch: it would count or mix tokens across their borders"
            refuse("attention", name, "does not go with layout 'thd'", type(part).__name__, wanted)
    return Varlen.of(cu_q, cu_k, q.shape[2], k.shape[2], full() if mask is None else mask, pair[0].device)


def _planned(function: Callable[P, Tensor]) -> Callable[P, Plan]:
    @functools.wraps(function, assigned=())
    def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
        """Which kernel `attention` would run for these arguments, and why not the others. Runs nothing.

        Tensors on the meta device will do: only shapes, dtypes and the mask count.
        """
        rest: dict[str, Any] = dict(kwargs)
        kernel, layout = rest.pop("kernel", "auto"), rest.pop("layout", "bhnd")
        ends = rest.pop("cu_seqlens", None)
        named = {name: rest.pop(name) for name in ("q", "k", "v") if name in rest}
        given = heads_first(layout, *args, *named.values())  # type: ignore[arg-type]
        slots = {name: rest[name] for name in InnerSlots.__annotations__ if name in rest}
        rest["mask"] = each_alone(layout, given[0], given[1], rest.get("mask"), ends, **slots)
        return choose(problem(*given, **rest), kernel)

    return plan


spelled_out(attention, InnerSlots)
plan = _planned(attention)
"""plan(q, k, v, ...), with the arguments of `attention`: which kernel would run for them, and why not the others. Runs
nothing; tensors on the meta device will do, as only shapes, dtypes and the mask count."""
plan.__signature__ = inspect.signature(attention).replace(return_annotation=Plan)  # type: ignore[attr-defined]


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    selector: Selector | None = None,
    **stages: Any,
) -> Problem:
    """The arguments of `attention`, checked, as what kernels work on."""
    check_inputs(q, k, v)
    B, H, T, D = q.shape
    if mask is not None:
        mask = as_mask(mask, B, H)
    stages = as_parts(stages) if stages else stages
    filled: dict[str, Any] = {}
    if stages or dropout or scale is not None or selector is not None:  # else there is nothing to look at
        check_options(scale, dropout, selector=selector, **stages)
        filled = {name: stage for name, stage in stages.items() if stage is not None}
    for name, stage in filled.items():
        if "tokens" in stage.needs or stage.prepares():
            raise ValueError(
                f"attention: {name} {type(stage).__name__} reads the tokens behind q and k; use it in regard.Attention"
            )
    if selector is not None and selector.prepares():
        who = type(selector).__name__
        raise ValueError(f"attention: selector {who} reads the tokens behind q and k; use it in regard.Attention")
    if "normalizer" in filled:
        filled["normalizer"] = unless_softmax(filled["normalizer"])
    p = Problem(
        q=q,
        k=k,
        v=v,
        scale=int(D) ** -0.5 if scale is None else scale,  # while torch.jit traces, sizes are float32 tensors
        mask=check_mask(mask, B, H, T, k.shape[2], q.device),
        bias=bias,
        dropout=dropout,
        **filled,
    )
    if bias is not None:
        p = check_bias(p)
    if p.position is not None and p.position.changes("rotate"):
        unturned = None if p.memory is None else q
        q, k = p.position.turn(q, k, p.i, p.j)
        p = replace(p, q=q, k=k, unturned=unturned)
    return p if selector is None else replace(p, mask=selected(selector, p.q, p.k, p.mask))


def selected(selector: Selector, q: Tensor, k: Tensor, mask: Mask | None, made: Made | None = None) -> Mask | None:
    """The pairs that the selector keeps, of those the mask allows. Without data (meta tensors), all of these.

    Args:
        made: what it made of the tokens, if it does.
    """
    if q.is_meta:
        return mask
    with torch.no_grad():
        told = (made,) if selector.prepares() else ()
        kept = selector(q.detach(), k.detach(), mask, *told)
    if not isinstance(kept, Mask):
        raise TypeError(f"attention: selector {type(selector).__name__} must return a Mask, got {type(kept).__name__}")
    return kept if mask is None else mask & kept


def unless_softmax(normalizer: Normalizer | None) -> Normalizer | None:
    """None for softmax, so that every kernel knows it."""
    return None if normalizer is None or normalizer.is_softmax else normalizer

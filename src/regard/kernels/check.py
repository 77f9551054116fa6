"""What a call to attention refuses, before any work is done. Each message says what is wrong, what was got and what
is expected."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from regard.checks import foreign, meant, number, refuse, usual
from regard.kernels.problem import Problem
from regard.masks import Mask, dense
from regard.slots import IN_KERNELS, SLOTS
from regard.stages import Mix, Normalizer
from regard.tracing import readable

WHO = "attention"
_OF_THE_LAYER = ("heads", "gate")
"""Slots that only `regard.Attention` has: they stand outside what is done with queries, keys and values."""
_ELSEWHERE = {
    "causal": "causality is a mask here: mask=regard.masks.causal()",
    "is_causal": "causality is a mask here: mask=regard.masks.causal()",
    "attn_mask": "that is mask= where True means 'may attend', and bias= where it is added",
    "dropout_p": "did you mean 'dropout'?",
    **dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
        'sequences end to end are layout="thd", cu_seqlens=(cu_seqlens_q, cu_seqlens_k); no longest length is needed',
    ),
    "score_mod": "a function of (score, b, h, q_idx, kv_idx) is score_mix= here",
    "block_mask": "that is mask=regard.masks.from_block_mask(block_mask)",
    "enable_gqa": "fewer key heads than query heads need no flag",
    **dict.fromkeys(_OF_THE_LAYER, "this one is a slot of the layer regard.Attention"),
}
"""What torch and the layer call by names that `attention` does not have -> what to write."""
_OTHERWISE = {
    "is_causal": "did you mean 'causal'?",
    "dropout_p": "did you mean 'dropout'?",
    "score_mod": _ELSEWHERE["score_mod"],
}
"""What torch calls by names that the layer does not have."""


def check_problem(p: Problem) -> None:
    """What every kernel counts on, whoever made the problem: queries, keys, values, mask and bias that fit each other.

    Kernels read memory by these shapes, and torch's fused one looks at none of them.
    """
    check_inputs(p.q, p.k, p.v)
    if p.memory is not None:
        _check_memory(p)
    if p.mask is None and p.bias is None:
        return
    B, H, _, T, S = p.shape
    if p.mask is not None:
        check_mask(p.mask, B, H, T, S, p.q.device)
    if p.bias is not None:
        _check_bias(p)


_USUAL = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all is well, in as few questions as will do: every call asks, and small ones take some 20 us."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    if q.is_nested or k.is_nested or v.is_nested or not q.layout == k.layout == v.layout == torch.strided:
        return False
    if q.dtype not in _USUAL or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        return False
    Q, K, V = q.shape, k.shape, v.shape
    if not len(Q) == len(K) == len(V) == 4 or K[:3] != V[:3] or Q[0] != K[0] or Q[3] != K[3]:
        return False
    return Q[3] > 0 and K[1] > 0 and Q[1] % K[1] == 0


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Ranks, sizes, dtypes and devices of queries, keys and values."""
    if _fit(q, k, v):
        return
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            wanted = "a Tensor (B, heads, tokens, D)" + foreign(name, t)
            refuse(WHO, name, "has the wrong type", type(t).__name__, wanted, error=TypeError)
        usual(WHO, **{name: t})
        if t.dim() != 4:
            wanted = "(batch, heads, tokens, width); use x[:, None] for one head"
            refuse(WHO, name, "has the wrong shape", tuple(t.shape), wanted)
    (B, H, _, D), (Bk, G, S, Dk), (Bv, Gv, Sv, _) = q.shape, k.shape, v.shape
    if not B == Bk == Bv:
        got = f"q {B}, k {Bk}, v {Bv}"
        refuse(WHO, "q, k and v", "have different batch sizes", got, "one; expand them, sizes of 1 are not repeated")
    if Dk != D:
        refuse(WHO, "k", "has another head width than q", Dk, str(D))
    if D == 0:
        refuse(WHO, "q", "has heads of no width", 0, "at least 1")
    if Sv != S:
        refuse(WHO, "v", "has another length than k", Sv, str(S))
    if Gv != G:
        refuse(WHO, "v", "has another number of heads than k", Gv, str(G))
    if G == 0 or H % G:
        refuse(WHO, "q", f"has heads that are no multiple of the {G} key heads", H, "key heads that divide query heads")
    if not q.dtype == k.dtype == v.dtype:
        got = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        refuse(
            WHO, "q, k and v", "have different dtypes", got, "one; cast them, they are never promoted", error=TypeError
        )
    if not q.dtype.is_floating_point:
        refuse(WHO, "q, k and v", "have the wrong dtype", q.dtype, "floating point", error=TypeError)
    if not q.device == k.device == v.device:
        got = f"q {q.device}, k {k.device}, v {v.device}"
        refuse(WHO, "q, k and v", "are on different devices", got, "one; move them together")


def check_mask(mask: object, B: int, H: int, T: int, S: int, device: torch.device) -> Mask | None:
    """A Mask that fits (B, H, T, S), from a Mask or a bool tensor of shape (B or 1, H or 1, T, S)."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        calls = _calls(mask)
        if mask.dtype.is_floating_point:
            wanted = "torch.bool with True = may attend; additive terms go into bias="
            refuse(WHO, "mask", "has the wrong dtype", mask.dtype, wanted, error=TypeError)
        if mask.dtype != torch.bool:
            wanted = f"torch.bool with True = may attend; pass {calls}"
            refuse(WHO, "mask", "has the wrong dtype", mask.dtype, wanted, error=TypeError)
        if mask.dim() != 4:
            wanted = f"(B or 1, H or 1, T, S); pass {calls}"
            refuse(WHO, "mask", "has an ambiguous shape", tuple(mask.shape), wanted)
        wrong = [
            n for n, got, ok in zip("BHTS", mask.shape, (B, H, T, S)) if got != ok and not (n in "BH" and got == 1)
        ]
        if wrong:
            wanted = f"B={B}, H={H}, T={T}, S={S}; only B and H may be 1"
            refuse(WHO, "mask", f"does not fit in {', '.join(wrong)}", tuple(mask.shape), wanted)
        if mask.device != device:
            refuse(WHO, "mask", "is on another device than q", mask.device, str(device))
        return dense(mask)
    if not isinstance(mask, Mask):
        wanted = "a regard.masks.Mask or a bool Tensor"
        refuse(WHO, "mask", "has the wrong type", type(mask).__name__, wanted, error=TypeError)
    if not _broadcasts(mask.batch, B) or not _broadcasts(mask.heads, H):
        got = f"{mask!r}, for batch {mask.batch} and {mask.heads} heads"
        refuse(WHO, "mask", "does not fit the inputs", got, f"batch {B} and {H} heads, or 1")
    return mask


def _broadcasts(n: int, size: int) -> bool:
    """Told by ==, for `in` finds no equal among sizes that a compiler leaves open."""
    return n == 1 or n == size


def _calls(mask: Tensor) -> str:
    """What to write for a mask of this rank, where it says which pairs or which keys may be seen."""
    true = "mask" if mask.dtype == torch.bool else "mask.bool()"
    return {
        1: f"{true}[None, None, None] for the keys of every query",
        2: f"{true}[None, None] if it says which query sees which key, regard.masks.padding({true}) if which keys of "
        "each sequence are real",
        3: f"{true}[:, None] if its first axis is the batch, {true}[None] if that is the heads",
    }.get(mask.dim(), true)


def check_bias(p: Problem) -> Problem:
    """A bias that fits and means what it says; entries at -inf (or as low as the dtype goes) become masked."""
    if p.bias is None:
        return p
    _check_bias(p)
    check_terms(WHO, "bias", p.bias, 'mask=bias.bool() if True means "may attend"')
    return lowest_masked(p)


def _check_bias(p: Problem) -> None:
    bias, (B, H, _, T, S) = p.bias, p.shape
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        wanted = "a floating point Tensor; boolean masks go into mask="
        refuse(WHO, "bias", "has the wrong type", got, wanted, error=TypeError)
    if bias.dim() != 4 or any(got not in (1, ok) for got, ok in zip(bias.shape, (B, H, T, S))):
        wanted = f"what broadcasts to (B, H, T, S) = {(B, H, T, S)}"
        refuse(WHO, "bias", "does not broadcast to the scores", tuple(bias.shape), wanted)
    if bias.device != p.q.device:
        refuse(WHO, "bias", "is on another device than q", bias.device, str(p.q.device))


def check_terms(who: str, name: str, terms: Tensor, boolean: str) -> None:
    """Refuse what nobody means to add to scores: NaN, +inf, and a mask of 0 and 1; `boolean` is how one passes that."""
    if terms.numel() == 0 or not readable(terms):
        return
    values = terms.detach()
    low, high = (float(x) for x in values.aminmax())
    if math.isnan(low) or high == math.inf:
        refuse(who, name, "holds NaN or +inf", f"{low} to {high}", "finite terms, or -inf to mask a pair")
    if low == 0 and high == 1 and bool(((values == 0) | (values == 1)).all()):
        refuse(who, name, "looks boolean", "only 0 and 1", f"additive terms; pass {boolean}")


def lowest_masked(p: Problem) -> Problem:
    """The same problem with entries of the bias at -inf, or as low as its dtype goes, as a mask."""
    bias = p.bias
    if bias is None or bias.numel() == 0:
        return p
    values = bias.detach()
    # Half of the dtype's most negative number is nobody's bias: it is the finfo.min idiom, which averages a fully
    # masked row over all its values instead of giving 0.
    masked = values <= torch.finfo(values.dtype).min / 2
    if readable(bias, p.q) and not bool(masked.any()):
        return p
    allowed = dense(~masked.expand(-1, -1, p.q.shape[2], p.k.shape[2]))
    return replace(p, bias=bias.masked_fill(masked, 0.0), mask=allowed if p.mask is None else p.mask & allowed)


def _check_memory(p: Problem) -> None:
    assert p.memory is not None
    check_beside_memory(WHO, {slot: getattr(p, slot) for slot in IN_KERNELS})
    made, (_, _, G, _, _) = p.memory(), p.shape
    wanted = f"keys (G, N, D) = ({G}, N, {p.q.shape[3]}) and values ({G}, N, {p.v.shape[3]})"
    sizes = [tuple(z.shape) for z in made]
    n = sizes[0][1:2]
    if sizes != [(G, *n, p.q.shape[3]), (G, *n, p.v.shape[3])]:
        refuse(WHO, "memory", "does not fit q, k and v", " and ".join(map(str, sizes)), wanted)
    if any(z.device != p.q.device for z in made):
        refuse(WHO, "memory", "is on another device than q", made[0].device, str(p.q.device))


def check_beside_memory(who: str, stages: Mapping[str, object]) -> None:
    """Refuse what a memory can't be merged with: there must be one softmax, of dot products, behind all outputs."""
    wanted = "softmax of dot products, or a normalizer that scales its rows, with terms, masks, a soft cap or what is "
    wanted += "done to single pairs"
    for slot, stage in stages.items():
        fits = stage is None or slot not in ("score", "score_mix", "normalizer", "weight_mix")
        if isinstance(stage, Normalizer):
            fits = stage.is_softmax or stage.scales_softmax()
        if isinstance(stage, Mix):
            fits = slot == "score_mix" and (stage.cap is not None or stage.sees == "pair")
        if not fits:
            why = "does not go with a memory, which is merged by its sum of exponentials"
            refuse(who, slot, why, type(stage).__name__, wanted)


def _by_name(slot: str, given: object) -> str:
    return f"; names are for regard.create({given!r}, ...)" if isinstance(given, str) and slot != "mask" else ""


def check_options(scale: float | None, dropout: float, *, who: str = "attention", **stages: object) -> None:
    """Scale, dropout and what fills the slots."""
    if scale is not None:
        number(who, above=0, scale=scale)
    number(who, least=0, most=1, dropout=dropout)
    slots = [name for name in SLOTS if who != WHO or name not in _OF_THE_LAYER]
    for name, stage in stages.items():
        if name not in slots:
            hint = (_ELSEWHERE if who == WHO else _OTHERWISE).get(name, "") or meant(name, slots, 1)
            told = "; ".join(filter(None, [f"one of {', '.join(slots)}", hint]))
            refuse(who, "argument or slot", "is unknown", repr(name), told, error=TypeError)
        kind = SLOTS[name].kind
        if stage is not None and not isinstance(stage, kind):
            refuse(
                who,
                name,
                "has the wrong type",
                f"the class {stage.__name__}" if isinstance(stage, type) else type(stage).__name__,
                f"a {kind.__name__} of regard.{'masks' if kind is Mask else 'stages'}" + _by_name(name, stage),
                error=TypeError,
            )
    if stages.get("memory") is not None:
        check_beside_memory(who, stages)

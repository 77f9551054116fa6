"""What a call to attention refuses, before any work is done. Each message says what is wrong, what was got and what
is expected."""

import difflib
import math
from dataclasses import replace

import torch
from torch import Tensor

from regard.checks import refuse
from regard.kernels.problem import Problem
from regard.masks import Mask, dense
from regard.stages import SLOTS


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Ranks, sizes, dtypes and devices of queries, keys and values."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention: {name} must be a Tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(
                f"attention: {name} must be (batch, heads, tokens, width), got shape {tuple(t.shape)}; "
                "use x[:, None] for one head"
            )
    (B, H, _, D), (Bk, G, S, Dk), (Bv, Gv, Sv, _) = q.shape, k.shape, v.shape
    if not B == Bk == Bv:
        raise ValueError(
            f"attention: batch sizes differ (q {B}, k {Bk}, v {Bv}); expand them, sizes of 1 are not repeated"
        )
    if Dk != D:
        raise ValueError(f"attention: head widths of q ({D}) and k ({Dk}) differ; they must match")
    if D == 0:
        raise ValueError("attention: head width is 0; it must be at least 1")
    if Sv != S:
        raise ValueError(f"attention: k length {S} and v length {Sv} differ; they must match")
    if Gv != G:
        raise ValueError(f"attention: k has {G} heads and v has {Gv}; they must match")
    if G == 0 or H % G:
        raise ValueError(f"attention: {H} query heads are not a multiple of {G} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"attention: dtypes differ (q {q.dtype}, k {k.dtype}, v {v.dtype}); cast them, they are never promoted"
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"attention: q, k and v must be floating point, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: devices differ (q {q.device}, k {k.device}, v {v.device}); move them together")


def check_mask(mask: object, B: int, H: int, T: int, S: int, device: torch.device) -> Mask | None:
    """A Mask that fits (B, H, T, S), from a Mask or a bool tensor of shape (B or 1, H or 1, T, S)."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            hint = "additive terms go into bias=" if mask.dtype.is_floating_point else "pass mask.bool()"
            raise TypeError(f"attention: mask must be bool with True = may attend, got {mask.dtype}; {hint}")
        if mask.dim() != 4:
            raise ValueError(
                f"attention: mask of shape {tuple(mask.shape)} is ambiguous; pair masks are (B or 1, H or 1, T, S), "
                "keys are masked by regard.masks.padding(keep)"
            )
        wrong = [
            f"{n}={got}"
            for n, got, ok in zip("BHTS", mask.shape, (B, H, T, S))
            if got != ok and not (n in "BH" and got == 1)
        ]
        if wrong:
            raise ValueError(
                f"attention: mask of shape {tuple(mask.shape)} does not fit B={B}, H={H}, T={T}, S={S} "
                f"({', '.join(wrong)}); only B and H may be 1"
            )
        if mask.device != device:
            raise ValueError(f"attention: mask is on {mask.device}, q on {device}; move them together")
        return dense(mask)
    if not isinstance(mask, Mask):
        raise TypeError(f"attention: mask must be a regard.masks.Mask or a bool Tensor, got {type(mask).__name__}")
    if mask.batch not in (1, B) or mask.heads not in (1, H):
        raise ValueError(
            f"attention: mask {mask!r} is for batch {mask.batch} and {mask.heads} heads, the inputs have {B} and {H}"
        )
    return mask


def check_bias(p: Problem) -> Problem:
    """A bias that fits and means what it says; entries at -inf (or as low as the dtype goes) become masked."""
    bias, (B, H, _, T, S) = p.bias, p.shape
    if bias is None:
        return p
    if not isinstance(bias, Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"attention: bias must be a floating point Tensor, got {got}; boolean masks go into mask=")
    if bias.dim() != 4 or any(got not in (1, ok) for got, ok in zip(bias.shape, (B, H, T, S))):
        raise ValueError(
            f"attention: bias of shape {tuple(bias.shape)} does not broadcast to (B, H, T, S) = {(B, H, T, S)}"
        )
    if bias.device != p.q.device:
        raise ValueError(f"attention: bias is on {bias.device}, q on {p.q.device}; move them together")
    if torch.compiler.is_compiling() or bias.is_meta or bias.numel() == 0:
        return p
    values = bias.detach()
    low, high = (float(x) for x in values.aminmax())
    if math.isnan(low) or high == math.inf:
        raise ValueError("attention: bias holds NaN or +inf; terms must be finite, or -inf to mask a pair")
    if low == 0 and high == 1 and bool(((values == 0) | (values == 1)).all()):
        raise ValueError(
            'attention: bias looks boolean (only 0 and 1); pass mask=bias.bool() if True means "may attend"'
        )
    # Half of the dtype's most negative number is nobody's bias: it is the finfo.min idiom, which averages a fully
    # masked row over all its values instead of giving 0.
    masked = values <= torch.finfo(values.dtype).min / 2
    if not bool(masked.any()):
        return p
    allowed = dense(~masked.expand(-1, -1, T, S))
    return replace(p, bias=bias.masked_fill(masked, 0.0), mask=allowed if p.mask is None else p.mask & allowed)


def check_options(scale: float | None, dropout: float, *, who: str = "attention", **stages: object) -> None:
    """Scale, dropout and what fills the slots."""
    if scale is not None and not (isinstance(scale, float | int) and math.isfinite(scale) and scale > 0):
        refuse(who, "scale", "is out of range", scale, "a finite number > 0")
    if not 0.0 <= dropout <= 1.0:
        refuse(who, "dropout", "is out of range", dropout, "a number in [0, 1]")
    for name, stage in stages.items():
        if name not in SLOTS:
            near = difflib.get_close_matches(name, SLOTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{who}: there is no argument or slot {name!r}; slots are {', '.join(SLOTS)}{hint}")
        kind = SLOTS[name].kind
        if stage is not None and not isinstance(stage, kind):
            refuse(
                who,
                name,
                "has the wrong type",
                type(stage).__name__,
                f"a {kind.__module__}.{kind.__name__}",
                error=TypeError,
            )

"""Thresholds of sparse normalisers, row by row, and a function that is differentiated by what it solves."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import number, refuse
from regard.tracing import readable, transformed

_STEPS = 16
"""Newton steps at most; eager CPU code stops as soon as no tau moves any more."""
_TERMS = 14
"""Terms of a series for |x| < 1/2; the next is below float64's rounding."""

Knob = float | Tensor
"""A number of all rows, or one of each: (..., 1)."""


def per_row(who: str, name: str, knob: Tensor, scores: Tensor, dim: int) -> Tensor:
    """A tensor of numbers for rows along `dim`, with as many axes as the scores."""
    if knob.ndim > scores.ndim or any(
        n not in (1, m) for n, m in zip(reversed(knob.shape), reversed(scores.shape), strict=False)
    ):
        refuse(who, name, "has the wrong shape", tuple(knob.shape), f"what broadcasts to {tuple(scores.shape)}")
    knob = knob.reshape((1,) * (scores.ndim - knob.ndim) + knob.shape)
    if knob.shape[dim] != 1:
        refuse(who, name, "varies along the normalised axis", tuple(knob.shape), "size 1 there")
    return knob


def bounded(who: str, name: str, knob: Tensor, least: float, *, reached: bool = True) -> tuple[Tensor, bool]:
    """Finite numbers >= least, or > least, and whether they could be looked at. Others are refused, or NaN there."""
    good = ((knob >= least) if reached else (knob > least)) & (knob < torch.inf)
    if not (knob.is_cpu and readable(knob)):
        return torch.where(good, knob, torch.nan), False
    if not bool(good.all()):
        words = f"finite numbers {'>=' if reached else '>'} {least:g}"
        refuse(who, name, "is out of range", knob.detach()[~good][0].item(), words)
    return knob, True


def shifted(x: Float[Tensor, "*n S"]) -> Float[Tensor, "*n S"]:
    """Each row less its greatest number; rows of only -inf stay."""
    top = x.amax(-1, keepdim=True)
    return x - top.masked_fill(top == -torch.inf, 0)


def climb(x: Float[Tensor, "*n S"], n: float | Float[Tensor, "*#n 1"]) -> Float[Tensor, "*n 1"]:
    """tau of (sum_s max(x_s - tau, 0)^n)^(1/n) = 1, for rows whose greatest number is 0 and n >= 1.

    The n-norm is convex and falling in tau, so from tau = -1, where it is at least 1, Newton's steps climb to the root
    and never pass it. For n = 1 they end exactly; else a handful reaches rounding.
    """
    tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    early = x.is_cpu and readable(x)
    tau = torch.full_like(x[..., :1], -1.0)
    for _ in range(_STEPS):
        rest = (x - tau).clamp_(min=0)
        if isinstance(n, float) and n == 2:
            # Not vector_norm, which on CPUs adds up a row's squares one after another.
            h = rest.square().sum(-1, keepdim=True).sqrt()
            slope = rest.sum(-1, keepdim=True) / h.clamp(min=tiny)
        elif isinstance(n, float) and n == 1:
            h = rest.sum(-1, keepdim=True)
            slope = rest.sign_().sum(-1, keepdim=True)  # the size of the support
        else:
            power = rest.pow(n - 1)
            if isinstance(n, Tensor):
                power.mul_(rest.sign())  # where n is 1, 0^0 must not count as support
            total = rest.mul_(power).sum(-1, keepdim=True)
            h = total.pow(1 / n)
            slope = power.sum(-1, keepdim=True) * h / total.clamp(min=tiny)
        step = (h - 1) / slope.clamp(min=tiny)
        # Each row stops by itself: how long others take, such as later queries, must not move it by a rounding.
        step = torch.where(step > eps, step, 0.0)
        tau += step
        if early and not bool(step.any()):
            break
    return tau


def halve(low: Tensor, width: Tensor | float, above: Callable[[Tensor], Tensor]) -> Tensor:
    """The root between low and low + width by bisection, as near as the dtype tells; `above` says whether it is."""
    for _ in range(34 if low.dtype == torch.float32 else 64):
        width = width / 2
        middle = low + width
        low = torch.where(above(middle), middle, low)
    return low


def entmax_by_halving(z: Float[Tensor, "*n S"], alpha: float | Float[Tensor, "*#n 1"]) -> Float[Tensor, "*n S"]:
    """z of each row -> p, for any alpha >= 1.

    With d = z - max z and t the greatest weight, p = t (1 + (alpha - 1) d / t^(alpha - 1))^(1 / (alpha - 1)), which is
    t exp(d) for alpha = 1; its sum rises with t, and log t lies between -log S and 0.
    """
    big, tiny = torch.finfo(z.dtype).max, torch.finfo(z.dtype).tiny
    d = shifted(z)
    e = torch.where(alpha == 1, 1, alpha - 1) if isinstance(alpha, Tensor) else alpha - 1
    w = -e * d

    def weights(log_t: Tensor) -> Tensor:
        gone = (w * (-e * log_t).exp().clamp(max=big)).clamp(max=1)
        return (log_t + torch.log1p(-gone) / e).exp()

    width = torch.ones_like(z).sum(-1, keepdim=True).log()
    log_t = halve(-width, width, lambda middle: weights(middle).sum(-1, keepdim=True) <= 1)
    p = weights(log_t)
    if isinstance(alpha, Tensor):
        p = torch.where(alpha == 1, d.exp(), p)
    return p / p.sum(-1, keepdim=True).clamp(min=tiny)


def stretched(x: Tensor) -> Tensor:
    """(x e^x - e^x + 1) / x^2, without cancellation near 0."""
    near = x.abs() < 0.5
    small, large = torch.where(near, x, 0), torch.where(near, 1, x)
    series = torch.full_like(x, 1 / (_TERMS + 2))
    for k in range(_TERMS, 0, -1):  # sum_k x^k / (k! (k + 2))
        series = series * small / k + 1 / (k + 1)
    return torch.where(near, series, (large * large.exp() - torch.expm1(large)) / large**2)


class Form(NamedTuple):
    """A map of rows of scores to weights, and its derivatives in closed form, which may be differentiated again."""

    solve: Callable[[Tensor, Knob], Tensor]
    """(scores, knob) -> weights."""
    pull: Callable[[Tensor, Tensor, Knob], Tensor]
    """(gradient on the weights, weights, knob) -> gradient on the scores. The Jacobian is symmetric: it pushes too."""
    rate: Callable[[Tensor, Tensor], Tensor]
    """(weights, knob) -> d weights / d knob."""


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(scores: Tensor, knob: Knob, form: Form) -> Tensor:
        return form.solve(scores, knob)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, knob, ctx.form = inputs
        ctx.knob = None if isinstance(knob, Tensor) else knob
        saved = (output, knob) if isinstance(knob, Tensor) else (output,)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, dp: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p, *rest = ctx.saved_tensors
        knob = rest[0] if rest else ctx.knob
        dz = ctx.form.pull(dp, p, knob) if ctx.needs_input_grad[0] else None
        turned = rest and ctx.needs_input_grad[1]
        return dz, (dp * ctx.form.rate(p, knob)).sum_to_size(knob.shape) if turned else None, None


class _Transformed(_Solved):
    """With rules for torch.func and forward mode, which torch.compile refuses to see."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, dz: Tensor | None, dknob: Tensor | None, _: None) -> Tensor:
        p, *rest = ctx.saved_tensors
        knob = rest[0] if rest else ctx.knob
        moved = torch.zeros_like(p) if dz is None else ctx.form.pull(dz, p, knob)
        return moved if dknob is None else moved + dknob * ctx.form.rate(p, knob)


def solved(scores: Tensor, knob: Knob, form: Form) -> Tensor:
    """`form.solve(scores, knob)`, differentiable in scores and in a knob that is a tensor."""
    kind = _Transformed if transformed(scores, *([knob] if isinstance(knob, Tensor) else [])) else _Solved
    return kind.apply(scores, knob, form)


def solved_along(
    who: str,
    form: Form,
    scores: Tensor,
    dim: int,
    allowed: Tensor | None,
    *,
    least: float,
    reached: bool = True,
    **knob: int | float | Tensor,
) -> Tensor:
    """`form` along `dim`, in at least float32, with a knob that is a number >= `least`, or > `least`, or a tensor of
    such that broadcasts against the scores."""
    ((name, value),) = knob.items()
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    turned: Knob
    if isinstance(value, Tensor):
        value, _ = bounded(who, name, per_row(who, name, value, scores, dim), least, reached=reached)
        turned = value.to(z.dtype).movedim(dim, -1)
    else:
        number(who, **{"least" if reached else "above": least, name: value})
        turned = float(value)
    if scores.shape[dim] == 0:
        return scores
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    return solved(z.movedim(dim, -1), turned, form).movedim(-1, dim).to(scores.dtype)

"""Sparse softmax: alpha-entmax gives keys that do not matter a weight of exactly 0.

alpha = 1 is softmax, alpha = 2 sparsemax. With n = 1 / (alpha - 1) the n-norm
h(tau) = (sum_s max((alpha - 1) z_s - tau, 0)^n)^(1/n) is convex and falling, so from any tau with h >= 1 the Newton
steps tau += (h - 1) / |h'| climb to the root and never pass it. For alpha = 2 they end exactly; else a handful reaches
rounding.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, number, refuse
from regard.kernels.native import rows as native
from regard.normalizers.softmax import softmax
from regard.stages import Normalizer
from regard.tracing import readable, transformed

CARD = Card(
    "entmax",
    equation="""p   = argmax over the simplex of p.z + sum_s (p_s - p_s^alpha) / (alpha (alpha - 1))
p_s = max((alpha - 1) z_s - tau, 0)^(1 / (alpha - 1)),   tau the one number for which sum_s p_s = 1
dz  = g * (dp - sum(g dp) / sum(g)),   g_s = p_s^(2 - alpha) on the support, else 0""",
    papers=(
        Paper(
            "Adaptively Sparse Transformers",
            "Correia, Niculae, Martins",
            2019,
            "1909.00015",
            "official code; introduction read",
        ),
    ),
    traits=PLAIN | {"sparse"},
    cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
    claim="Exact zeros where softmax has none: "
    "tests/normalizers/test_entmax.py::test_weights_are_exactly_zero_where_softmax_has_none.",
    differs=("tau is found by Newton steps instead of bisection or sorting.",),
    verified="third-party",
    defaults={"alpha": "paper"},
)

_STEPS = 16
"""Newton steps at most; eager CPU code stops as soon as no tau moves any more."""
_BLOCK = 1 << 16
"""Numbers worked on at a time in eager CPU code, so that they stay in cache."""


def _solve(x: Float[Tensor, "*n S"], alpha: float | Float[Tensor, "*#n 1"]) -> Float[Tensor, "*n S"]:
    """(alpha - 1) z of each row -> p, in place. A row of only -inf gives 0."""
    tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    early = x.is_cpu and readable(x)
    top = x.amax(-1, keepdim=True)
    x -= top.masked_fill(top == -torch.inf, 0)
    tau = torch.full_like(top, -1.0)
    for _ in range(_STEPS):
        rest = (x - tau).clamp_(min=0)
        if isinstance(alpha, float) and alpha == 1.5:
            # Not vector_norm, which on CPUs adds up a row's squares one after another.
            h = rest.square().sum(-1, keepdim=True).sqrt()
            slope = rest.sum(-1, keepdim=True) / h.clamp(min=tiny)
        elif isinstance(alpha, float) and alpha == 2:
            h = rest.sum(-1, keepdim=True)
            slope = rest.sign_().sum(-1, keepdim=True)  # the size of the support
        else:
            power = rest.pow((2 - alpha) / (alpha - 1))
            if isinstance(alpha, Tensor):
                power.mul_(rest.sign())  # where alpha is 2, 0^0 must not count as support
            total = rest.mul_(power).sum(-1, keepdim=True)
            h = total.pow(alpha - 1)
            slope = power.sum(-1, keepdim=True) * h / total.clamp(min=tiny)
        step = (h - 1) / slope.clamp(min=tiny)
        # Each row stops by itself: how long others take, such as later queries, must not move it by a rounding.
        step = torch.where(step > eps, step, 0.0)
        tau += step
        if early and not bool(step.any()):
            break
    x.sub_(tau).clamp_(min=0)
    if not isinstance(alpha, float):
        x.pow_(1 / (alpha - 1))
    elif alpha != 2:
        x.square_() if alpha == 1.5 else x.pow_(1 / (alpha - 1))
    return x.div_(x.sum(-1, keepdim=True).clamp(min=tiny))


def _pull_back(dp: Tensor, p: Tensor, alpha: float | Tensor) -> Tensor:
    """Gradient on the weights -> gradient on the scores, row by row."""
    if isinstance(alpha, float) and alpha == 2:
        g = (p > 0).to(p.dtype)
    elif isinstance(alpha, float) and alpha == 1.5 and not torch.is_grad_enabled():
        g = p.sqrt()
    else:
        support = p > 0  # the inner where keeps the second derivative at p = 0 finite
        g = torch.where(support, torch.where(support, p, 1).pow(2 - alpha), 0)
    pulled = g * dp
    mean = pulled.sum(-1, keepdim=True) / g.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.addcmul(pulled, g, mean, value=-1)


def _pull_back_alpha(dp: Tensor, p: Tensor, alpha: Tensor) -> Tensor:
    """Gradient on the weights -> gradient on alpha."""
    return (dp * _alpha_rate(p, alpha)).sum_to_size(alpha.shape)


def _alpha_rate(p: Tensor, alpha: Tensor) -> Tensor:
    """dp / dalpha."""
    support = p > 0
    safe = torch.where(support, p, 1)
    g = torch.where(support, safe.pow(2 - alpha), 0)
    h = g / g.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    e = p * safe.log()
    return (p - h) / (alpha - 1) ** 2 - (e - h * e.sum(-1, keepdim=True)) / (alpha - 1)


def _in_blocks(x: Tensor, alpha: float | Tensor) -> Iterator[tuple[slice, float | Tensor]]:
    """Cut the rows of x (N, S) into pieces that fit in cache."""
    size = max(1, _BLOCK // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        yield rows, alpha if isinstance(alpha, float) else alpha[rows]


def _cached(*tensors: Tensor) -> bool:
    """Whether to go block by block. A compiled graph would be tied to the number of blocks, and so to one length."""
    return tensors[0].is_cpu and readable(*tensors)


def _per_row(alpha: float | Tensor, x: Tensor) -> float | Tensor:
    return alpha if isinstance(alpha, float) else alpha.expand(*x.shape[:-1], 1).reshape(-1, 1)


class _Entmax(torch.autograd.Function):
    """Forward by `_solve`; backward in closed form, made of differentiable steps so that it can be
    differentiated again.
    """

    @staticmethod
    def forward(scores: Tensor, alpha: float | Tensor, allowed: Tensor | None) -> Tensor:
        if native.able(scores, alpha) and not isinstance(alpha, Tensor):
            z = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
            return native.entmax(z.view(-1, z.shape[-1]), alpha).view(scores.shape)
        x = scores * (alpha - 1)
        if allowed is not None:
            x.masked_fill_(~allowed, -torch.inf)
        if not _cached(x):
            return _solve(x, alpha)
        flat = x.view(-1, x.shape[-1])
        for rows, each in _in_blocks(flat, _per_row(alpha, x)):
            _solve(flat[rows], each)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, alpha, _ = inputs
        ctx.alpha = alpha if isinstance(alpha, float) else None
        saved = (output, *(() if isinstance(alpha, float) else (alpha,)))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, dp: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p, *rest = ctx.saved_tensors
        alpha = rest[0] if rest else ctx.alpha
        dz = None
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            dz = _pull_back(dp, p, alpha)
        elif ctx.needs_input_grad[0] and native.able(p, alpha):
            dz = native.entmax_backward(dp.reshape(-1, p.shape[-1]), p.view(-1, p.shape[-1]), alpha).view(p.shape)
        elif ctx.needs_input_grad[0]:
            if not _cached(p, dp):
                return _pull_back(dp, p, alpha), _alpha_grad(ctx, dp, p, alpha), None
            dz = torch.empty_like(p)
            out, flat_dp, flat_p = (
                dz.view(-1, p.shape[-1]),
                dp.reshape(-1, p.shape[-1]),
                p.view(-1, p.shape[-1]),
            )
            for rows, each in _in_blocks(flat_p, _per_row(alpha, p)):
                out[rows] = _pull_back(flat_dp[rows], flat_p[rows], each)
        return dz, _alpha_grad(ctx, dp, p, alpha), None


def _alpha_grad(ctx, dp: Tensor, p: Tensor, alpha: float | Tensor) -> Tensor | None:
    return _pull_back_alpha(dp, p, alpha) if ctx.needs_input_grad[1] and isinstance(alpha, Tensor) else None


class _Transformed(_Entmax):
    """With rules for torch.func and forward mode, which torch.compile refuses to see."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, dz: Tensor | None, dalpha: Tensor | None, _: None) -> Tensor:
        p, *rest = ctx.saved_tensors
        alpha = rest[0] if rest else ctx.alpha
        moved = torch.zeros_like(p) if dz is None else _pull_back(dz, p, alpha)  # the Jacobian is symmetric
        return moved if dalpha is None else moved + dalpha * _alpha_rate(p, alpha)


@checked()
def entmax(
    scores: Float[Tensor, "... S"],
    alpha: int | float | Float[Tensor, "..."],
    dim: int = -1,
    *,
    allowed: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "... S"]:
    """alpha-entmax along `dim`. A tensor alpha must broadcast against scores with size 1 at `dim`; its values
    must lie in (1, 2] and are not looked at. Entries that are not allowed, and rows without any, get 0."""
    if dim not in (-1, scores.ndim - 1):
        alpha = alpha if not isinstance(alpha, Tensor) or alpha.ndim == 0 else alpha.movedim(dim, -1)
        inner = None if allowed is None else allowed.movedim(dim, -1)
        return entmax(scores.movedim(dim, -1), alpha, allowed=inner).movedim(-1, dim)
    if scores.shape[-1] == 0:
        return scores
    if isinstance(alpha, Tensor):
        if alpha.ndim and alpha.shape[-1] != 1:
            refuse("entmax", "alpha", "varies along the normalised axis", tuple(alpha.shape), "size 1 there")
        alpha = alpha.reshape((1,) * (scores.ndim - alpha.ndim) + alpha.shape)
    else:
        number("entmax", least=1, most=2, alpha=alpha)
        if alpha == 1:
            return softmax(scores, allowed)
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    alpha = alpha.to(z.dtype) if isinstance(alpha, Tensor) else float(alpha)
    kind = _Transformed if transformed(z, *([alpha] if isinstance(alpha, Tensor) else [])) else _Entmax
    return kind.apply(z.contiguous(), alpha, allowed).to(scores.dtype)


def entmax15(scores: Float[Tensor, "... S"], dim: int = -1) -> Float[Tensor, "... S"]:
    """1.5-entmax."""
    return entmax(scores, 1.5, dim)


def sparsemax(scores: Float[Tensor, "... S"], dim: int = -1) -> Float[Tensor, "... S"]:
    """The Euclidean projection onto the simplex: 2-entmax."""
    return entmax(scores, 2.0, dim)


@CARD.fills("normalizer")
class Entmax(Normalizer):
    """alpha-entmax with one fixed alpha for all heads.

    Args:
        alpha: from 1 to 2; the greater, the sparser. The authors' code has forms of its own for 1.5 and 2.
    """

    def __init__(self, *, alpha: float = 1.5) -> None:
        super().__init__()
        number(self, least=1, most=2, alpha=alpha)
        self.alpha = float(alpha)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return entmax(scores, self.alpha, allowed=allowed)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

"""Sparse softmax: alpha-entmax gives keys that do not matter a weight of exactly 0.

alpha = 1 is softmax, alpha = 2 sparsemax, and greater ones are sparser still. Up to 2, tau is where an n-norm with
n = 1 / (alpha - 1) is 1, and found by Newton's steps; beyond 2, where that is no norm, and next to 1 by halving.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, number
from regard.kernels.native import rows as native
from regard.normalizers._roots import bounded, climb, entmax_by_halving, per_row, stretched
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
    differs=("tau is found by Newton steps instead of bisection or sorting, for alpha from 1.01 to 2.",),
    verified="third-party",
    defaults={"alpha": "paper"},
)

_NEWTON = (1.01, 2.0)
"""Where Newton's steps find tau. Nearer to 1 the powers lose too many digits, and beyond 2 the norm is not convex."""
_BLOCK = 1 << 16
"""Numbers worked on at a time in eager CPU code, so that they stay in cache."""


def _climb(x: Float[Tensor, "*n S"], alpha: float | Float[Tensor, "*#n 1"]) -> Float[Tensor, "*n S"]:
    """(alpha - 1) z of each row -> p, in place. A row of only -inf gives 0."""
    top = x.amax(-1, keepdim=True)
    x -= top.masked_fill(top == -torch.inf, 0)
    tau = climb(x, 1 / (alpha - 1))
    x.sub_(tau).clamp_(min=0)
    if not isinstance(alpha, float):
        x.pow_(1 / (alpha - 1))
    elif alpha != 2:
        x.square_() if alpha == 1.5 else x.pow_(1 / (alpha - 1))
    return x.div_(x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny))


def _pull_back(dp: Tensor, p: Tensor, alpha: float | Tensor) -> Tensor:
    """Gradient on the weights -> gradient on the scores, row by row."""
    if isinstance(alpha, float) and alpha == 2:
        g = (p > 0).to(p.dtype)
    elif isinstance(alpha, float) and alpha == 1.5 and not torch.is_grad_enabled():
        g = p.sqrt()
    elif isinstance(alpha, Tensor) or alpha > 2:
        return _pull_back_steep(dp, p, alpha)
    else:
        support = p > 0  # the inner where keeps the second derivative at p = 0 finite
        g = torch.where(support, torch.where(support, p, 1).pow(2 - alpha), 0)
    pulled = g * dp
    mean = pulled.sum(-1, keepdim=True) / g.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return torch.addcmul(pulled, g, mean, value=-1)


def _pull_back_steep(dp: Tensor, p: Tensor, alpha: float | Tensor) -> Tensor:
    """The same for alpha > 2, where g is greatest at the least weight and can hide all else of its row: gradients are
    taken relative to the one there, so that it drops out of the sums."""
    support = p > 0
    log_g = torch.where(support, (2 - alpha) * torch.where(support, p, 1).log(), -torch.inf)
    share = torch.softmax(log_g.masked_fill(~support.any(-1, keepdim=True), 0), -1).masked_fill(~support, 0)
    g = log_g.clamp(max=math.log(torch.finfo(p.dtype).max) / 2).exp()
    pulled = g * (dp - dp.gather(-1, log_g.argmax(-1, keepdim=True)))
    return torch.addcmul(pulled, share, pulled.sum(-1, keepdim=True), value=-1)


def _pull_back_alpha(dp: Tensor, p: Tensor, alpha: Tensor) -> Tensor:
    """Gradient on the weights -> gradient on alpha."""
    return (dp * _alpha_rate(p, alpha)).sum_to_size(alpha.shape)


def _alpha_rate(p: Tensor, alpha: Tensor) -> Tensor:
    """dp / dalpha: (p^(alpha - 1) - 1) / (alpha - 1) + tau = z, so alpha moves p as less score would."""
    log_p = torch.where(p > 0, p, 1).log()
    return -_pull_back(log_p**2 * stretched((alpha - 1) * log_p), p, alpha)


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
    """Forward by Newton's steps or halving; backward in closed form, made of differentiable steps so that it can be
    differentiated again.
    """

    @staticmethod
    def forward(scores: Tensor, alpha: float | Tensor, allowed: Tensor | None, newton: bool) -> Tensor:
        if native.able(scores, alpha) and not isinstance(alpha, Tensor):
            z = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
            return native.entmax(z.view(-1, z.shape[-1]), alpha).view(scores.shape)
        x = scores * (alpha - 1) if newton else scores.clone()
        if allowed is not None:
            x.masked_fill_(~allowed, -torch.inf)
        solve = _climb if newton else entmax_by_halving
        if not _cached(x):
            return solve(x, alpha)
        flat = x.view(-1, x.shape[-1])
        for rows, each in _in_blocks(flat, _per_row(alpha, x)):
            flat[rows] = solve(flat[rows], each)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, alpha, *_ = inputs
        ctx.alpha = alpha if isinstance(alpha, float) else None
        saved = (output, *(() if isinstance(alpha, float) else (alpha,)))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx, dp: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        p, *rest = ctx.saved_tensors
        alpha = rest[0] if rest else ctx.alpha
        dz = None
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            dz = _pull_back(dp, p, alpha)
        elif ctx.needs_input_grad[0] and native.able(p, alpha):
            dz = native.entmax_backward(dp.reshape(-1, p.shape[-1]), p.view(-1, p.shape[-1]), alpha).view(p.shape)
        elif ctx.needs_input_grad[0]:
            if not _cached(p, dp):
                return _pull_back(dp, p, alpha), _alpha_grad(ctx, dp, p, alpha), None, None
            dz = torch.empty_like(p)
            out, flat_dp, flat_p = (
                dz.view(-1, p.shape[-1]),
                dp.reshape(-1, p.shape[-1]),
                p.view(-1, p.shape[-1]),
            )
            for rows, each in _in_blocks(flat_p, _per_row(alpha, p)):
                out[rows] = _pull_back(flat_dp[rows], flat_p[rows], each)
        return dz, _alpha_grad(ctx, dp, p, alpha), None, None


def _alpha_grad(ctx, dp: Tensor, p: Tensor, alpha: float | Tensor) -> Tensor | None:
    return _pull_back_alpha(dp, p, alpha) if ctx.needs_input_grad[1] and isinstance(alpha, Tensor) else None


class _Transformed(_Entmax):
    """With rules for torch.func and forward mode, which torch.compile refuses to see."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, dz: Tensor | None, dalpha: Tensor | None, *_: None) -> Tensor:
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
    """alpha-entmax along `dim`, for any alpha >= 1. Entries that are not allowed, and rows without any, get 0.

    A tensor alpha must broadcast against scores, with size 1 at `dim`, and may take a gradient. Where its values can't
    be looked at (compiled, under torch.func, on other devices than the CPU), those below 1 give NaN.
    """
    if isinstance(alpha, Tensor):
        alpha = per_row("entmax", "alpha", alpha, scores, dim)
    if dim not in (-1, scores.ndim - 1):
        alpha = alpha.movedim(dim, -1) if isinstance(alpha, Tensor) else alpha
        inner = None if allowed is None else allowed.movedim(dim, -1)
        return entmax(scores.movedim(dim, -1), alpha, allowed=inner).movedim(-1, dim)
    if isinstance(alpha, Tensor):
        alpha, known = bounded("entmax", "alpha", alpha, 1)
        low, high = (float(a) for a in alpha.detach().aminmax()) if known and alpha.numel() else (1.0, torch.inf)
    else:
        number("entmax", least=1, alpha=alpha)
        low = high = alpha = float(alpha)
    if scores.shape[-1] == 0:
        return scores
    if isinstance(alpha, float) and alpha == 1:
        return softmax(scores, allowed)
    return entmax_in(scores, alpha, allowed, newton=_NEWTON[0] <= low and high <= _NEWTON[1])


def entmax_in(
    scores: Tensor, alpha: float | Float[Tensor, "*#n 1"], allowed: Tensor | None, *, newton: bool = True
) -> Tensor:
    """`entmax` without a look at alpha, which lies in [1.01, 2] where `newton` says so, and else is >= 1."""
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    alpha = alpha.to(z.dtype) if isinstance(alpha, Tensor) else alpha
    kind = _Transformed if transformed(z, *([alpha] if isinstance(alpha, Tensor) else [])) else _Entmax
    return kind.apply(z.contiguous(), alpha, allowed, newton).to(scores.dtype)


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
        alpha: at least 1, which is softmax; the greater, the sparser. The authors' code has forms of its own for 1.5
            and 2.
    """

    def __init__(self, *, alpha: float = 1.5) -> None:
        super().__init__()
        number(self, least=1, alpha=alpha)
        self.alpha = float(alpha)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return entmax(scores, self.alpha, allowed=allowed)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

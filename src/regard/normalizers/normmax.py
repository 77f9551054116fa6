"""Normmax: weights that maximise score less alpha-norm: sparse, and ever more even.

Stationary points have p_s = |p| (z_s - tau)^(1 / (alpha - 1)) on the support, with |p| the alpha-norm, so that for the
conjugate exponent beta the beta-norm of max(z - tau, 0) is 1: one threshold, found by Newton's steps as entmax's is.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, number
from regard.normalizers._roots import Form, Knob, climb, shifted, solved_along
from regard.stages import Normalizer

CARD = Card(
    "normmax",
    equation="""p   = argmax over the simplex of p.z - (sum_s p_s^alpha)^(1 / alpha)
p_s = q_s / sum(q),   q_s = max(z_s - tau, 0)^(1 / (alpha - 1)),   tau the one number for which sum_s q_s^alpha = 1
dz  = e - p sum(e),   e_s = (p_s / |p|)^(2 - alpha) |p| (dp_s - sum(p dp)) / (alpha - 1) on the support, else 0""",
    papers=(
        Paper(
            "Hopfield-Fenchel-Young Networks: A Unified Framework for Associative Memory Retrieval",
            "Santos, Niculae, McNamee, Martins",
            2024,
            "2411.08590",
            "abstract; normmax_bisect of the entmax package (1.3)",
        ),
        Paper(
            "Learning with Fenchel-Young Losses",
            "Blondel, Martins, Niculae",
            2020,
            "1901.02324",
            "abstract; NormmaxBisectLoss of the entmax package (1.3)",
        ),
    ),
    traits=PLAIN | {"sparse"},
    cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
    claim="Exact zeros where softmax has none, and even weights on the rest as alpha grows: "
    "tests/normalizers/test_normmax.py::test_weights_grow_even_and_the_rest_is_exactly_zero.",
    differs=("tau is found by Newton steps instead of bisection.", "alpha may take a gradient too."),
    verified="third-party",
    defaults={"alpha": "code"},
)


def _solve(z: Tensor, alpha: Knob) -> Tensor:
    x = shifted(z)
    tiny = torch.finfo(x.dtype).tiny
    rest = (x - climb(x, alpha / (alpha - 1))).clamp(min=0)
    p = (rest / rest.amax(-1, keepdim=True).clamp(min=tiny)).pow(1 / (alpha - 1))
    return p / p.sum(-1, keepdim=True).clamp(min=tiny)


def alpha_norm(p: Float[Tensor, "*n S"], alpha: Knob) -> Float[Tensor, "*n 1"]:
    """(sum_s p_s^alpha)^(1 / alpha) of each row, whose powers are taken relative to the greatest; 0 of a row of 0."""
    top = p.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    total = torch.where(p > 0, torch.where(p > 0, p / top, 1).pow(alpha), 0).sum(-1, keepdim=True)
    return top * torch.where(total > 0, total, 1).pow(1 / alpha).masked_fill(total == 0, 0)


def _parts(p: Tensor, alpha: Knob) -> tuple[Tensor, Tensor, Tensor]:
    """Where the support is, q there and 1 elsewhere, and the norm."""
    support, norm = p > 0, alpha_norm(p, alpha)
    return support, torch.where(support, p / norm.clamp(min=torch.finfo(p.dtype).tiny), 1), norm


def _pull(dp: Tensor, p: Tensor, alpha: Knob) -> Tensor:
    support, q, norm = _parts(p, alpha)
    slope = torch.where(support, q.pow(2 - alpha), 0) * norm / (alpha - 1)
    e = slope * (dp - (p * dp).sum(-1, keepdim=True))
    return e - p * e.sum(-1, keepdim=True)


def _rate(p: Tensor, alpha: Tensor) -> Tensor:
    """dp / dalpha, by k = 1 / (alpha - 1), the power of z - tau."""
    support, q, norm = _parts(p, alpha)
    k = 1 / (alpha - 1)
    log_u = q.log() / k
    dtau = norm * torch.where(support, q.pow(alpha) * log_u, 0).sum(-1, keepdim=True) / (k + 1)
    dq = torch.where(support, q * log_u - k * q.pow(2 - alpha) * dtau, 0)
    return -(k**2) * norm * (dq - p * dq.sum(-1, keepdim=True))


_FORM = Form(_solve, _pull, _rate)


@checked()
def normmax(
    scores: Float[Tensor, "... S"],
    alpha: int | float | Float[Tensor, "..."] = 2.0,
    dim: int = -1,
    *,
    allowed: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "... S"]:
    """alpha-normmax along `dim`, for any alpha > 1. Entries that are not allowed, and rows without any, get 0.

    A tensor alpha must broadcast against scores, with size 1 at `dim`, and may take a gradient. Where its values can't
    be looked at (compiled, under torch.func, on other devices than the CPU), those of 1 and below give NaN.
    """
    return solved_along("normmax", _FORM, scores, dim, allowed, least=1, reached=False, alpha=alpha)


@CARD.fills("normalizer")
class Normmax(Normalizer):
    """alpha-normmax with one fixed alpha for all heads.

    Args:
        alpha: > 1; the greater, the more alike the weights that are not 0.
    """

    def __init__(self, *, alpha: float = 2.0) -> None:
        super().__init__()
        number(self, above=1, alpha=alpha)
        self.alpha = float(alpha)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return normmax(scores, self.alpha, allowed=allowed)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"

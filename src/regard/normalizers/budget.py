"""Budget sparsemax: weights from 0 to 1 that sum to a budget, for several keys in full."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, number
from regard.normalizers._roots import Form, Knob, halve, solved_along
from regard.stages import Normalizer

CARD = Card(
    "budget",
    equation="""p   = argmax over 0 <= p <= 1, sum_s p_s = b, of p.z - |p|^2 / 2
p_s = min(max(z_s - tau, 0), 1),   tau such that sum_s p_s = b; every key gets 1 where there are no more than b
dz  = dp - mean(dp) over the keys with 0 < p_s < 1, else 0""",
    papers=(
        Paper(
            "Hopfield-Fenchel-Young Networks: A Unified Framework for Associative Memory Retrieval",
            "Santos, Niculae, McNamee, Martins",
            2024,
            "2411.08590",
            "abstract; budget_bisect of the entmax package (1.3)",
        ),
    ),
    traits=PLAIN - {"normalised"} | {"sparse"},
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="A budget of b keys is spent on b keys where their scores stand out: "
    "tests/normalizers/test_budget.py::test_a_budget_is_spent_on_as_many_keys.",
    differs=("The budget may take a gradient too.",),
    verified="third-party",
    defaults={"budget": "code"},
)


def _solve(z: Tensor, budget: Knob) -> Tensor:
    """With z measured from the ceil(b)-th greatest, tau lies between -1, where that many have 1, and 0."""
    S = z.shape[-1]
    ordered = z.sort(-1, descending=True).values
    if isinstance(budget, Tensor):
        place = (budget.nan_to_num().ceil().long() - 1).clamp(0, S - 1).expand(*z.shape[:-1], 1)
        pivot = ordered.gather(-1, place)
    else:
        pivot = ordered[..., min(max(math.ceil(budget) - 1, 0), S - 1), None]
    # Rows with fewer allowed keys than the budget give each 1; their pivot is -inf, and any finite one would do.
    short = pivot == -torch.inf
    x = z - pivot.masked_fill(short, 0)
    tau = halve(torch.full_like(pivot, -1.0), 1.0, lambda at: (x - at).clamp(0, 1).sum(-1, keepdim=True) >= budget)
    inside = (x > tau) & (x < tau + 1)
    count = inside.sum(-1, keepdim=True)
    # One step from so near is exact, as the sum is a straight line between two keys.
    full = (x >= tau + 1).sum(-1, keepdim=True)
    exact = (torch.where(inside, x, 0).sum(-1, keepdim=True) + full - budget) / count.clamp(min=1)
    tau = torch.where(count > 0, exact, tau)
    p = torch.where(short, (z > -torch.inf).to(z.dtype), (x - tau).clamp(0, 1))
    none = budget * torch.zeros_like(p)  # NaN where the budget is
    return torch.where(torch.as_tensor(budget == 0, device=p.device), 0.0, p) + none


def _inside(p: Tensor) -> tuple[Tensor, Tensor]:
    """Where a change of tau changes p, and how many these are (at least 1)."""
    inside = ((p > 0) & (p < 1)).to(p.dtype)
    return inside, inside.sum(-1, keepdim=True).clamp(min=1)


def _pull(dp: Tensor, p: Tensor, budget: Knob) -> Tensor:
    inside, count = _inside(p)
    pulled = inside * dp
    return pulled - inside * (pulled.sum(-1, keepdim=True) / count)


def _rate(p: Tensor, budget: Tensor) -> Tensor:
    inside, count = _inside(p)
    return inside / count


_FORM = Form(_solve, _pull, _rate)


@checked()
def budget_sparsemax(
    scores: Float[Tensor, "... S"],
    budget: int | float | Float[Tensor, "..."] = 2.0,
    dim: int = -1,
    *,
    allowed: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "... S"]:
    """Weights from 0 to 1 along `dim` that sum to the budget, or are all 1 where no more keys are allowed.

    A tensor budget must broadcast against scores, with size 1 at `dim`, and may take a gradient. Where its values can't
    be looked at (compiled, under torch.func, on other devices than the CPU), those below 0 give NaN.
    """
    return solved_along("budget_sparsemax", _FORM, scores, dim, allowed, least=0, budget=budget)


@CARD.fills("normalizer")
class Budget(Normalizer):
    """Budget sparsemax with one budget for all heads.

    Args:
        budget: b > 0, what the weights of a query sum to.
    """

    def __init__(self, *, budget: float = 2.0) -> None:
        super().__init__()
        number(self, above=0, budget=budget)
        self.budget = float(budget)

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return budget_sparsemax(scores, self.budget, allowed=allowed)

    def extra_repr(self) -> str:
        return f"budget={self.budget}"

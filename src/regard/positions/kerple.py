"""KERPLE: scores fall with the logarithm of distance, by a trained kernel for each head."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, whole
from regard.positions._shared import distances, work_dtype
from regard.stages import Position, Rows

PAPERS = (
    Paper(
        "KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation",
        "Chi, Fan, Ramadge, Rudnicky",
        2022,
        "2205.09921",
        "eqs. 1-2; bounds and starting values from the authors' code",
    ),
)
DIFFERS = (
    "Eqs. 1-2 divide the kernel by sqrt(D) with the dot product; the authors' code adds it afterwards, and so do we, "
    "since the released r1 and its starting range mean that form (r1 here = r1 of the paper / sqrt(D)).",
    "The code clips the parameters themselves before each use; here the value used is clipped, and the gradient passes "
    "straight to the parameter.",
    "Each layer has its own parameters; the paper shares them among layers: `regard.share`.",
    "Left out: the weight kernel (section 5.3) and the three-parameter logarithm.",
)

CARD = Card(
    "kerple",
    equation="score[h,i,j] = q_i . k_j / sqrt(D) - r1[h] log(1 + r2[h] |i - j|),   r1, r2 > 0 trained",
    papers=PAPERS,
    traits=PLAIN - {"position_free"} | {"straight_through"},
    cost=Cost("2*B*H*T*S*D + 3*H*T*S", "2*S*G*D"),
    claim="The kernel is conditionally positive definite; in log form it flattens with distance: "
    "tests/positions/test_kerple.py::test_kernels_are_conditionally_positive_definite, "
    "tests/positions/test_kerple.py::test_log_flattens_with_distance.",
    differs=DIFFERS,
    verified="third-party",
    tasks=("text",),
)

POWER = Card(
    "kerple_power",
    equation="score[h,i,j] = q_i . k_j / sqrt(D) - r1[h] |i - j|^r2[h],   r1 > 0, 0 < r2 <= 2 trained",
    papers=PAPERS,
    gist="KERPLE's power kernel: scores fall with a trained power of distance, for each head.",
    traits=PLAIN - {"position_free"} | {"straight_through"},
    cost=Cost("2*B*H*T*S*D + 3*H*T*S", "2*S*G*D"),
    claim="The kernel is conditionally positive definite for r2 <= 2 and not beyond: "
    "tests/positions/test_kerple.py::test_kernels_are_conditionally_positive_definite, "
    "tests/positions/test_kerple.py::test_a_power_above_two_is_not_conditionally_positive_definite.",
    differs=DIFFERS,
    verified="third-party",
)

LEAST = 0.01
"""What r1 and r2 are kept above."""


def kerple_log(
    distance: Float[Tensor, "t s"], r1: Float[Tensor, " H"], r2: Float[Tensor, " H"]
) -> Float[Tensor, "H t s"]:
    """-r1 log(1 + r2 d)."""
    return -r1[:, None, None] * torch.log1p(r2[:, None, None] * distance)


def kerple_power(
    distance: Float[Tensor, "t s"], r1: Float[Tensor, " H"], r2: Float[Tensor, " H"]
) -> Float[Tensor, "H t s"]:
    """-r1 d^r2."""
    # pow, not exp(r2 log d): at d = 0 its derivative in r2 is 0, not NaN.
    return -r1[:, None, None] * distance.pow(r2[:, None, None])


def clip_straight_through(r: Tensor, least: float, most: float | None = None) -> Tensor:
    """r clipped to its bounds, with the gradient of r."""
    return r + (r.clamp(least, most) - r).detach()


@CARD.fills("position")
class Kerple(Position):
    """The logarithmic kernel for `num_heads` heads."""

    by_distance = True
    tied = ("r1", "r2")
    start = (2.0, 1.0)
    """r1 and r2 start uniform between 0 and these."""
    most: float | None = None
    """The upper bound of r2."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        self.num_heads = num_heads
        self.r1 = nn.Parameter(torch.empty(num_heads))
        self.r2 = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.r1, 0.0, self.start[0])
        nn.init.uniform_(self.r2, 0.0, self.start[1])

    def kernel(self, distance: Tensor, r1: Tensor, r2: Tensor) -> Float[Tensor, "H t s"]:
        return kerple_log(distance, r1, r2)

    def bias(self, rows: Rows) -> Float[Tensor, "1 H t s"]:
        fits(self, "B H t D", {"H": self.num_heads}, q=rows.q)
        work = work_dtype(rows.q)
        r1 = clip_straight_through(self.r1, LEAST).to(work)
        r2 = clip_straight_through(self.r2, LEAST, self.most).to(work)
        return self.kernel(distances(rows), r1, r2).to(rows.q.dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.num_heads}"


@POWER.fills("position")
class KerplePower(Kerple):
    """The power kernel for `num_heads` heads; r2 = 1 is ALiBi with trained slopes."""

    start = (1.0, 2.0)
    most = 2.0

    def kernel(self, distance: Tensor, r1: Tensor, r2: Tensor) -> Float[Tensor, "H t s"]:
        return kerple_power(distance, r1, r2)

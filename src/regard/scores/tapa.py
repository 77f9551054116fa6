"""Token-aware phase attention: some channels say how much, the rest how fast it swings with distance."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, fits, number, refuse, whole
from regard.kernels.problem import dots
from regard.stages import Rows, Score

CARD = Card(
    "tapa",
    equation="""q = (qA, qP),   k = (kA, kP):   the first theta D channels, and the others
score[i,j] = qA_i . kA_j / sqrt(theta D)  cos(2 pi |i - j|^alpha f(qP_i, kP_j))
phase = "quadratic":   f(q, k) = q . k / sqrt((1 - theta) D)
phase = "linear":      f(q, k) = sum_d (q_d + k_d) / sqrt((1 - theta) D)""",
    papers=(
        Paper(
            "Positional Encoding via Token-Aware Phase Attention",
            "Wang, Shen, Munos, Zhan, Tian",
            2025,
            "2509.12635",
            "sections 1-6 of the first version",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 3*B*H*T*S", "2*S*G*D"),
    claim="What random queries expect of keys like themselves is gone at any distance but 0, while scores swing as "
    "widely as before (theorems 3.2 and 3.3): "
    "tests/scores/test_tapa.py::test_scores_have_no_mean_at_a_distance_and_keep_their_spread.",
    differs=(
        "Inferred: the linear phase sums the phase channels alone; eq. 16 writes q and k, with the width of these.",
        "Another `scale` of the layer multiplies scores as it does elsewhere, 1 / sqrt(D) standing for the paper's 1.",
        "The paper shows decoders alone; distances are |i - j|, which serves both directions.",
        "Of the general form with any matrices and phase function (eq. 9) only these two are built.",
    ),
    verified="equation",
    tries={"theta": 0.25},
    defaults={"alpha": "paper, section 4.1", "theta": "paper, section 4.1", "phase": "paper, eq. 12"},
)

Phase = Literal["quadratic", "linear"]


def tapa_scores(
    q: Float[Tensor, "B H t D"],
    k: Float[Tensor, "B G s D"],
    distance: Float[Tensor, "t s"],
    *,
    alpha: float = 0.1,
    amplitude: int,
    phase: Phase = "quadratic",
) -> Float[Tensor, "B H t s"]:
    """Amplitudes times cosines of phases (eq. 12), in at least float32; distance 0 has phase 0.

    Args:
        amplitude: theta D, how many of the first channels say how much.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, width = q.to(wide), k.to(wide), q.shape[-1] - amplitude
    qp, kp = q[..., amplitude:], k[..., amplitude:]
    if phase == "quadratic":
        f = dots(qp, kp)
    else:
        f = qp.sum(-1)[..., None] + kp.sum(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)[..., None, :]
    turns = distance.to(wide).pow(alpha) * (2 * math.pi / math.sqrt(width))
    return dots(q[..., :amplitude], k[..., :amplitude]) * (turns * f).cos() / math.sqrt(amplitude)


@CARD.fills("score")
class TokenAwarePhase(Score):
    """Dot products of some channels, which swing with distance as fast as the other channels say. No parameters.

    Source: https://arxiv.org/abs/2509.12635, section 3.

    Args:
        head_dim: D.
        alpha: > 0; with 0.1 phases double between neighbours and 1000 tokens.
        theta: the part of the channels, the first ones, whose product is the amplitude; theta D must be a whole number
            from 1 to D - 1.
        phase: whether phases are products of the other channels, or their sums.

    Raises:
        ValueError: options out of range, or a theta that cuts a channel.
    """

    def __init__(self, head_dim: int, *, alpha: float = 0.1, theta: float = 0.5, phase: Phase = "quadratic") -> None:
        super().__init__()
        whole(self, 2, head_dim=head_dim)
        number(self, above=0, alpha=alpha)
        number(self, above=0, below=1, theta=theta)
        choice(self, get_args(Phase), phase=phase)
        self.head_dim, self.alpha, self.theta, self.phase = head_dim, alpha, theta, phase
        self.amplitude = round(theta * head_dim)
        if abs(self.amplitude - theta * head_dim) > 1e-6 or not 0 < self.amplitude < head_dim:
            what = f"cuts no whole number of {head_dim} channels"
            refuse(self, "theta", what, theta, f"one of n / {head_dim}, n from 1 to {head_dim - 1}")

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        fits(self, "B H t D", {"D": self.head_dim}, q=rows.q)
        distance = (rows.i.unsqueeze(-1) - rows.j).abs()
        made = tapa_scores(rows.q, rows.k, distance, alpha=self.alpha, amplitude=self.amplitude, phase=self.phase)
        return made * (scale * self.head_dim**0.5)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, alpha={self.alpha:g}, theta={self.theta:g}, phase={self.phase!r}"

"""CoCA: keys point where each query does, pair by pair, so that a score is greatest at its own place."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, fits, refuse
from regard.positions._shared import work_dtype
from regard.positions.rotary import Rotary
from regard.positions.rotary_scaling import DynamicNTK, Linear

CARD = Card(
    "coca",
    equation="""t = relu((u_a + u_{a+D/2}) / 2),   u = W_k x;   T = [t, t];   the key of j for query i: k_ij = q_i * T_j
form = "exact":    score = R(i) q_i . R(j) k_ij / sqrt(D) = 1/sqrt(D) sum_a t_ja |q_ia|^2 cos((i - j) w_a)
form = "strict":   the same of queries [m, m], m_a = (q_a + q_{a+D/2}) / 2
form = "slack":    score = (q_i * R(i) q_i) . R(j) T_j / sqrt(D)
|q_ia|^2 = q_a^2 + q_{a+D/2}^2,   w_a = base^(-2a/D),   R turns pairs (a, a + D/2) as rotary does""",
    papers=(
        Paper(
            "CoCA: Fusing Position Embedding with Collinear Constrained Attention in Transformers for Long Context "
            "Window Extending",
            "Zhu, Ye, Jiang, Xue, Zhang, Wu, Li",
            2023,
            "2309.08646",
            "sections 1-5, appendices B-D; official code for LLaMA and GPT-NeoX; first title: Cure the headache of "
            "Transformers via Collinear Constrained Attention",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 5*(B*H*T*D + B*G*S*D)", "2*S*G*D"),
    claim="Of equal tokens a query prefers the one at its own place, however it was projected: "
    "tests/positions/test_coca.py::test_of_equal_tokens_the_own_place_scores_most.",
    differs=(
        "Theorem 1 calls exact and slack equal under q_2j = q_2j+1, and that condition redundant. It is not: without "
        "it slack is another score, which depends on where both tokens stand. The released code, and with it the "
        "paper's main tables, are slack; its definition (eqs. 7-9) is exact.",
        "The exact form makes no T x S x D keys, as the paper fears it would: it is a product of vectors of width D.",
        "Pairs are (a, a + D/2) and t is the mean of the two halves before the relu, as in the code; the paper has "
        "neighbours, says that t is halved and doubled, and leaves out 1 / sqrt(D).",
        "How strict queries are made is not said; here as t is.",
        "`partial_rotary_factor` is of slack alone: the code halves t over all channels, so that the two channels of a "
        "turned pair then have different t.",
    ),
    verified="third-party",
    exceptions={
        "L14 scale": "scores are of second degree in the query (eq. 9), so 4 q with k / 4 scores four times as much",
        "L2 float16_precision": "scores are of second degree in the query, so that its rounding to fp16 counts twice",
    },
    tries={
        "scaling": {"scaling": "linear", "factor": 4.0},
        "factor": {"scaling": "linear", "factor": 2.0},
        "original_max": {"scaling": "dynamic", "original_max": 4, "factor": 2.0, "head_dim": 8},
        "partial_rotary_factor": {"form": "slack", "partial_rotary_factor": 0.5},
    },
    defaults={
        "form": "paper, section 2.3, eq. 9",
        "base": "paper, section 2.1",
        "scaling": "paper, section 2.3",
        "factor": "ours, as nothing is scaled",
        "original_max": "paper, section 4, models trained at length 512",
        "partial_rotary_factor": "paper, section 2.3",
    },
)

Form = Literal["exact", "slack", "strict"]
Scaling = Literal["linear", "dynamic"]


def coefficients(u: Float[Tensor, "*b D"]) -> Float[Tensor, "*b half"]:
    """t >= 0 of each pair: what a key is, in units of the query that asks."""
    first, second = u.chunk(2, -1)
    return ((first + second) / 2).relu()


class Collinear(Rotary):
    """Makes of queries and of `k_proj`'s outputs what scores as collinear keys do. No parameters.

    Source: https://arxiv.org/abs/2309.08646, sections 2.3 and 2.4.

    Args:
        head_dim: D, even.
        form: which of the three scores.
        base, scaling, partial_rotary_factor: as of `Rotary`; only `slack` turns a part of the channels.

    Raises:
        ValueError: options out of range, or a part of the channels in another form.
    """

    def __init__(self, head_dim: int, *, form: Form = "exact", **rotary: Any) -> None:
        choice(self, get_args(Form), form=form)
        super().__init__(head_dim, **rotary)
        if form != "slack" and self.rotary_dim != head_dim:
            got = f"{self.partial_rotary_factor:g} and {form!r}"
            refuse(self, "partial_rotary_factor", "turns part of the channels", got, "1, or form='slack'")
        self.form = form

    def turn(
        self, q: Tensor, k: Tensor, at: Int[Tensor, "*b T"], keys: Int[Tensor, "*b S"]
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G S D"]]:
        fits(self, "B H T D", {"D": self.head_dim}, q=q)
        fits(self, "B H T D", {"D": self.head_dim}, k=k)
        dtype, q, t = q.dtype, q.to(work_dtype(q)), coefficients(k.to(work_dtype(k)))
        if self.form == "slack":
            ours, theirs = q * self._turned(q, at), torch.cat((t, t), -1)
        else:
            first, second = q.chunk(2, -1)
            if self.form == "strict":
                first = second = (first + second) / 2
            length = first.square() + second.square()
            ours, theirs = self._turned(torch.cat((length, 0 * length), -1), at), torch.cat((t, 0 * t), -1)
        return ours.to(dtype), self._turned(theirs, keys).to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}"


@CARD.fills("position")
def coca(
    head_dim: int,
    *,
    form: Form = "exact",
    base: float = 10000.0,
    scaling: Scaling | None = None,
    factor: float = 1.0,
    original_max: int = 512,
    partial_rotary_factor: float = 1.0,
) -> Collinear:
    """A collinear part, its angles scaled or not.

    Args:
        form: "exact" is the paper's definition, "slack" the released code, "strict" exact with equal halves of queries.
        base: of the geometric frequencies.
        scaling: "linear" divides positions by `factor`; "dynamic" enlarges the base with the length at hand, from
            `original_max` tokens on, and can't stream.
        factor: s >= 1; nothing without `scaling`.
        original_max: nothing without scaling="dynamic".
        partial_rotary_factor: the part of the channels that turns, of "slack".
    """
    choice("coca", (*get_args(Scaling), None), scaling=scaling)
    stretched = None
    if scaling is not None:
        stretched = Linear(factor) if scaling == "linear" else DynamicNTK(factor, original_max)
    return Collinear(head_dim, form=form, base=base, scaling=stretched, partial_rotary_factor=partial_rotary_factor)

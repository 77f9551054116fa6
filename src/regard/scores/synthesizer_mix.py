"""A mixture of Synthesizers, and of plain dot products: their scores, weighed by learned numbers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import choice, refuse, whole
from regard.scores.synthesizer import (
    DIFFERS,
    LACKS,
    PAPER,
    SUPPORTS,
    TRAITS,
    SynthesizerDense,
    SynthesizerDenseFactorized,
    widened,
)
from regard.scores.synthesizer_random import SynthesizerRandom, SynthesizerRandomFactorized
from regard.stages import Rows, Score

CARD = Card(
    "synthesizer_mix",
    equation="""score = sum_k alpha_k score_k,   alpha = softmax(a)      a: one number for each of `parts`, at first 0
score_k: q . k / sqrt(D), or that of a Synthesizer""",
    papers=(PAPER,),
    supports=SUPPORTS,
    lacks=LACKS,
    traits=TRAITS,
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="All weight on a part is that part alone, a table or plain attention, and training shifts it to what a task "
    "asks for: tests/scores/test_synthesizer.py::test_a_mixture_learns_which_part_a_task_asks_for.",
    differs=(
        DIFFERS[0],
        "Without dot products the layer's map of keys is there and not read.",
        "Weights are a softmax of as many numbers, by account alone; the authors' code has the sigmoid of one for two "
        "parts, which starts as evenly, and a form that adds them unweighed.",
    ),
    verified="reconstructed",
    example={"max_length": 80},
    tries={"max_length": 90, "parts": ("dot", "dense", "random_fixed")},
    defaults={"parts": "code", "max_length": "code"},
)

PARTS = ("dot", "dense", "random", "random_fixed", "dense_factorized", "random_factorized")


@CARD.fills("score")
class SynthesizerMix(Score):
    """Weighed sums of scores, by numbers that all heads share.

    Args:
        parts: at least one of "dot" (plain scores), "dense", "random", "random_fixed", "dense_factorized" and
            "random_factorized", each with the defaults of its own mechanism.
        max_length: N, the most tokens.
    """

    placed = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        parts: Sequence[str] = ("random", "dot"),
        max_length: int = 512,
    ) -> None:
        super().__init__()
        if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
            refuse(self, "parts", "are no names of parts", repr(parts), f"some of {', '.join(PARTS)}")
        for part in parts:
            choice(self, PARTS, parts=part)
        size: dict[str, Any] = {"max_length": max_length}
        whole(self, **size)
        build: dict[str, Any] = {
            "dense": lambda: SynthesizerDense(dim, num_heads, head_dim, **size),
            "random": lambda: SynthesizerRandom(num_heads, **size),
            "random_fixed": lambda: SynthesizerRandom(num_heads, **size, trained=False),
            "dense_factorized": lambda: SynthesizerDenseFactorized(num_heads, head_dim, **size),
            "random_factorized": lambda: SynthesizerRandomFactorized(num_heads, **size),
        }
        self.names, self.max_length = tuple(parts), max_length
        self.needs = frozenset({"scores"}) if "dot" in parts else frozenset()
        self.scores = nn.ModuleList(build[part]() for part in parts if part != "dot")
        self.logits = nn.Parameter(torch.empty(len(parts)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All parts count alike."""
        nn.init.zeros_(self.logits)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        others = iter(self.scores)
        made = widened(*(rows.scores if name == "dot" else next(others)(rows, scale) for name in self.names))
        alpha = widened(self.logits)[0].softmax(0).to(made[0].dtype)
        out = alpha[0] * made[0]
        for share, z in zip(alpha[1:], made[1:], strict=True):
            out = out + share * z
        return out

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}, max_length={self.max_length}"

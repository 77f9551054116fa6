"""Soft-capped scores: a smooth bound, c tanh(score / c), that no score exceeds."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number
from regard.stages import Mix, Rows
from regard.weights import Loaded

CARD = Card(
    "soft_cap",
    equation="""A = softmax(mask(c tanh(P / c))) v,   P = scale q k^T + bias""",
    papers=(
        Paper(
            "Gemma 2: Improving Open Language Models at a Practical Size",
            "Gemma Team",
            2024,
            "2408.00118",
            "recalled; transformers' code",
        ),
    ),
    traits={"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"},
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="However long queries and keys grow, no key's weight passes another's by more than a factor e^(2 c): "
    "tests/scores/test_soft_cap.py::test_no_key_takes_all.",
    differs=("A bias, where there is one, is capped with the score; the models that cap have none.",),
    verified="third-party",
    example={"cap": 1.0},
    defaults={"cap": "code, Gemma 2 in transformers"},
)


def soft_cap(scores: Float[Tensor, "*n"], cap: float) -> Float[Tensor, "*n"]:
    """c tanh(s / c): close to s where s is small against c, and never beyond c."""
    return cap * torch.tanh(scores / cap)


@CARD.fills("score_mix")
class SoftCap(Mix):
    """Bounds every score, after scale and bias and before the mask. No parameters. Kernels that can do it themselves.

    Args:
        cap: c > 0.
    """

    def __init__(self, *, cap: float = 50.0) -> None:
        super().__init__()
        number(self, above=0, cap=cap)
        self.cap = float(cap)

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        assert self.cap is not None
        return soft_cap(z, self.cap)

    def extra_repr(self) -> str:
        return f"cap={self.cap}"


@CARD.loads("transformers", "Gemma2Attention", "VaultGemmaAttention")
def _gemma(theirs: Any) -> Loaded | None:
    cap = theirs.attn_logit_softcapping
    return Loaded(lambda: SoftCap(cap=cap)) if cap is not None else None

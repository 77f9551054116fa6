"""Learnable temperatures: every head sharpens or flattens its attention, query position by query position.

    a_ij = softmax_j(q_i . k_j / (t_hi sqrt(D)))        t_hi > 1 flattens, t_hi < 1 sharpens

Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs" (https://arxiv.org/abs/2501.03489): section 4 read. It
gives a model whose softmax is the only nonlinearity the means to set the entropies that `entropy_regularizer` asks for.
Differs from the paper: temperatures start at 1, plain attention, where 0.01 and 0.1 are printed (what they scale is not
said, and the code is not public); queries beyond the table share its last entry.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import FEATURES, Card, Cost, Paper, register
from regard.shapes import HeadShape
from regard.stages import Mix, Rows


class HeadTemperature(Mix):
    """Divides scores by a temperature for each head and query position.

    Args:
        num_heads: H.
        max_length: how many query positions have a temperature of their own.
        start: every temperature's first value.
    """

    def __init__(
        self,
        num_heads: int,
        max_length: int,
        *,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or max_length < 1 or start <= 0:
            raise ValueError(
                f"HeadTemperature: num_heads and max_length must be at least 1 and start positive (got {num_heads}, "
                f"{max_length}, {start})"
            )
        self.start = start
        self.temperature = nn.Parameter(torch.empty(num_heads, max_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, self.start)

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        place = rows.i.clamp(0, self.temperature.shape[1] - 1)
        return z / self.temperature[:, place, None].to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.temperature.shape[0]}, {self.temperature.shape[1]}"


def _slots(shape: HeadShape, *, max_length: int = 1024, start: float = 1.0) -> dict[str, object]:
    return {"score_mix": HeadTemperature(shape.num_heads, max_length, start=start)}


CARD = register(
    Card(
        name="entropy_temperature",
        family="training",
        gist="A learnable temperature for every head and query position.",
        equation="a_ij = softmax_j(q_i . k_j / (t_hi sqrt(D)))",
        paper=Paper(
            "Entropy-Guided Attention for Private LLMs",
            "Jha, Reagen",
            2025,
            "2501.03489",
            "section 4",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=frozenset({"normalised", "nonnegative", "linear_in_values"}),
        cost=Cost("2*B*H*T*S*D + B*H*T*S", "2*S*G*D"),
        claim="A greater temperature is a greater entropy: tests/training/test_entropy.py.",
        differs=("Temperatures start at 1; queries beyond the table share its last entry.",),
        example={"max_length": 16},
    )
)

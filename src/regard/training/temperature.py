"""Learnable temperatures: every head sharpens or flattens its attention, position by position.

They give a model whose softmax is the only nonlinearity the means to set the entropies that a regulariser asks for.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import number, whole
from regard.stages import Mix, Rows

CARD = Card(
    "entropy_temperature",
    equation="a_ij = softmax_j(q_i . k_j / (t_hi sqrt(D))),   t_hi > 1 flattens, t_hi < 1 sharpens",
    papers=(Paper("Entropy-Guided Attention for Private LLMs", "Jha, Reagen", 2025, "2501.03489", "section 4"),),
    traits={"normalised", "nonnegative", "linear_in_values"},
    cost=Cost("2*B*H*T*S*D + B*H*T*S", "2*S*G*D"),
    claim="A greater temperature is a greater entropy: "
    "tests/training/test_entropy.py::test_a_temperature_of_one_changes_nothing_and_a_greater_one_flattens.",
    differs=(
        "Temperatures start at 1, plain attention, where 0.01 and 0.1 are printed (what they scale is not said, and "
        "the code is not public).",
        "Queries beyond the table share its last entry.",
    ),
    example={"max_length": 16},
    defaults={"max_length": "ours", "start": "ours, plain attention; the paper prints 0.01 and 0.1"},
)


@CARD.fills("score_mix")
class HeadTemperature(Mix):
    """Divides scores by a temperature for each head and query position.

    Args:
        num_heads: H.
        max_length: T, how many query positions have a temperature of their own. The default is this library's.
        start: every temperature's first value.
    """

    def __init__(self, num_heads: int, *, max_length: int = 1024, start: float = 1.0) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, max_length=max_length)
        number(self, above=0, start=start)
        self.start = start
        self.temperature = nn.Parameter(torch.empty(num_heads, max_length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.temperature, self.start)

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        place = rows.i if rows.positions is None else rows.positions
        each = self.temperature.T[place.clamp(0, self.temperature.shape[1] - 1)].mT  # (H, t), or (B, H, t)
        return z / each[..., None].to(z.dtype)

    def extra_repr(self) -> str:
        return f"{self.temperature.shape[0]}, max_length={self.temperature.shape[1]}"

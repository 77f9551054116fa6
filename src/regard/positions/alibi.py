"""ALiBi: each head's scores fall linearly with distance, at a fixed slope of its own."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, whole
from regard.positions._shared import distances, work_dtype
from regard.stages import Position, Rows
from regard.weights import Loaded

CARD = Card(
    "alibi",
    equation="""score[h,i,j] = q_i . k_j / sqrt(D) - m[h] |i - j|,   m[h] = 2^(-8h/H), h = 1 .. H
H no power of two: the slopes of the largest power of two P <= H, then of 2P heads' those of h = 1, 3, 5 ..""",
    papers=(
        Paper(
            "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
            "Press, Smith, Lewis",
            2021,
            "2108.12409",
            "section 3, in quotations; the authors' code",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + B*H*T*S", "2*S*G*D"),
    claim="Positions matter through distance only; with q = k = 0 weights are geometric in m: "
    "tests/positions/test_alibi.py::test_without_content_weights_are_geometric.",
    differs=(
        "Bidirectional attention uses |i - j|, the authors' answer for encoders; the paper itself defines the causal "
        "case only.",
        "Padded keys keep their place: distances count tokens, masked or not.",
    ),
    verified="third-party",
    exceptions={
        "L11 order_of_heads_is_free": "slopes belong to the heads' order by definition, so heads can't be permuted"
    },
)


def alibi_slopes(
    num_heads: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " H"]:
    """m[h] for every head; not sorted where H is no power of two."""
    power = 1 << (num_heads.bit_length() - 1)
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64
    regular = torch.arange(1, power + 1, device=device, dtype=wide) * (-8 / power)
    between = (2 * torch.arange(num_heads - power, device=device, dtype=wide) + 1) * (-4 / power)
    return torch.exp2(torch.cat((regular, between))).to(dtype)


@CARD.fills("position")
class Alibi(Position):
    """Adds -m[h] |i - j| to the scaled scores of `num_heads` heads. No parameters."""

    by_distance = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
        self.num_heads = num_heads

    def bias(self, rows: Rows) -> Float[Tensor, "1 H t s"]:
        fits(self, "B H t D", {"H": self.num_heads}, q=rows.q)
        slopes = alibi_slopes(self.num_heads, device=rows.q.device, dtype=work_dtype(rows.q))
        # Not the shifted form +m j: that is equal under causal softmax, but large, and loses digits in half
        # precision.
        return (-slopes[:, None, None] * distances(rows)).to(rows.q.dtype).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"{self.num_heads}"


@CARD.loads("transformers", "BloomAttention")
def _bloom(theirs: Any) -> Loaded:
    """Bloom adds +m j, which is the same under causal softmax."""
    return Loaded(lambda: Alibi(theirs.num_heads))


@CARD.loads("transformers", "MptAttention")
def _mpt(theirs: Any) -> Loaded:
    """The layer is handed -m (i - j), or a line that is the same under causal softmax."""
    return Loaded(lambda: Alibi(theirs.n_heads))

"""Random Synthesizer: scores are a table of two places, the same whatever stands there."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import fits, flag, whole
from regard.scores.synthesizer import DIFFERS, LACKS, PAPER, SUPPORTS, TRAITS, UNREAD, UNSCALED, glorot, inside, widened
from regard.stages import Rows, Score

LEANER = "`factored` with normalizer='softmax' is the same layer without maps of queries and keys."

EXCEPTIONS = UNREAD | UNSCALED

CARD = Card(
    "synthesizer_random",
    equation="score[i, j] = R[i, j]      for each head, i, j < max_length; trained, not scaled",
    papers=(PAPER,),
    supports=SUPPORTS,
    lacks=LACKS,
    traits=TRAITS,
    cost=Cost("B*H*T*S*D", "2*S*G*D"),
    claim="Weights are the same for every input: "
    "tests/scores/test_synthesizer.py::test_weights_do_not_depend_on_the_input.",
    differs=(DIFFERS[0], "The layer's maps of queries and keys are there and not read; the paper has none.", LEANER),
    exceptions=EXCEPTIONS,
    verified="reconstructed",
    example={"max_length": 80},
    tries={"max_length": 90},
    defaults={"max_length": "code", "trained": "paper"},
)


@CARD.fills("score")
class SynthesizerRandom(Score):
    """A table of scores for each head.

    Args:
        max_length: N, the most tokens.
        trained: whether the table is a parameter; else it stays as it was drawn.
    """

    placed = True

    def __init__(self, num_heads: int, *, max_length: int = 512, trained: bool = True) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, max_length=max_length)
        flag(self, trained=trained)
        self.num_heads, self.max_length = num_heads, max_length
        table = torch.empty(num_heads, max_length, max_length)
        if trained:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.trained = trained
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform; a table that is never trained in few digits, so that no dtype changes it."""
        glorot(self.table)
        if not self.trained:
            self.table.copy_(self.table.bfloat16())

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        inside(self, rows, self.max_length)
        fits(self, "B H t D", {"H": self.num_heads}, q=rows.q)
        (table,) = widened(self.table[:, rows.i[:, None], rows.j])
        return table.expand(len(rows.q), -1, -1, -1)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_length={self.max_length}"


FIXED = CARD.variant(
    "synthesizer_random_fixed",
    "Fixed random Synthesizer: scores are a table of two places, as it was drawn.",
    preset={"trained": False},
    equation="score[i, j] = R[i, j]      for each head, i, j < max_length; never trained, not scaled",
    exceptions=EXCEPTIONS,
)

FACTORIZED = Card(
    "synthesizer_random_factorized",
    equation="score[i, j] = r_i . s_j      for each head, i, j < max_length; r, s of `rank` numbers; not scaled",
    papers=(PAPER,),
    gist="Factorized random Synthesizer: scores are a table of low rank, the same whatever stands there.",
    supports=SUPPORTS,
    lacks=LACKS,
    traits=TRAITS,
    cost=Cost("H*T*S*rank + B*H*T*S*D", "2*S*G*D"),
    claim="Weights are the same for every input, of scores of low rank: "
    "tests/scores/test_synthesizer.py::test_a_factorized_table_has_low_rank.",
    differs=(DIFFERS[0], "The layer's maps of queries and keys are there and not read; the paper has none."),
    exceptions=EXCEPTIONS,
    verified="reconstructed",
    example={"max_length": 80, "rank": 3},
    tries={"max_length": 90},
    defaults={"max_length": "code", "rank": "paper, by account alone; code has 16"},
)


@FACTORIZED.fills("score")
class SynthesizerRandomFactorized(Score):
    """A table of scores for each head that is a product of two thin ones.

    Args:
        max_length: N, the most tokens.
        rank: numbers of each place.
    """

    placed = True

    def __init__(self, num_heads: int, *, max_length: int = 512, rank: int = 8) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, max_length=max_length, rank=rank)
        self.num_heads, self.max_length, self.rank = num_heads, max_length, rank
        self.asking, self.asked = (nn.Parameter(torch.empty(num_heads, max_length, rank)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot uniform, both."""
        glorot(self.asking)
        glorot(self.asked)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        inside(self, rows, self.max_length)
        fits(self, "B H t D", {"H": self.num_heads}, q=rows.q)
        asking, asked = widened(self.asking[:, rows.i], self.asked[:, rows.j])
        return (asking @ asked.mT).expand(len(rows.q), -1, -1, -1)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_length={self.max_length}, rank={self.rank}"

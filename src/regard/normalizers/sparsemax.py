"""Sparsemax: scores projected onto the simplex, which is a sparse, piecewise linear softmax."""

from regard.cards import PLAIN, Card, Cost, Paper
from regard.normalizers.entmax import Entmax

CARD = Card(
    "sparsemax",
    equation="""p   = argmin over the simplex of |p - z|^2, the Euclidean projection
p_s = max(z_s - tau, 0),   tau the one number for which sum_s p_s = 1""",
    papers=(
        Paper(
            "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
            "Martins, Astudillo",
            2016,
            "1602.02068",
            "official code",
        ),
    ),
    traits=PLAIN | {"sparse"},
    cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
    claim="Exact zeros where softmax has none: "
    "tests/normalizers/test_entmax.py::test_weights_are_exactly_zero_where_softmax_has_none.",
    verified="third-party",
)


@CARD.fills("normalizer")
class Sparsemax(Entmax):
    """Entmax with alpha = 2, where the search for tau ends exactly."""

    def __init__(self) -> None:
        super().__init__(alpha=2.0)

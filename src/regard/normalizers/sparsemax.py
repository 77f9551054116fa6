"""Sparsemax: the Euclidean projection of the scores onto the simplex, 2-entmax.

    p = argmin over the simplex of |p - z|^2,   p_s = max(z_s - tau, 0),   sum_s p_s = 1

Martins, Astudillo 2016, https://arxiv.org/abs/1602.02068 (equations as the authors' released code has them;
text not read).
"""

from regard._former import FEATURES, PLAIN, Card, Cost, Paper, register
from regard.normalizers.entmax import Entmax
from regard.shapes import HeadShape


class Sparsemax(Entmax):
    """Entmax with alpha = 2, where the search for tau ends exactly."""

    def __init__(self) -> None:
        super().__init__(alpha=2.0)


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"normalizer": Sparsemax()}


CARD = register(
    Card(
        name="sparsemax",
        family="normalizers",
        gist="Projects the scores onto the simplex: a sparse, piecewise linear softmax.",
        equation="p_s = max(z_s - tau, 0),  sum_s p_s = 1",
        paper=Paper(
            "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
            "Martins, Astudillo",
            2016,
            "1602.02068",
            "official code",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=PLAIN | {"sparse"},
        cost=Cost("2*B*H*T*S*D + 8*B*H*T*S", "2*S*G*D"),
        claim="Exact zeros where softmax has none: tests/normalizers/test_entmax.py.",
        verified="third-party",
    )
)

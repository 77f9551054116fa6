"""Threshold relative attention: keys with a score of 0 or less are gone, and distances count only what is left."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import FEATURES, PLAIN, Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, tokens, whole
from regard.normalizers.softmax import softmax
from regard.positions._shared import work_dtype
from regard.stages import HeadMap, Made, Normalizer, Position, Rows, Stage, Tokens

CARD = Card(
    "tra",
    equation="""s[i,j] = q_i . k_j / sqrt(D),   q and k over their root mean square
alive[i,j] = s[i,j] > 0,   c[i,j] = sum_{l=j..i} alive[i,l],   delta_i = log sigmoid(w_h . x_i + b_h)
A = softmax_j(s + delta_i c) over the alive, 0 elsewhere; a row without any gives 0""",
    papers=(
        Paper(
            "TRA: Better Length Generalisation with Threshold Relative Attention",
            "Opper et al.",
            2025,
            "2503.23174",
            "abstract; introduction; the authors' workshop notebook; not the equations",
        ),
    ),
    supports=FEATURES - {"bidirectional", "cross"},
    traits=PLAIN - {"normalised", "position_free"} | {"sparse", "routed"},
    cost=Cost("2*B*H*T*S*D + B*T*M*H", "2*S*G*D"),
    claim="Keys that don't matter, however many, change nothing, nor what distance does: "
    "tests/positions/test_tra.py::test_keys_that_do_not_matter_change_nothing.",
    differs=(
        "Dropout is of weights, as everywhere; the notebook drops scores, at a rate of 0.01.",
        "The output projection has a bias only where all have one.",
        "Inferred: alone, the threshold has no distances, and distances count all earlier keys.",
        "The notebook's norms around the layer are the host model's.",
    ),
    verified="third-party",
    defaults={"parts": "code", "eps": "code"},
)

Parts = Literal["both", "threshold", "distance"]


def surviving(
    scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None, threshold: bool = True
) -> Bool[Tensor, "B H t S"]:
    """The keys that are left: those allowed, with a score above 0 where there is a threshold."""
    alive = scores > 0 if threshold else torch.ones_like(scores, dtype=torch.bool)
    return alive if allowed is None else alive & allowed


def counted(alive: Bool[Tensor, "*b S"]) -> Float[Tensor, "*b S"]:
    """How many are left from each key on, itself among them."""
    return alive.to(torch.float32).flip(-1).cumsum(-1).flip(-1)


class ContextualDecay(Position):
    """What a query's own rate of forgetting takes from a key for each that is left from there on.

    Args:
        dim: M, of the tokens that rates are read from.
        num_heads: H.
        parts: whether scores of 0 or less are cut ("threshold"), distances counted ("distance"), or both.
    """

    sees = "rows"
    needs = frozenset({"scores"})

    def __init__(self, dim: int, num_heads: int, *, parts: Parts = "both") -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        choice(self, get_args(Parts), parts=parts)
        self.parts = parts
        self.proj = None if parts == "threshold" else nn.Linear(dim, num_heads)

    def prepare(self, given: Tokens) -> Made:
        if self.proj is None:
            return Made()
        tokens(self, "x", given.x, self.proj.in_features)
        rate = self.proj(given.x)
        return Made(query=F.logsigmoid(rate.to(work_dtype(rate))).mT[..., None])

    def bias(self, rows: Rows) -> Float[Tensor, "B H t S"]:
        alive = surviving(rows.scores, rows.allowed, self.parts != "distance")
        bias = torch.zeros_like(rows.scores)
        if self.proj is not None:
            rate = rows.made.query
            if rate is None:
                told = "what prepare gives, as regard.Attention asks"
                refuse(self, "rows", "holds nothing made of the tokens", None, told)
            bias = rate * counted(alive).to(rate.dtype)
        return bias if self.parts == "distance" else bias.masked_fill(~alive, -torch.inf)


class RootMeanSquare(HeadMap):
    """Queries and keys over their root mean square, without a learned weight.

    Args:
        eps: under the root.
    """

    def __init__(self, *, eps: float = 1e-6) -> None:
        super().__init__()
        number(self, least=0, eps=eps)
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.normed(q), self.normed(k), v

    def normed(self, z: Float[Tensor, "B h T D"]) -> Float[Tensor, "B h T D"]:
        wide = z.to(work_dtype(z))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(z.dtype)


class SurvivorSoftmax(Normalizer):
    """Softmax for rows in which every score may be -inf; they get 0."""

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return softmax(scores, allowed)


@CARD.fills()
def tra(dim: int, num_heads: int, *, parts: Parts = "both", eps: float = 1e-6) -> dict[str, HeadMap | Stage]:
    """Normed queries and keys, the threshold with the distances, and a softmax of what is left.

    Args:
        dim, num_heads: of the layer.
        parts: as of `ContextualDecay`.
        eps: of the norm.
    """
    return {
        "heads": RootMeanSquare(eps=eps),
        "position": ContextualDecay(dim, num_heads, parts=parts),
        "normalizer": SurvivorSoftmax(),
    }

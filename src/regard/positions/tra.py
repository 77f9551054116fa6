"""Threshold relative attention: low scores are removed, and distance counts only keys that stay."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, flag, number, refuse, tokens, whole
from regard.heads.qk_norm import normalised
from regard.normalizers.softmax import softmax
from regard.positions._shared import work_dtype
from regard.stages import HeadMap, Made, Normalizer, Position, Rows, Tokens

CARD = Card(
    "tra",
    equation="""q <- q / sqrt(mean_d(q^2) + 1e-6),   k likewise,   s[i,j] = q_i . k_j / sqrt(D)
stays[i,j] = allowed[i,j] and s[i,j] > threshold
c[i,j] = how many keys from j on stay with query i, j included         (causally those from j to i)
score[i,j] = s[i,j] + c[i,j] log sigmoid(w_h . x_i + b_h) where stays, else -inf;   softmax, 0 where no key stays
so that the weight of key j goes as sigmoid(w_h . x_i + b_h)^c[i,j] exp(s[i,j])""",
    papers=(
        Paper(
            "TRA: Better Length Generalisation with Threshold Relative Attention",
            "Opper, Fernandez, Smolensky, Gao",
            2025,
            "2503.23174",
            "abstract and the start of the introduction; the authors' notebook for a workshop; the paper's equations "
            "not seen",
        ),
    ),
    traits=PLAIN - {"normalised", "position_free"} | {"sparse", "routed"},
    cost=Cost("2*B*H*T*S*D + B*T*M*H + 4*B*H*T*S", "2*S*G*D"),
    claim="Irrelevant tokens between a query and its keys change nothing, however many: "
    "tests/positions/test_tra.py::test_irrelevant_tokens_in_between_change_nothing.",
    differs=(
        "The notebook computes the norm and sqrt(D) in float32 whatever the inputs are; here both are as wide as the "
        "inputs, and float32 at least. Scores within rounding of the threshold may so fall on its other side.",
        "Dropout is of the weights, as everywhere here; the notebook's is of the scores, before keys are removed.",
        "The notebook's output projection alone has a bias; here `bias` is of all four projections or none.",
        "The notebook's block adds to the normed tokens, which is the host model's choice.",
        "Bidirectionally, which isn't given, keys from j to the end are counted.",
        "threshold=None and decay=False leave out one half each, as the abstract tells the two apart.",
    ),
    verified="third-party",
    tries={"threshold": 0.4},
    defaults={"threshold": "code", "decay": "code"},
)


def surviving_distances(stays: Bool[Tensor, "B H t S"], dtype: torch.dtype) -> Float[Tensor, "B H t S"]:
    """c: how many keys stay from each on, itself included. Counts are exact up to 2^24 keys in float32."""
    kept = stays.to(dtype)
    return kept.sum(-1, keepdim=True) - kept.cumsum(-1) + kept


def threshold_relative(
    scores: Float[Tensor, "B H t S"],
    rate: Float[Tensor, "B H t 1"] | None,
    allowed: Bool[Tensor, "#B #H t S"] | None = None,
    *,
    threshold: float | None = 0.0,
) -> Float[Tensor, "B H t S"]:
    """What is added to the scores: rate * c where a key stays, else -inf. No gradient flows through c.

    Args:
        rate: logarithm of what each surviving key leaves of a weight, < 0; None = 0.
        threshold: which scores must exceed; None = all allowed keys stay.
    """
    stays = torch.ones_like(scores, dtype=torch.bool)
    if threshold is not None:
        stays = ~(scores.detach() <= threshold)  # NaN stays, so that it shows
    if allowed is not None:
        stays = stays & allowed
    added = torch.zeros_like(scores) if rate is None else rate * surviving_distances(stays, scores.dtype)
    return added.masked_fill(~stays, -torch.inf)


class ThresholdRelative(Position):
    """Removes keys at or below the threshold, and makes weights decay with the number of those that stay.

    Args:
        threshold: which scaled scores must exceed; None removes no key.
        decay: whether distance counts; else surviving keys have their scores alone.
    """

    sees = "rows"
    needs = frozenset({"scores"})

    def __init__(self, dim: int, num_heads: int, *, threshold: float | None = 0.0, decay: bool = True) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        flag(self, decay=decay)
        if threshold is not None:
            number(self, threshold=threshold)
        self.dim, self.num_heads, self.threshold, self.decay = dim, num_heads, threshold, decay
        self.rate_proj = nn.Linear(dim, num_heads) if decay else None

    def reset_parameters(self) -> None:
        """As torch's linear layers."""
        if self.rate_proj is not None:
            self.rate_proj.reset_parameters()

    def prepare(self, given: Tokens) -> Made:
        if self.rate_proj is None:
            return Made()
        tokens(self, "x", given.x, self.dim)
        logits = self.rate_proj(given.x).to(work_dtype(given.x))
        return Made(query=nn.functional.logsigmoid(logits).transpose(1, 2)[..., None])

    def bias(self, rows: Rows) -> Float[Tensor, "B H t S"]:
        rate = rows.made.query
        if rate is None and self.decay:
            wanted = "what prepare gives, as regard.Attention asks"
            refuse(self, "rows", "holds nothing made of the tokens", None, wanted)
        rate = None if rate is None else rate.to(rows.scores.dtype)
        return threshold_relative(rows.scores, rate, rows.allowed, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, threshold={self.threshold}, decay={self.decay}"


class UnitRMS(HeadMap):
    """Queries and keys with root mean square 1 in each head, without learned scales."""

    @checked()
    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return normalised(q), normalised(k), v


class SurvivorsSoftmax(Normalizer):
    """Softmax that gives rows of -inf alone the weights 0, as rows have them that no key stays with."""

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return softmax(scores, allowed)


@CARD.fills()
def tra(
    dim: int, num_heads: int, *, threshold: float | None = 0.0, decay: bool = True
) -> dict[str, HeadMap | Position | Normalizer]:
    """Norm, position and softmax together.

    Args:
        threshold: which scaled scores must exceed for a key to stay; None removes no key.
        decay: whether weights decay with the number of surviving keys from theirs on.
    """
    position = ThresholdRelative(dim, num_heads, threshold=threshold, decay=decay)
    return {"heads": UnitRMS(), "position": position, "normalizer": SurvivorsSoftmax()}

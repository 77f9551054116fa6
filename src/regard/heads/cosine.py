"""Cosine attention: the cosine of query and key, times a learned number, is the score."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, flag, number, whole
from regard.stages import HeadMap

ONE_SUM = (
    "the gradient of the scale is one sum over all queries' channels, of either sign, each rounded with the queries; "
    "one such number is as likely above the mean error of a plain fp16 layer as below"
)

CARD = Card(
    "cosine",
    equation="score[h,i,j] = s_h cos(q_i, k_j),   s_h = exp(min(l_h, log largest)),   l trained",
    papers=(
        Paper(
            "Swin Transformer V2: Scaling Up Capacity and Resolution",
            "Liu et al.",
            2021,
            "2111.09883",
            "not its own text, but its code in transformers",
        ),
    ),
    traits=PLAIN,
    claim="No score is larger than the learned scale, however long queries and keys are: "
    "tests/heads/test_cosine.py::test_scores_stay_within_the_scale.",
    differs=("The continuous position bias that goes with it in Swin v2 is another part.",),
    verified="third-party",
    tries={"largest": {"largest": 5.0}},
    exceptions={"L25 larger_logits_are_no_less_exact": ONE_SUM},
    defaults={"start": "code, Swin v2", "largest": "code, Swin v2", "shared": "code, Swin v2"},
)
HENRY = CARD.variant(
    "qk_norm_l2",
    "Query-key normalisation to length 1, with one learned number in place of 1 / sqrt(D).",
    preset={"shared": True, "largest": None},
    equation="score[i,j] = g cos(q_i, k_j),   g trained",
    papers=(
        Paper(
            "Query-Key Normalization for Transformers",
            "Henry, Dachapally, Pawar, Chen",
            2020,
            "2010.04245",
            "abstract and introduction",
        ),
    ),
    claim="One number bounds the scores of all heads: tests/heads/test_cosine.py::test_henrys_form_has_one_scale.",
    differs=(
        "The logarithm of g is kept, so g stays positive.",
        "The paper starts at log2(L^2 - L) for sentences of length L; the default here is Swin v2's 10.",
    ),
    verified="reconstructed",
    exceptions={"L2 float16_precision": ONE_SUM},
    defaults={"start": "ours, Swin v2's"},
)


def unit(z: Float[Tensor, "... D"], eps: float = 1e-12) -> Float[Tensor, "... D"]:
    """z / |z|, in at least fp32; vectors shorter than eps are divided by that."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1, eps=eps)


@CARD.fills("heads")
class Cosine(HeadMap):
    """Keys get length 1 and queries sqrt(D) s: at the layer's own scale 1 / sqrt(D), scores are s times a cosine.

    Args:
        start: s at the start.
        largest: what s never exceeds; None = nothing.
        shared: one s for all heads, in place of one for each.
    """

    def __init__(
        self, head_dim: int, num_heads: int, *, start: float = 10.0, largest: float | None = 100.0, shared: bool = False
    ) -> None:
        super().__init__()
        whole(self, head_dim=head_dim, num_heads=num_heads)
        flag(self, shared=shared)
        number(self, above=0, start=start)
        if largest is not None:
            number(self, above=0, largest=largest)
        self.head_dim, self.num_heads, self.start, self.largest = head_dim, num_heads, start, largest
        self.log_scale = nn.Parameter(torch.empty(1 if shared else num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(self.start))

    @checked(D="head_dim", H="num_heads")
    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_scale = self.log_scale.to(torch.promote_types(q.dtype, torch.float32))
        log_scale = log_scale if self.largest is None else log_scale.clamp(max=math.log(self.largest))
        q_length = math.sqrt(self.head_dim) * log_scale.exp()[:, None, None]
        return (unit(q) * q_length).to(q.dtype), unit(k).to(k.dtype), v

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.num_heads}, start={self.start:g}, largest={self.largest}"

"""Query-key normalisation: queries and keys get a fixed length, so that logits cannot run away."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, number, refuse, whole
from regard.stages import HeadMap
from regard.weights import Loaded, Move, same

CARD = Card(
    "qk_norm",
    equation="q <- w_q * q / sqrt(mean_d(q^2) + eps),   k <- w_k * k / sqrt(mean_d(k^2) + eps)   before rotation",
    papers=(
        Paper(
            "Query-Key Normalization for Transformers",
            "Henry, Dachapally, Pawar, Chen",
            2020,
            "2010.04245",
            "abstract and introduction",
        ),
        Paper(
            "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
            "Qiu et al.",
            2025,
            "2505.06708",
            "released code, which has this RMS form with a weight per channel, as transformers' Qwen3",
        ),
    ),
    traits=PLAIN,
    claim="Logits stay within sqrt(D) * max|w_q w_k| whatever the size of the input: "
    "tests/heads/test_qk_norm.py::test_logits_are_bounded_whatever_the_input.",
    differs=(
        "The paper gives queries and keys length 1 and has one learned number in place of 1 / sqrt(D); here the length "
        "is sqrt(D), the scale stays 1 / sqrt(D), and each channel has a learned weight. With all weights 1 that is "
        "cosine * sqrt(D), the paper's form at scale sqrt(D).",
        "Dehghani et al. 2023 (2302.05442) use LayerNorm in the same place.",
    ),
    verified="third-party",
    defaults={"eps": "code, Qiu et al."},
)


def rms_norm(z: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """z / rms(z) * weight, in at least fp32."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(z.dtype)


@CARD.fills("heads")
class QKNorm(HeadMap):
    """RMS norm over the channels of each query and key head. The weights are shared by all heads.

    Args:
        eps: under the root; the released code's.
    """

    def __init__(self, head_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        number(self, least=0, eps=eps)
        self.head_dim, self.eps = head_dim, eps
        self.q_weight = nn.Parameter(torch.empty(head_dim))
        self.k_weight = nn.Parameter(torch.empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.q_weight)
        nn.init.ones_(self.k_weight)

    @checked(D="head_dim")
    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps), v


@CARD.loads("transformers", "Qwen3Attention", "Qwen3MoeAttention")
def _qwen3(theirs: Any) -> Loaded:
    eps = theirs.q_norm.variance_epsilon
    moves = same(theirs, {"heads.q_weight": "q_norm.weight", "heads.k_weight": "k_norm.weight"})
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=eps), moves)


@CARD.loads("transformers", "Gemma3Attention", "Qwen3NextAttention", "Qwen3_5Attention")
def _around_one(theirs: Any) -> Loaded:
    """Their weights are differences from 1, which adding it rounds: there is no way back."""
    moves = [Move((f"heads.{n}_weight",), (f"{n}_norm.weight",), lambda w: [1 + w], None) for n in "qk"]
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=theirs.q_norm.eps), moves)


@CARD.loads("timm.layers", "Attention")
def _timm(theirs: Any) -> Loaded | None:
    if isinstance(theirs.q_norm, nn.Identity):
        return None
    if type(theirs.q_norm).__name__ not in ("RmsNorm", "RMSNorm"):
        refuse(theirs, "q_norm", "is another norm", type(theirs.q_norm).__name__, "timm's RmsNorm")
    moves = same(theirs, {"heads.q_weight": "q_norm.weight", "heads.k_weight": "k_norm.weight"})
    return Loaded(lambda: QKNorm(theirs.head_dim, eps=theirs.q_norm.eps), moves)

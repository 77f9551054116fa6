"""Query-key normalisation: every query and key gets a fixed length, so that logits cannot run away.

    q <- w_q * q / sqrt(mean_d(q^2) + eps),   k <- w_k * k / sqrt(mean_d(k^2) + eps)   before rotation

Henry et al. 2020, https://arxiv.org/abs/2010.04245 (abstract and introduction read); this RMS form with a
weight per channel is the one in the code released with https://arxiv.org/abs/2505.06708. Differs from the
paper: there, queries and keys have length 1 and one learned number replaces 1 / sqrt(D); here the length is
sqrt(D), the scale stays 1 / sqrt(D), and each channel has a learned weight. With all weights 1 that is cosine
* sqrt(D), the paper's form at scale sqrt(D). Dehghani et al. 2023 (https://arxiv.org/abs/2302.05442) use
LayerNorm in the same place.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import FEATURES, PLAIN, Card, Cost, Paper, register
from regard.shapes import HeadShape
from regard.stages import HeadMap


def rms_norm(z: Float[Tensor, "... D"], weight: Float[Tensor, "D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """z / rms(z) * weight, in at least fp32."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(z.dtype)


class QKNorm(HeadMap):
    """RMS norm over the channels of each query and key head. The weights are shared by all heads."""

    def __init__(
        self,
        head_dim: int,
        *,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.q_weight = nn.Parameter(torch.empty(head_dim))
        self.k_weight = nn.Parameter(torch.empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.q_weight)
        nn.init.ones_(self.k_weight)

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rms_norm(q, self.q_weight, self.eps), rms_norm(k, self.k_weight, self.eps), v


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"heads": QKNorm(shape.head_dim)}


CARD = register(
    Card(
        name="qk_norm",
        family="heads",
        gist="RMS-normalises queries and keys per head, which bounds the logits.",
        equation="q <- w_q * q / rms(q),  k <- w_k * k / rms(k)",
        paper=Paper(
            "Query-Key Normalization for Transformers",
            "Henry, Dachapally, Pawar, Chen",
            2020,
            "2010.04245",
            "abstract and introduction",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="Logits stay within sqrt(D) * max|w_q w_k| whatever the size of the input.",
        differs=("RMS norm with a weight per channel and scale 1 / sqrt(D); the paper: unit length, one scale.",),
        verified="third-party",
    )
)

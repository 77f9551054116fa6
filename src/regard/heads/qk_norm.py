"""Query-key normalisation: queries and keys get a fixed length, so that logits cannot run away."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import checked, choice, flag, number, refuse, whole
from regard.stages import HeadMap

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
        Paper(
            "2 OLMo 2 Furious",
            "OLMo Team",
            2024,
            "2501.00656",
            'not its own text, but its code in transformers: weights="joint"',
        ),
        Paper(
            "Gemma 3 Technical Report",
            "Gemma Team",
            2025,
            "2503.19786",
            "not its own text, but its code in transformers, and that of Gemma 3n and 4: value_norm=True",
        ),
    ),
    traits=PLAIN,
    claim="Logits stay within sqrt(D) * max|w_q w_k| whatever the size of the input: "
    "tests/heads/test_qk_norm.py::test_logits_are_bounded_whatever_the_input.",
    differs=(
        "Henry et al. give queries and keys length 1 and have one learned number in place of 1 / sqrt(D), which is "
        "`qk_norm_l2`; here the length is sqrt(D), the scale stays 1 / sqrt(D), and each channel has a learned weight.",
        "Gemma keeps w - 1 in place of w.",
    ),
    verified="third-party",
    defaults={
        "norm": "code, Qiu et al.",
        "weights": "code, Qiu et al.",
        "bias": "code, Qiu et al.",
        "value_norm": "code, Qiu et al.",
        "eps": "code, Qiu et al.",
    },
    tries={"bias": {"norm": "layer", "bias": True}},
)
LAYER = CARD.variant(
    "qk_layer_norm",
    "Query-key normalisation by LayerNorm: mean 0 and length sqrt(D) for each query and key head.",
    preset={"norm": "layer"},
    equation="q <- w_q * (q - m) / sqrt(mean_d((q - m)^2) + eps),   m = mean_d(q);   k likewise   before rotation",
    papers=(
        Paper(
            "Scaling Vision Transformers to 22 Billion Parameters",
            "Dehghani et al.",
            2023,
            "2302.05442",
            "not its own text, but the accounts of it, and the code of Phi, Persimmon, StableLM, Cohere and Chameleon "
            "in transformers",
        ),
    ),
    claim="Logits stay bounded, and what all channels have in common counts for nothing: "
    "tests/heads/test_qk_norm.py::test_layer_norm_bounds_logits_and_takes_the_mean_away.",
    differs=("The weight has no bias unless asked for (Phi, Persimmon and Chameleon have one).",),
    defaults={
        "weights": "code, Phi",
        "bias": "code, StableLM and Cohere",
        "value_norm": "code, Phi",
        "eps": "ours, as qk_norm's",
    },
)


def normalised(
    z: Float[Tensor, "B H T D"],
    weight: Float[Tensor, "*h D"] | None = None,
    bias: Float[Tensor, "*h D"] | None = None,
    *,
    norm: Literal["rms", "layer"] = "rms",
    joint: bool = False,
    eps: float = 1e-6,
) -> Float[Tensor, "B H T D"]:
    """z / rms(z) * weight + bias, without the mean before that if `norm` is "layer"; in at least fp32.

    Args:
        weight, bias: (D,) for all heads alike, or (H, D).
        joint: whether mean and rms are those of all heads' channels together.
    """
    over = (-3, -1) if joint else (-1,)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    if norm == "layer":
        wide = wide - wide.mean(over, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    wide = wide if weight is None else wide * weight.unsqueeze(-2)
    wide = wide if bias is None else wide + bias.unsqueeze(-2)
    return wide.to(z.dtype)


@CARD.fills("heads")
class QKNorm(HeadMap):
    """Normalises each query and key, over the channels of its head or of all heads.

    Args:
        head_dim: D.
        num_heads, num_kv_heads: H and G; needed unless weights are shared.
        norm: "rms", or "layer", which takes the mean away first.
        weights: "shared", one for each channel, the same in all heads (Qwen3, Gemma 3, Phi, Persimmon); "per_head",
            (H, D) and (G, D) (Cohere, StableLM, Chameleon); "joint", the same shapes, and one norm over the channels of
            all heads together (OLMo 2, OLMoE).
        bias: whether each weight has one.
        value_norm: whether values are normalised too, by the rms over their head, without weights (Gemma 3n and 4).
        eps: under the root; the released code's.
    """

    q_weight: nn.Parameter
    k_weight: nn.Parameter
    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        *,
        norm: Literal["rms", "layer"] = "rms",
        weights: Literal["shared", "per_head", "joint"] = "shared",
        bias: bool = False,
        value_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        choice(self, ("rms", "layer"), norm=norm)
        choice(self, ("shared", "per_head", "joint"), weights=weights)
        flag(self, bias=bias, value_norm=value_norm)
        number(self, least=0, eps=eps)
        if weights != "shared" and num_heads is None:
            refuse(self, "num_heads", f"is needed for weights={weights!r}", None, "the number of query heads")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        heads = {name: n for name, n in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)) if n is not None}
        whole(self, **heads)
        self.head_dim, self.norm, self.weights, self.value_norm, self.eps = head_dim, norm, weights, value_norm, eps
        self.num_heads, self.num_kv_heads, self.bias = num_heads, num_kv_heads, bias
        for name, n in (("q", num_heads), ("k", num_kv_heads)):
            shape = (head_dim,) if weights == "shared" or n is None else (n, head_dim)
            setattr(self, f"{name}_weight", nn.Parameter(torch.empty(shape)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(shape)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)

    @checked(D="head_dim")
    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        norm, joint, eps = self.norm, self.weights == "joint", self.eps
        q = normalised(q, self.q_weight, self.q_bias, norm=norm, joint=joint, eps=eps)
        k = normalised(k, self.k_weight, self.k_bias, norm=norm, joint=joint, eps=eps)
        return q, k, normalised(v, eps=eps) if self.value_norm else v

    def extra_repr(self) -> str:
        return f"{self.head_dim}, norm={self.norm!r}, weights={self.weights!r}, value_norm={self.value_norm}"

"""Dynamic self-attention: a pooled vector is its own query, found in rounds of agreement with tokens.

Routing between capsules with one capsule an attention, which tokens compete for; tanh stands for the squash function.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, number, refuse, whole
from regard.kernels.sums import over_keys
from regard.masks import Mask
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import key_padding, quarantine

CARD = Card(
    "dynamic_self_attention",
    equation="""u_t = LeakyReLU(W x_t + b)      l_t = 0      for each of A attentions, with its own W and b
in every round:  a = softmax_t(l),   z = tanh(sum_t a_t u_t),   l_t <- l_t + u_t . z
y = [z of attention 1; ...; z of attention A] of the last round""",
    papers=(
        Paper(
            "Dynamic Self-Attention : Computing Attention over Words Dynamically for Sentence Embedding",
            "Yoon, Lee, Lee",
            2018,
            "1808.07383",
            "abstract; introduction; a review; two public implementations, which agree; the algorithm itself not read",
        ),
    ),
    protocol="Pooler",
    supports={"bidirectional", "padding", "compile"},
    traits={"position_free"},
    cost=Cost("B*T*num_attentions*width*(2*iterations - 1)", ""),
    claim="Round by round it comes closer to what most tokens agree on, without any learned query: "
    "tests/cross/test_dynamic_self_attention.py::test_rounds_come_closer_to_what_most_tokens_agree_on.",
    differs=(
        "Hidden tokens get no weight in any round; public code multiplies their scores by a large negative number, "
        "which makes the largest of those that disagree.",
        "A sentence without tokens gives 0.",
        "Where no weights are detached, gradients pass through all rounds, as in one of two public implementations.",
        "The number of rounds is the paper's as remembered, and its slope unknown: public code has 0.01 or 0.2.",
        "The densely connected convolutions before it, and the classifier after it, are left to the caller.",
    ),
    verified="reconstructed",
    example={"num_attentions": 3, "width": 8},
    tries={"detach_weights": ...},
    defaults={
        "num_attentions": "paper, its largest model, as remembered",
        "width": "paper, of several attentions",
        "iterations": "paper, as remembered",
        "slope": "code, iclassifier",
        "detach_weights": "code, a public one in TensorFlow",
    },
)


def route(
    values: Float[Tensor, "B A T D"],
    keep: Bool[Tensor, "B T"] | None = None,
    *,
    iterations: int = 2,
    detach_weights: bool = False,
) -> tuple[Float[Tensor, "B A D"], Float[Tensor, "B A T"]]:
    """What each attention pools its values to, and the last round's weights; both 0 without any real token.

    Args:
        keep: True = a real token.
        detach_weights: no gradient passes through weights, and so through the last weighted sum alone.
    """
    u = values.to(torch.promote_types(values.dtype, torch.float32))
    allowed = None if keep is None else keep[:, None].expand(u.shape[:3])
    logits = torch.zeros_like(u[..., 0])
    for n in range(iterations):
        weights = softmax(logits, allowed)
        if detach_weights:
            weights = weights.detach()
        pooled = torch.tanh(over_keys(weights[..., None, :], u))
        if n + 1 < iterations:  # what the last round agrees on is not asked
            logits = logits + (u @ pooled.mT)[..., 0]
    return pooled[..., 0, :].to(values.dtype), weights.to(values.dtype)


def pair_features(first: Float[Tensor, "B C"], second: Float[Tensor, "B C"]) -> Float[Tensor, "B C4"]:
    """What the paper's classifier reads of two pooled sentences: both, their distance and their product."""
    if first.shape != second.shape:
        refuse("pair_features", "second", "has the wrong shape", tuple(second.shape), f"{tuple(first.shape)}")
    return torch.cat([first, second, (first - second).abs(), first * second], -1)


@CARD.module
class DynamicSelfAttention(nn.Module):
    """Tokens to one vector: (B, T, dim) -> (B, num_attentions * width).

    Args:
        dim: M, the width of the tokens.
        num_attentions: A, how many of them stand beside each other.
        width: D, of each; 600 for a single one in the paper, as remembered.
        iterations: rounds, 100 at most; 1 gives tanh of the mean. Scores are not scaled, so that many make weights
            one-hot.
        slope: of LeakyReLU below 0.
        detach_weights: whether gradients pass by the weights, through the last weighted sum alone.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_attentions: int = 8,
        width: int = 300,
        iterations: int = 2,
        slope: float = 0.01,
        detach_weights: bool = False,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_attentions=num_attentions, width=width)
        whole(self, most=100, iterations=iterations)
        number(self, slope=slope)
        flag(self, detach_weights=detach_weights)
        self.dim, self.num_attentions, self.width = dim, num_attentions, width
        self.iterations, self.slope, self.detach_weights = iterations, slope, detach_weights
        self.v_proj = nn.Linear(dim, num_attentions * width)

    def reset_parameters(self) -> None:
        """As torch's linear layers."""
        self.v_proj.reset_parameters()

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Pool the tokens that `mask` keeps (`regard.masks.padding`, or True = a real token)."""
        keep = key_padding(self, mask, x)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        x, bad = quarantine(x)
        u = nn.functional.leaky_relu(self.v_proj(x), self.slope)
        u = u.unflatten(-1, (self.num_attentions, self.width)).transpose(1, 2)
        out = route(u, keep, iterations=self.iterations, detach_weights=self.detach_weights)[0].flatten(1)
        return out if bad is None else out.masked_fill(bad.any(1, keepdim=True), torch.nan)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_attentions={self.num_attentions}, width={self.width}, iterations={self.iterations}"

"""Efficient additive attention (SwiftFormer): one global query, a weighted sum of all, times each key."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, refuse, whole
from regard.masks import Mask, full, padding
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.weights import Loaded, Move, same

CARD = Card(
    "efficient_additive",
    equation="""q_t = nrm(Wq x_t),   k_t = nrm(Wk x_t)      P wide;   nrm(z) = z / max(|z|, 1e-12)
a_t = q_t . w / sqrt(M)
alpha = nrm(a) over the tokens;   or softmax over the tokens;   or 1
g = sum_t alpha_t q_t
out_t = Wf (Wp (g * k_t) + q_t)      * elementwise; the four projections have biases""",
    papers=(
        Paper(
            "SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications",
            "Shaker et al.",
            2023,
            "2303.15446",
            "abstract; the authors' code and what they say in its issues; the transformers library's code",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "compile"},
    lacks={"causal": "the global query is a sum over all tokens"},
    traits={"position_free", "shift_invariant"},
    cost=Cost("B*T*((M*expansion)**2 + 2*M*expansion)", ""),
    claim="Linear in length, whatever the scale of w: "
    "tests/linear/test_efficient_additive.py::test_no_square_matrix, "
    "tests/linear/test_efficient_additive.py::test_only_the_direction_of_w_counts.",
    differs=(
        "Alpha has three forms: the authors' present code divides by the norm over the tokens; they say that a softmax "
        "over them was meant (weights='softmax'); their first release, as the transformers library still does, took a "
        "softmax of one number, which is 1 (weights='sum').",
        "Hidden tokens count neither in the sum nor in the norm; the authors' code takes no mask.",
        "The block around it (convolutions, residuals, layer scales) belongs to the model.",
    ),
    verified="third-party",
    example={"expansion": 2},
    defaults={"expansion": "code", "weights": "code", "bias": "code"},
)

Weights = Literal["norm", "softmax", "sum"]


@checked()
def global_query(
    q: Float[Tensor, "B T P"],
    direction: Float[Tensor, " P"] | None,
    *,
    scale: float = 1.0,
    keep: Bool[Tensor, "B T"] | None = None,
    weights: Weights = "norm",
) -> Float[Tensor, "B 1 P"]:
    """g = sum_t alpha_t q_t, of real tokens (`keep`); 0 where there is none.

    Args:
        q: as they are to be summed, of norm 1 in the paper.
        direction: w; may be None with weights="sum".
        scale: multiplies the scores; counts with weights="softmax" alone.
    """
    choice("global_query", get_args(Weights), weights=weights)
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    if keep is not None:
        wide = wide.masked_fill(~keep[..., None], 0.0)  # a score of 0, which leaves the norm as it is
    if weights == "sum":
        return wide.sum(1, keepdim=True).to(q.dtype)
    if direction is None:
        refuse("global_query", "direction", "is missing", None, f"(P = {q.shape[2]},) for weights={weights!r}")
    scores = (wide @ direction.to(wide.dtype)) * scale
    alpha = F.normalize(scores, dim=-1) if weights == "norm" else softmax(scores, keep)
    return (alpha[:, None] @ wide).to(q.dtype)


@CARD.module
class EfficientAdditive(nn.Module):
    """Bidirectional mixing without values, in time linear in the number of tokens.

    Args:
        dim: M.
        expansion: how many times wider than M queries and keys are; "heads" in the authors' code, where nothing else
            is done by head.
        weights: of tokens in the global query: "norm" (entries may be negative), "softmax", or "sum" (all 1; w is
            only kept).
        bias: whether the four projections have one.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(self, dim: int, *, expansion: int = 1, weights: Weights = "norm", bias: bool = True) -> None:
        super().__init__()
        whole(self, dim=dim, expansion=expansion)
        choice(self, get_args(Weights), weights=weights)
        flag(self, bias=bias)
        self.dim, self.expansion = dim, expansion
        self.weights: Weights = weights
        wide = dim * expansion
        self.q_proj, self.k_proj = (nn.Linear(dim, wide, bias=bias) for _ in "qk")
        self.direction = nn.Parameter(torch.empty(wide), requires_grad=weights != "sum")
        self.mix_proj = nn.Linear(wide, wide, bias=bias)
        self.o_proj = nn.Linear(wide, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.direction)

    def extra_repr(self) -> str:
        return f"{self.dim}, expansion={self.expansion}, weights={self.weights!r}"

    def receptive_field(self) -> Mask:
        return full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens from the global query."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        q, k = (unit(project(x)) for project in (self.q_proj, self.k_proj))
        g = global_query(q, self.direction, scale=self.dim**-0.5, keep=keep, weights=self.weights)
        out = self.o_proj(self.mix_proj(g * k) + q)
        allowed = self.receptive_field()
        return spoil(out, bad, bad, allowed if keep is None else allowed & padding(keep))


def unit(z: Float[Tensor, "B T P"]) -> Float[Tensor, "B T P"]:
    """Of norm 1, or 0; norms are taken in float32 at least."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1).to(z.dtype)


@CARD.loads("transformers", "SwiftFormerEfficientAdditiveAttention")
def _transformers(theirs: Any) -> Loaded:
    """Theirs takes a softmax of one number, so that all tokens weigh 1 and w_g nothing."""
    names = {"q_proj": "to_query", "k_proj": "to_key", "mix_proj": "proj", "o_proj": "final"}
    return Loaded(
        lambda: EfficientAdditive(theirs.to_query.in_features, weights="sum"),
        [*same(theirs, names), Move(("direction",), ("w_g",), lambda t: [t[:, 0]], lambda t: [t[:, None]])],
    )

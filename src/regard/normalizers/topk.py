"""Top-k softmax: each query keeps its k best keys; softmax over those, exactly 0 elsewhere."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, whole
from regard.kernels.blocks import greatest
from regard.kernels.native import rows as native
from regard.normalizers.softmax import softmax
from regard.stages import Normalizer

CARD = Card(
    "topk",
    equation="""M_ts = P_ts if P_ts >= t_t, the k-th greatest allowed score of row t, else -inf     A = softmax(M)
dP_ts = A_ts (dA_ts - sum_s' A_ts' dA_ts'),   so 0 for keys that are not kept
Scores equal to the k-th stay, so a row can keep more than k.""",
    papers=(
        Paper(
            "Explicit Sparse Transformer: Concentrated Attention Through Explicit Selection",
            "Zhao, Lin, Zhang, Ren, Su, Sun",
            2019,
            "1912.11637",
            "eqs. 5-7 and 9-12 of the authors' later text, 'Extremely Sparse Transformer with Top-k Selective "
            "Attention' (2023), and the official repository that it stands in",
        ),
    ),
    traits=PLAIN | {"sparse"},
    cost=Cost("2*B*H*T*S*D + 4*B*H*T*S", "2*S*G*D"),
    claim="Weights stay on the k best keys however many there are, where softmax spreads them: "
    "tests/normalizers/test_topk.py::test_more_keys_take_nothing_from_the_best.",
    differs=("k is one number; the authors' code can also make it a share of the keys.",),
    example={"k": 3},
    defaults={"k": "code, the script for translation"},
)


class _TopK(torch.autograd.Function):
    """The C++ passes. The backward is softmax's and needs no selection: what was not kept has p = 0."""

    @staticmethod
    def forward(scores: Tensor, k: int, allowed: Tensor | None) -> Tensor:
        z = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
        return native.topk(z.view(-1, z.shape[-1]), k).view(scores.shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, dp: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # in steps that can be differentiated again
            return p * (dp - (p * dp).sum(-1, keepdim=True)), None, None
        dz = native.entmax_backward(dp.reshape(-1, p.shape[-1]), p.view(-1, p.shape[-1]), 1.0)
        return dz.view(p.shape), None, None


@checked()
def topk(
    scores: Float[Tensor, "... S"], k: int, *, allowed: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "... S"]:
    """Softmax over the k greatest allowed scores of each row and whatever equals the k-th; the rest gets 0.

    Rows with fewer than k allowed keys keep all of them, rows with none are 0.
    """
    whole("topk", k=k)
    if scores.shape[-1] == 0:
        return scores
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if native.ready(z):
        return _TopK.apply(z.contiguous(), k, allowed).to(scores.dtype)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    kth = greatest(z.detach(), k).values[..., -1:]
    return softmax(z.masked_fill(z < kth, -torch.inf)).to(scores.dtype)


@CARD.fills("normalizer")
class TopK(Normalizer):
    """Softmax over the k greatest scores of each row.

    Args:
        k: how many keys a query keeps at least; 8 in the authors' script for translation.
    """

    def __init__(self, *, k: int = 8) -> None:
        super().__init__()
        whole(self, k=k)
        self.k = k

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return topk(scores, self.k, allowed=allowed)

    def extra_repr(self) -> str:
        return f"k={self.k}"

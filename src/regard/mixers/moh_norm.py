"""Mixture-of-head attention without a router: each token picks the heads of its longest queries.

So a trained language model can be tuned on with nothing added to it, and `moh` is the form to train from the start.
"""

from typing import Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, tokens
from regard.heads.moh import balance, dealt, picked
from regard.masks import Mask
from regard.masks.tensors import Kept, Lengths
from regard.pipeline.head_mixer import Projections
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import key_padding, quarantine
from regard.positions.rotary import Rotary
from regard.tracing import as_it_is

CARD = Card(
    "moh_norm",
    equation="""y = sum_h g_h O_h W_oh,   g_h = 1 for hs shared heads, E = H - hs others
r_h = |q_h| before rotation,   p = softmax_h(r / std_h(r)) over the E others, std unbiased
g_h = 1 for the K greatest p_h, 0 else;   gradients in training pass as if g_h were p_h
loss = sum_h P_h f_h,   P_h the mean of p_h over tokens, f_h how often h is picked""",
    papers=(
        Paper(
            "MoH: Multi-Head Attention as Mixture-of-Head Attention",
            "Jin, Zhu, Yuan, Yan",
            2024,
            "2410.11842",
            "sections 3 and 4.4; official inference code of MoH-LLaMA3",
        ),
    ),
    traits={"linear_in_values"},
    cost=Cost("2*B*H*T*S*D + B*T*M*H*D/2 + 3*B*H*(T + S)*D", "2*S*G*D"),
    claim="A trained layer is taken over with no parameter added, and what is lost are the heads that a token has "
    "little to ask: tests/mixers/test_moh_norm.py::test_a_trained_layer_loses_only_the_heads_with_short_queries.",
    differs=(
        "All heads are computed, and those that a token doesn't use are multiplied by 0; queries are projected once "
        "more for the choice.",
        "Where all norms are equal, or one head alone is not shared, they are divided by 1; the authors' code divides "
        "by no number there.",
        "The released code only infers. The gradient to the softmax is read into the paper, and so is the loss, which "
        "here leaves padding out.",
        "Shared heads may be any number; the authors' inference code needs as many as others.",
    ),
    verified="reconstructed",
    auxiliary="balance_loss",
    defaults={
        "shared_heads": "paper, MoH-LLaMA3-8B",
        "active": "paper, MoH-LLaMA3-8B",
        "base": "code, LLaMA3",
        "auxiliary_weight": "paper",
        "bias": "code",
        "context_dim": "ours, as wide as dim",
    },
)


def norm_scores(q: Float[Tensor, "B T E D"]) -> Float[Tensor, "B T E"]:
    """r / std, in at least float32; the spread is over the heads of one token."""
    r = q.to(torch.promote_types(q.dtype, torch.float32)).norm(dim=-1)
    if r.shape[-1] < 2:
        return r
    spread = (r - r.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / (r.shape[-1] - 1)
    return r / torch.where(spread > 0, spread, 1.0).sqrt()


def norm_gates(scores: Float[Tensor, "B T E"], active: int, *, through: bool) -> Float[Tensor, "B T E"]:
    """1 for the K greatest, 0 else; with `through`, gradients go to the softmax of the scores."""
    hard = picked(scores, active).to(scores.dtype)
    if not through:
        return hard
    soft = scores.softmax(-1)
    return hard + (soft - soft.detach())


@CARD.module
class MixtureOfHeadsByNorm(Attention):
    """Attention with gates of 0 and 1. Add `auxiliary_weight * balance_loss(...)` to the task's loss.

    Args:
        dim, num_heads, dropout, rest: as in `regard.Attention`.
        shared_heads: hs, the first ones; default H / 2.
        active: K, how many of the others a token uses; default H / 4, at least 1 where there are others.
        base: of rotary positions; None for no positions.
        auxiliary_weight: what training multiplies `balance_loss` by.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        active: int | None = None,
        base: float | None = 500000.0,
        auxiliary_weight: float = 0.01,
        dropout: float = 0.0,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, dropout=dropout, **rest)
        shared_heads, active = dealt(self, num_heads, shared_heads, active)
        number(self, least=0, auxiliary_weight=auxiliary_weight)
        if base is not None:
            if self.head_dim % 2:
                refuse(self, "head_dim", "is odd, and rotation turns pairs", self.head_dim, "an even one, or base=None")
            self.position = Rotary(self.head_dim, base=base)
        self.shared_heads, self.active, self.auxiliary_weight = shared_heads, active, auxiliary_weight

    def scores(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T E"]:
        """What each token's routed heads are picked by."""
        first = self.shared_heads * self.head_dim
        bias = None if self.q_proj.bias is None else self.q_proj.bias[first:]
        weight = self.q_proj.weight[first:]
        with as_it_is(x.device):  # which heads are picked hangs on small differences
            q = F.linear(x.to(weight.dtype), weight, bias)
        return norm_scores(q.unflatten(-1, (self.num_heads - self.shared_heads, self.head_dim)))

    def gates(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T H"]:
        """In at least fp32."""
        routed = norm_gates(self.scores(x), self.active, through=self.training)
        return F.pad(routed, (self.shared_heads, 0), value=1.0)

    def _finish(self, out: Float[Tensor, "B H T V"], x: Tensor) -> Tensor:
        if self.shared_heads + self.active < self.num_heads or self.training:
            out = out * self.gates(x).mT[..., None].to(out.dtype)
        return super()._finish(out, x)

    def balance_loss(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
    ) -> Float[Tensor, ""]:
        """What `forward` takes -> how unevenly its tokens pick heads, of those that `masks.padding` leaves."""
        tokens(self, "x", x, self.dim)
        if not self.active:
            return x.new_zeros(())
        pads = context is None and isinstance(mask, Kept | Lengths)
        keep = key_padding(self, mask, x) if pads else None
        return balance(self.scores(quarantine(x)[0]), self.active, "paper", keep)

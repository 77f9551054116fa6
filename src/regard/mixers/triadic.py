"""Co4: queries, keys and values modulate each other; only the largest of each feature attend.

A latent token (the first, as a class token) sets how strongly. What then attends is put together feature by feature:
the j-th selected query holds each feature's j-th largest value, whichever token that is of.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, number, whole
from regard.kernels.blocks import greatest
from regard.linear._shared import widened
from regard.masks import Mask, full, padding
from regard.normalizers.softmax import softmax
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.tracing import as_it_is

CARD = Card(
    "triadic",
    equation="""q' = q + q_0 k,   k' = k + k_0 q,   v' = v^2 + 2 v + q_0 k_0 (1 + |v_0|)   of all but the latent, 0
largest_j(z)[d] = the j-th largest of z[., d] over the tokens,   j = 1 .. keep
Q, K, V = the latent's, and the largest of q', of k', of v':   O = softmax(Q K^T / sqrt(M)) V
y_0 = O_0;   y_n[d] = v'_n[d] + (O_j[d] where token n has the j-th largest v'[., d])""",
    papers=(
        Paper(
            "Beyond Attention: Toward Machines with Intrinsic Higher Mental States",
            "Adeel",
            2025,
            "2505.06257",
            "abstract, start of the introduction, and what the code of its sequel says of it",
        ),
        Paper(
            "Scalable Machines with Intrinsic Higher Mental-State Dynamics",
            "Adeel, Bilal",
            2026,
            "2603.13453",
            "abstract; official code of object recognition",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "dropout", "compile"},
    lacks={"causal": "what is largest is known when all tokens are"},
    cost=Cost("2*B*(min(keep, T) + 1)**2*M", ""),
    claim="Tokens are selected before attention, at a cost linear in their number: one without any largest feature is "
    "heard by nobody: tests/mixers/test_triadic.py::test_a_token_without_a_largest_feature_is_heard_by_nobody, "
    "tests/mixers/test_triadic.py::test_attention_is_of_few.",
    differs=(
        "This is one pass, as in the code of the sequel; the first paper's loops between layers, and its universal "
        "context, are left out: no code of them was found.",
        "The latent is the first token that isn't hidden; hidden ones are never largest and put out 0. The authors' "
        "code takes no mask.",
        "Of fewer tokens than `keep` all are taken; the authors' code fails there.",
        "One head and one latent, which are all that the authors' code runs with.",
        "Of the authors' code for reinforcement learning only its laws are there, in `cooperate`.",
    ),
    verified="third-party",
    example={"keep": 3},
    defaults={"keep": "code", "bias": "code"},
)

Law = Literal["m2", "m3", "m4", "cooperation", "cooperation6"]


@checked()
def cooperate(
    r: Float[Tensor, "*n"], c: Float[Tensor, "..."], law: Law, *, gain: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "*n"]:
    """What context makes of a neuron's own input, number by number.

    Args:
        r: the receptive field, its own input.
        c: context; it broadcasts to r.
        law: "m2": r + g c. "m3": r (1 + tanh(g c)). "m4": r 2^(g c). "cooperation": r^2 + 2 r + c (1 + |g|);
            "cooperation6" is the same within 0 and 6.
        gain: g, what weighs the context; default r itself.

    Raises:
        ValueError: an unknown law.
    """
    choice("cooperate", get_args(Law), law=law)
    g = r if gain is None else gain
    if law == "m2":
        return r + g * c
    if law == "m3":
        return r * (1 + torch.tanh(g * c))
    if law == "m4":
        return r * torch.exp2(g * c)
    out = r.square() + 2 * r + c * (1 + g.abs())
    return F.relu6(out) if law == "cooperation6" else out


@checked()
def triadic_attention(
    q: Float[Tensor, "B T M"],
    k: Float[Tensor, "B T M"],
    v: Float[Tensor, "B T M"],
    *,
    keep: int = 12,
    real: Bool[Tensor, "B T"] | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B T M"], Int[Tensor, "B keep M"]]:
    """Outputs, and the tokens whose values are the largest of each feature, largest first (as far as there are any).

    Args:
        keep: how many of each feature are selected; all, where there are fewer tokens.
        real: True at tokens that count; the first of them is the latent. Others put out 0.
        dropout: share of the attention's weights that are dropped.

    Raises:
        ValueError: shapes that differ, `keep` < 1.
    """
    whole("triadic_attention", keep=keep)
    (q, k, v), (T, M) = widened(q, k, v), q.shape[1:]
    if T == 0:
        return v, v.long()
    real = torch.ones_like(v[..., 0], dtype=torch.bool) if real is None else real
    at = real.int().argmax(1)[:, None]
    others = real & (torch.arange(T, device=v.device) != at)
    first = at[..., None].expand(-1, -1, M)
    q0, k0, v0 = (z.gather(1, first) for z in (q, k, v))
    modulated = (
        cooperate(q, k, "m2", gain=q0),
        cooperate(k, q, "m2", gain=k0),
        cooperate(v, q0 * k0, "cooperation", gain=v0),
    )
    tops = [greatest(z.masked_fill(~others[..., None], -torch.inf).mT, keep) for z in modulated]
    places = tops[2].indices.mT.clamp(max=T - 1)  # exported, there are places beyond the last token, for nobody
    there = torch.arange(places.shape[1], device=v.device) < others.sum(1, keepdim=True)  # a row may have fewer
    chosen = [
        torch.cat([z0, top.values.mT.masked_fill(~there[..., None], 0)], 1) for z0, top in zip((q0, k0, v0), tops)
    ]
    seen = F.pad(there, (1, 0), value=True)[:, None]
    weights = softmax(chosen[0] @ chosen[1].mT / math.sqrt(M), seen)
    attended = F.dropout(weights, dropout) @ chosen[2]
    out = modulated[2].masked_fill(~others[..., None], 0)
    out = out.scatter_add(1, places, attended[:, 1:].masked_fill(~there[..., None], 0))
    out = out.scatter(1, first, attended[:, :1])
    return out.masked_fill(~real[..., None], 0), places


@CARD.module
class TriadicModulation(nn.Module):
    """Modulation of queries, keys and values, and attention among a latent and the largest of each feature.

    Values are squared, so that inputs should be normed. There is no output projection.

    Args:
        dim: M.
        keep: how many of each feature are selected.
        dropout: share of the attention's weights dropped in training.
        bias: whether the three projections have one.

    Shapes: x (B, T, M) -> (B, T, M); the first token of a row is its latent.
    """

    def __init__(self, dim: int, *, keep: int = 12, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        whole(self, dim=dim, keep=keep)
        number(self, least=0, most=1, dropout=dropout)
        flag(self, bias=bias)
        self.dim, self.keep, self.dropout = dim, keep, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in "qkv")

    def extra_repr(self) -> str:
        return f"{self.dim}, keep={self.keep}, dropout={self.dropout}"

    def receptive_field(self) -> Mask:
        """Any token may be selected."""
        return full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Mix x. `mask` hides tokens: the latent is the first that it shows."""
        real, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, real)
        x, bad = quarantine(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        with as_it_is(x.device):
            out = triadic_attention(q, k, v, keep=self.keep, real=real, dropout=self.dropout * self.training)[0]
        allowed = self.receptive_field()
        return spoil(out.to(q.dtype), bad, bad, allowed if real is None else allowed & padding(real))

"""Luong attention: a decoder state looks at all encoder states, and one tanh layer joins what it finds to it.

    score(h_t, H_s):  dot h_t . H_s | general h_t . W_a H_s | concat v_a . tanh(W_a [h_t; H_s]) | location (W_a h_t)_s
    a_t = softmax_s(score)        c_t = sum_s a_t(s) H_s        h~_t = tanh(W_c [c_t; h_t])

Luong, Pham, Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation"
(https://arxiv.org/abs/1508.04025): the authors' code and the equations as others quote them read; the paper's own
text was not. Scores are not scaled.
Differs from the paper: nothing known; the location score's table has a size to be chosen (`max_source`).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.recurrent._aligner import Aligner, normalise, single_head, uniform_
from regard.shapes import HeadShape

Score = Literal["dot", "general", "concat", "location"]


class LuongScore(nn.Module):
    """How well a decoder state fits encoder states. Keys (B, 1, S, C) are shared by the steps, or (B, T, W, C) not."""

    def __init__(
        self,
        kind: Score,
        dim: int,
        context_dim: int,
        *,
        hidden: int | None = None,
        max_source: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Score):
            raise ValueError(f"LuongAttention: unknown score {kind!r}; expected one of {', '.join(get_args(Score))}")
        if kind == "dot" and dim != context_dim:
            raise ValueError(f"LuongAttention: score 'dot' needs equal widths (got {dim} and {context_dim})")
        if (kind == "location") != (max_source is not None):
            raise ValueError(f"LuongAttention: max_source goes with score 'location' (got {max_source} for {kind!r})")
        self.kind = kind
        if kind == "general":
            self.q_proj = nn.Linear(dim, context_dim, bias=False)
        elif kind == "concat":
            hidden = dim if hidden is None else hidden
            self.q_proj = nn.Linear(dim, hidden, bias=False)
            self.k_proj = nn.Linear(context_dim, hidden, bias=False)
            self.vector = nn.Parameter(torch.empty(hidden))
        elif kind == "location":
            self.q_proj = nn.Linear(dim, max_source or 0, bias=False)

    def keys(self, context: Float[Tensor, "B S C"]) -> Float[Tensor, "B S K"]:
        """What of the context the scores need; computed once."""
        return self.k_proj(context) if self.kind == "concat" else context

    def forward(self, h: Float[Tensor, "B T M"], keys: Float[Tensor, "B #T W K"]) -> Float[Tensor, "B T W"]:
        if self.kind == "concat":
            return torch.tanh(self.q_proj(h)[:, :, None] + keys) @ self.vector
        q = h if self.kind == "dot" else self.q_proj(h)
        if self.kind == "location":
            if keys.shape[2] > q.shape[-1]:
                raise ValueError(f"LuongAttention: {keys.shape[2]} tokens exceed max_source {q.shape[-1]}")
            return q[..., : keys.shape[2]]
        return q @ keys[:, 0].mT if keys.shape[1] == 1 else (keys @ q[..., None])[..., 0]


class LuongAttention(Aligner):
    """Global attention: (B, T, dim) decoder states and (B, S, context_dim) encoder states -> h~ (B, T, dim).

    Args:
        dim, context_dim: widths of decoder and encoder states.
        score: "dot" (needs equal widths), "general", "concat" or "location" (needs max_source).
        hidden: width in which "concat" compares; default dim.
        max_source: the longest context that "location" can score.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        score: Score = "general",
        hidden: int | None = None,
        max_source: int | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        self.score = LuongScore(score, dim, self.context_dim, hidden=hidden, max_source=max_source)
        self.c_proj = nn.Linear(self.context_dim + dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self, 0.1)

    def weights(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T S"]:
        """a_t(s)."""
        scores = self.score(x, self.score.keys(context)[:, None])
        return normalise(scores, None if keep is None else keep[:, None])

    def align(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T M"]:
        return self.combine(self.weights(x, context, keep) @ context, x)

    def combine(self, c: Float[Tensor, "B T C"], h: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The attentional state h~ of a context vector and a decoder state."""
        return torch.tanh(self.c_proj(torch.cat([c, h], -1)))


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    score: Score = "general",
    hidden: int | None = None,
    max_source: int | None = None,
) -> LuongAttention:
    single_head("luong", causal)
    return LuongAttention(shape.dim, score=score, hidden=hidden, max_source=max_source)


LUONG_PAPER = Paper(
    "Effective Approaches to Attention-based Neural Machine Translation",
    "Luong, Pham, Manning",
    2015,
    "1508.04025",
    "official code; equations as quoted by others",
)

CARD = register(
    Card(
        name="luong",
        family="recurrent",
        gist="A decoder state attends to all encoder states; then one tanh layer on both.",
        equation="a_t = softmax_s(h_t . W_a H_s);  h~_t = tanh(W_c [sum_s a_t(s) H_s; h_t])",
        paper=LUONG_PAPER,
        build=_build,
        protocol="CrossMixer",
        supports=frozenset({"bidirectional", "padding", "compile"}),
        cost=Cost("2*B*T*S*M", ""),
        claim="With W_a = I the general score is the dot score; every score is one softmax over the source: "
        "tests/recurrent/test_luong.py.",
        differs=("The location score's table has a size to be chosen.",),
        verified="third-party",
    )
)

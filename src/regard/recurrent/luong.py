"""Luong attention: a decoder state attends to all encoder states; then one tanh layer on both."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.recurrent._aligner import Aligner, normalise, uniform_

PAPERS = (
    Paper(
        "Effective Approaches to Attention-based Neural Machine Translation",
        "Luong, Pham, Manning",
        2015,
        "1508.04025",
        "official code; equations as quoted by others, not the paper's own text",
    ),
)

CARD = Card(
    "luong",
    equation="""score(h_t, H_s), not scaled:  dot h_t . H_s        general h_t . W_a H_s
                              concat v_a . tanh(W_a [h_t; H_s])        location (W_a h_t)_s
a_t = softmax_s(score)        c_t = sum_s a_t(s) H_s        h~_t = tanh(W_c [c_t; h_t])""",
    papers=PAPERS,
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("2*B*T*S*M + B*S*M*M", ""),
    claim="With W_a = I the general score is the dot score: "
    "tests/recurrent/test_luong.py::test_general_with_the_identity_is_dot.",
    differs=(
        "The location score is not in the authors' code; its table has a size to be chosen (`max_source`).",
        "'concat' has a matrix on the encoder states too, as the paper's formula; the authors' code has none there.",
    ),
    verified="third-party",
    defaults={"context_dim": "ours, as wide as dim", "score": "code", "hidden": "code", "max_source": "ours, none"},
)

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
        choice("LuongAttention", get_args(Score), score=kind)
        if kind == "dot" and dim != context_dim:
            widths = f"{dim} and {context_dim}"
            refuse("LuongAttention", "score", "'dot' needs equal widths", widths, "context_dim = dim")
        if (kind == "location") != (max_source is not None):
            both = f"{max_source} for {kind!r}"
            refuse("LuongAttention", "max_source", "goes with score 'location'", both, "both or neither")
        if max_source is not None:
            whole("LuongAttention", max_source=max_source)
        if hidden is not None:
            whole("LuongAttention", hidden=hidden)
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

    def forward(self, h: Float[Tensor, "B T M"], keys: Float[Tensor, " B #T W K"]) -> Float[Tensor, "B T W"]:
        if self.kind == "concat":
            return torch.tanh(self.q_proj(h)[:, :, None] + keys) @ self.vector
        q = h if self.kind == "dot" else self.q_proj(h)
        if self.kind == "location":
            if keys.shape[2] > q.shape[-1]:
                most = f"at most max_source = {q.shape[-1]}"
                refuse("LuongAttention", "context", "is too long", f"{keys.shape[2]} tokens", most)
            return q[..., : keys.shape[2]]
        return q @ keys[:, 0].mT if keys.shape[1] == 1 else (keys @ q[..., None])[..., 0]


@CARD.module
class LuongAttention(Aligner):
    """Global attention: (B, T, dim) decoder states and (B, S, context_dim) encoder states -> h~ (B, T, dim).

    Args:
        dim, context_dim: widths of decoder and encoder states.
        score: "dot" (needs equal widths), "general" (the authors' default), "concat" or "location" (needs max_source).
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

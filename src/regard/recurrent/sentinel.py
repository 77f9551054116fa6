"""Visual sentinel: attention to image regions or to what the LSTM remembers, so that it need not look."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import whole
from regard.recurrent._aligner import Aligner, Padding, normalise

CARD = Card(
    "sentinel",
    equation="""i, f, g, o = gates of an LSTM;  m_t = f m_{t-1} + i g;  h_t = o tanh(m_t)
sentinel  s_t = sigmoid(W_x x_t + W_h h_{t-1}) * tanh(m_t)
scores    z_i = w . tanh(W_v v_i + W_g h_t);  z_s = w . tanh(W_s s_t + W_g h_t);  alpha = softmax([z; z_s])
beta      the sentinel's share of alpha;  c_t = beta s_t + sum_i alpha_i v_i;  y_t = c_t + h_t""",
    papers=(
        Paper(
            "Knowing When to Look: Adaptive Attention via A Visual Sentinel for Image Captioning",
            "Lu, Xiong, Parikh, Socher",
            2017,
            "1612.01887",
            "abstract; official code and a port of it; the equations, with which the code agrees in structure, are "
            "from memory",
        ),
    ),
    protocol="CrossMixer",
    supports={"bidirectional", "padding"},
    cost=Cost("2*B*T*S*M + 11*B*T*M*M", "2*M"),
    claim="beta lies in (0, 1): small for words that need the image, large for others: "
    "tests/recurrent/test_sentinel.py::test_learns_when_not_to_look.",
    differs=(
        "No ReLU and tanh layers on sentinel and hidden state and before the words, which the authors' code adds.",
        "Dropout is the caller's.",
    ),
    verified="third-party",
    tries={"attention_dim": 5},
    defaults={"attention_dim": "code, ruotianluo/ImageCaptioning.pytorch"},
)


class SentinelState(NamedTuple):
    """What a step hands to the next: the regions, projected once, and the LSTM's hidden state and memory."""

    context: Float[Tensor, "B S M"]
    keys: Float[Tensor, "B S A"]
    keep: Bool[Tensor, "B S"] | None
    hidden: Float[Tensor, "B M"]
    memory: Float[Tensor, "B M"]


def sentinel_cell(
    gates: Float[Tensor, "B _"], memory: Float[Tensor, "B M"]
) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B M"], Float[Tensor, "B M"]]:
    """One LSTM step from the sums of its gates, in the order i, f, g, o, sentinel -> (h_t, m_t, s_t)."""
    i, f, g, o, look = gates.chunk(5, -1)
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    seen = memory.tanh()
    return o.sigmoid() * seen, memory, look.sigmoid() * seen


def adaptive_attention(
    query: Float[Tensor, "B T A"],
    keys: Float[Tensor, "B S A"],
    sentinel_key: Float[Tensor, "B T A"],
    score: Float[Tensor, " A"],
    values: Float[Tensor, "B S M"],
    sentinel: Float[Tensor, "B T M"],
    keep: Bool[Tensor, "B S"] | None = None,
) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B T S+1"]]:
    """Context vectors and weights alpha; the sentinel's, beta, is the last. Queries and keys are projected."""
    z = torch.tanh(query[:, :, None] + keys[:, None]) @ score
    z_sentinel = torch.tanh(query + sentinel_key) @ score
    if keep is not None:
        keep = nn.functional.pad(keep, (0, 1), value=True)[:, None]
    alpha = normalise(torch.cat([z, z_sentinel[..., None]], -1), keep)
    return alpha[..., :-1] @ values + alpha[..., -1:] * sentinel, alpha


@CARD.module(closed=("hidden",))
class SentinelAttention(Aligner):
    """A decoder LSTM with sentinel over inputs x (B, T, dim), attending to regions (B, S, hidden): (B, T, hidden).

    Args:
        dim: width of the LSTM's inputs (a word, with the image's global feature).
        hidden: width of its state and of the regions; default dim.
        attention_dim: A, in which they are compared; default hidden.
    """

    remembers = True

    def __init__(self, dim: int, *, hidden: int | None = None, attention_dim: int | None = None) -> None:
        hidden = dim if hidden is None else hidden
        attention_dim = hidden if attention_dim is None else attention_dim
        super().__init__(dim, hidden)
        whole(self, attention_dim=attention_dim)
        self.x_proj = nn.Linear(dim, 5 * hidden)
        self.h_proj = nn.Linear(hidden, 5 * hidden, bias=False)
        self.v_proj = nn.Linear(hidden, attention_dim, bias=False)
        self.q_proj = nn.Linear(hidden, attention_dim, bias=False)
        self.s_proj = nn.Linear(hidden, attention_dim, bias=False)
        self.score = nn.Parameter(torch.empty(attention_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.x_proj, self.h_proj, self.v_proj, self.q_proj, self.s_proj):
            layer.reset_parameters()
        nn.init.uniform_(self.score, -(len(self.score) ** -0.5), len(self.score) ** -0.5)

    def start(
        self, x: Float[Tensor, "B T E"], context: Float[Tensor, "B S M"], *, mask: Padding = None
    ) -> SentinelState:
        """The state before the first word; x only tells batch and width, and may have no steps."""
        return self._origin(*self.source(x, context, mask))

    def step(self, x: Float[Tensor, "B t E"], state: SentinelState) -> tuple[Float[Tensor, "B t M"], SentinelState]:
        """The next t words: c + h, and the state after them."""
        hidden, sentinel, state = self.remember(x, state)
        c, _ = self.attend(hidden, sentinel, state)
        return c + hidden, state

    def beta(
        self, x: Float[Tensor, "B T E"], context: Float[Tensor, "B S M"], *, mask: Padding = None
    ) -> Float[Tensor, "B T"]:
        """How much each step relies on the sentinel instead of the image."""
        hidden, sentinel, state = self.remember(x, self.start(x, context, mask=mask))
        return self.attend(hidden, sentinel, state)[1][..., -1]

    def remember(
        self, x: Float[Tensor, "B t E"], state: SentinelState
    ) -> tuple[Float[Tensor, "B t M"], Float[Tensor, "B t M"], SentinelState]:
        """The LSTM: hidden states, sentinels, and the state after them. Attention does not feed back into it."""
        hidden, memory = state.hidden, state.memory
        steps = []
        for sums in self.x_proj(x).unbind(1):
            hidden, memory, sentinel = sentinel_cell(sums + self.h_proj(hidden), memory)
            steps.append((hidden, sentinel))
        state = state._replace(hidden=hidden, memory=memory)
        if not steps:
            nothing = hidden.new_zeros(len(hidden), 0, hidden.shape[-1])
            return nothing, nothing, state
        return torch.stack([h for h, _ in steps], 1), torch.stack([s for _, s in steps], 1), state

    def attend(
        self, hidden: Float[Tensor, "B t M"], sentinel: Float[Tensor, "B t M"], state: SentinelState
    ) -> tuple[Float[Tensor, "B t M"], Float[Tensor, "B t S+1"]]:
        """All steps at once."""
        return adaptive_attention(
            self.q_proj(hidden), state.keys, self.s_proj(sentinel), self.score, state.context, sentinel, state.keep
        )

    def align(
        self, x: Float[Tensor, "B T E"], context: Float[Tensor, "B S M"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T M"]:
        return self.step(x, self._origin(context, keep))[0]

    def _origin(self, context: Tensor, keep: Tensor | None) -> SentinelState:
        zeros = context.new_zeros(len(context), self.context_dim)
        return SentinelState(context, self.v_proj(context), keep, zeros, zeros)

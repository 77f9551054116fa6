"""Input feeding: each step of an LSTM decoder is also given the last step's attentional state.

    h_t = LSTM([x_t; h~_{t-1}], h_{t-1})        h~_t = attention(h_t, context)        h~_0 = 0

So a step knows what earlier ones looked at, and steps are taken in turn. The paper is that of `regard.recurrent.luong`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import checked, whole
from regard.recurrent._aligner import Padding, uniform_
from regard.recurrent.luong import LuongAttention
from regard.recurrent.luong_local import LocalLuongAttention


class DecoderState(NamedTuple):
    """What a step hands to the next."""

    hidden: Float[Tensor, "B M"]
    memory: Float[Tensor, "B M"]
    fed: Float[Tensor, "B M"]
    """The last attentional state."""
    steps: int
    """How many were taken."""


class LuongDecoder(nn.Module):
    """Inputs (B, T, input_dim) and a context (B, S, context_dim) -> attentional states (B, T, dim).

    Args:
        input_dim: width of the decoder's inputs.
        attention: `LuongAttention` or `LocalLuongAttention`; its dim is the LSTM's width.
    """

    def __init__(self, input_dim: int, attention: LuongAttention) -> None:
        super().__init__()
        whole(self, input_dim=input_dim)
        self.input_dim, self.attention = input_dim, attention
        self.cell = nn.LSTMCell(input_dim + attention.dim, attention.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self, 0.1)

    def start(self, x: Float[Tensor, "B T E"]) -> DecoderState:
        """All zeros; put the encoder's last states in `hidden` and `memory` where there are any."""
        zeros = x.new_zeros(len(x), self.attention.dim)
        return DecoderState(zeros, zeros, zeros, 0)

    @checked(E="input_dim")
    def forward(
        self,
        x: Float[Tensor, "B T E"],
        context: Float[Tensor, "B S C"],
        *,
        mask: Padding = None,
        state: DecoderState | None = None,
    ) -> Float[Tensor, "B T M"]:
        """All steps, with the inputs given. `mask` hides tokens of the context."""
        return self.step(x, context, self.start(x) if state is None else state, mask=mask)[0]

    @checked(E="input_dim")
    def step(
        self, x: Float[Tensor, "B t E"], context: Float[Tensor, "B S C"], state: DecoderState, *, mask: Padding = None
    ) -> tuple[Float[Tensor, "B t M"], DecoderState]:
        """The next t steps, and the state after them."""
        hidden, memory, fed, steps = state
        out = []
        for inputs in x.unbind(1):
            hidden, memory = self.cell(torch.cat([inputs, fed], -1), (hidden, memory))
            place = {"first": steps} if isinstance(self.attention, LocalLuongAttention) else {}
            fed = self.attention(hidden[:, None], context, mask=mask, **place)[:, 0]
            steps += 1
            out.append(fed)
        y = torch.stack(out, 1) if out else x.new_zeros(len(x), 0, self.attention.dim)
        return y, DecoderState(hidden, memory, fed, steps)

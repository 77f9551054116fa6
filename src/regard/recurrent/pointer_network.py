"""The model around the pointer: one LSTM reads the inputs, another points at them one by one.

The paper, and what was read of it, stand on the card of `regard.recurrent.pointer`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import checked, refuse, whole
from regard.recurrent._aligner import uniform_
from regard.recurrent.pointer import PointerAttention, pointer_log_probs


class PointerNetwork(nn.Module):
    """The paper's model.

    Args:
        input_dim: width of one input, e.g. 2 for points in the plane.
        hidden: width of both LSTMs, and of the embedded inputs.
        repeats: whether an input may be pointed at twice; False for tours and orderings.
    """

    def __init__(self, input_dim: int, hidden: int, *, repeats: bool = True) -> None:
        super().__init__()
        whole(self, input_dim=input_dim, hidden=hidden)
        self.input_dim, self.repeats = input_dim, repeats
        self.embed = nn.Linear(input_dim, hidden)
        self.start = nn.Parameter(torch.empty(hidden))
        self.encoder = nn.LSTM(hidden, hidden, batch_first=True)
        self.decoder = nn.LSTM(hidden, hidden, batch_first=True)
        self.pointer = PointerAttention(hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_(self, 0.08)

    @checked(I="input_dim")
    def forward(self, inputs: Float[Tensor, "B S I"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T S"]:
        """Log-probabilities of each step's choice, given the choices `targets` before it."""
        self._needs_inputs(inputs)
        if targets.dtype != torch.long:
            refuse(self, "targets", "has the wrong dtype", targets.dtype, "int64", error=TypeError)
        embedded = self.embed(inputs)
        encoded, state = self.encoder(embedded)
        return self.point(embedded, encoded, state, targets, self._unvisited(targets, inputs.shape[1]))

    def point(
        self,
        embedded: Float[Tensor, "B S M"],
        encoded: Float[Tensor, "B S M"],
        state: tuple[Tensor, Tensor],
        targets: Int[Tensor, "B T"],
        allowed: Bool[Tensor, "B T S"] | None = None,
    ) -> Float[Tensor, "B T S"]:
        """The decoder with its choices given: start, then the embedding of each choice but the last."""
        chosen = embedded.gather(1, targets[:, :-1, None].expand(-1, -1, embedded.shape[-1]))
        first = self.start.expand(len(embedded), 1, -1)
        decoded, _ = self.decoder(torch.cat([first, chosen], 1), state)
        return self.pointer(decoded, encoded, mask=allowed)

    @torch.no_grad()
    @checked(I="input_dim")
    def decode(self, inputs: Float[Tensor, "B S I"], steps: int | None = None) -> Int[Tensor, "B T"]:
        """The most probable input at each step, greedily; as many steps as inputs if not said."""
        self._needs_inputs(inputs)
        B, S, _ = inputs.shape
        steps = S if steps is None else steps
        whole(self, 0, most=None if self.repeats else S, steps=steps)
        embedded = self.embed(inputs)
        encoded, state = self.encoder(embedded)
        keys = self.pointer.k_proj(encoded)
        free = torch.ones(B, 1, S, dtype=torch.bool, device=inputs.device)
        step, tour = self.start.expand(B, 1, -1), []
        for _ in range(steps):
            decoded, state = self.decoder(step, state)
            choice = pointer_log_probs(self.pointer.q_proj(decoded), keys, self.pointer.score, free).argmax(-1)
            step = embedded.gather(1, choice[..., None].expand(-1, -1, embedded.shape[-1]))
            if not self.repeats:
                free = free.scatter(-1, choice[..., None], False)
            tour.append(choice)
        return torch.cat(tour, 1) if tour else torch.zeros(B, 0, dtype=torch.long, device=inputs.device)

    def _unvisited(self, targets: Int[Tensor, "B T"], S: int) -> Bool[Tensor, "B T S"] | None:
        """Which inputs are still free at each step."""
        if self.repeats:
            return None
        chosen = nn.functional.one_hot(targets, S)
        return chosen.cumsum(1) - chosen == 0

    def _needs_inputs(self, inputs: Tensor) -> None:
        if inputs.shape[1] < 1:
            refuse(self, "inputs", "is empty", "0 of them", "at least 1 to point at")

"""Knocking-heads attention: one small map, shared by all heads, acts inside the channels of every head.

    linear: q_h <- q_h T_q,   k_h <- k_h T_k,   v_h <- v_h T_v
    mlp:    v_h <- 2 ((v_h W_up) * sigmoid(v_h W_gate)) W_down

Zhou et al. 2025, https://arxiv.org/abs/2510.23052, sections 1-4 (read in full). The maps start as identities
and W_gate as 0, so that training starts from plain attention; they come before any query-key norm and before
rotation. Differs from the paper: nothing known; the paper names the maps diagonal at the start, and that the
diagonal is 1 is inferred.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import FEATURES, Card, Cost, Paper, register
from regard.shapes import HeadShape
from regard.stages import HeadMap


def knock(
    v: Float[Tensor, "B G S V"],
    up: Float[Tensor, "V V"],
    gate: Float[Tensor, "V V"],
    down: Float[Tensor, "V V"],
) -> Float[Tensor, "B G S V"]:
    """The gated map on values. The factor 2 makes it the identity while gate is 0."""
    return 2 * ((v @ up) * torch.sigmoid(v @ gate)) @ down


class KnockingHeads(HeadMap):
    """`mlp` changes the values only (the recommended form); `linear` changes queries, keys and values."""

    def __init__(
        self,
        head_dim: int,
        *,
        value_dim: int | None = None,
        form: Literal["mlp", "linear"] = "mlp",
    ) -> None:
        super().__init__()
        if form not in ("mlp", "linear"):
            raise ValueError(f"KnockingHeads: unknown form {form!r}; expected 'mlp' or 'linear'")
        value_dim = head_dim if value_dim is None else value_dim
        self.form = form

        def square(width: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(width, width))

        if form == "linear":
            self.q_map, self.k_map, self.v_map = square(head_dim), square(head_dim), square(value_dim)
        else:
            self.v_up, self.v_gate, self.v_down = square(value_dim), square(value_dim), square(value_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, weight in self.named_parameters():
            nn.init.zeros_(weight) if name == "v_gate" else nn.init.eye_(weight)

    def forward(
        self, q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], v: Float[Tensor, "B G S V"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.form == "linear":
            return q @ self.q_map, k @ self.k_map, v @ self.v_map
        return q, k, knock(v, self.v_up, self.v_gate, self.v_down)


def _mlp(shape: HeadShape) -> dict[str, object]:
    return {"heads": KnockingHeads(shape.head_dim)}


def _linear(shape: HeadShape) -> dict[str, object]:
    return {"heads": KnockingHeads(shape.head_dim, form="linear")}


_PAPER = Paper(
    "Knocking-Heads Attention", "Zhou, Chen, Chen, Lan, Li", 2025, "2510.23052", "sections 1-4; appendix A.1"
)

CARD = register(
    Card(
        name="knocking_heads",
        family="heads",
        gist="A gated map shared by all heads acts on the channels of each head's values.",
        equation="v_h <- 2 ((v_h W_up) * sigmoid(v_h W_gate)) W_down, the same W for every h",
        paper=_PAPER,
        slots=_mlp,
        supports=FEATURES,
        traits=frozenset({"position_free", "shift_invariant"}),
        cost=Cost("2*B*H*T*S*D + 3*B*G*S*D**2", "2*S*G*D"),
        claim="Starts as plain attention bit for bit: tests/heads/test_knocking.py.",
        differs=("That the identity's diagonal is 1 at the start is inferred.",),
        verified="equation",
    )
)
LINEAR = register(
    Card(
        name="knocking_heads_linear",
        family="heads",
        gist="Square maps shared by all heads act on the channels of each query, key and value head.",
        equation="q_h <- q_h T_q,  k_h <- k_h T_k,  v_h <- v_h T_v, the same T for every h",
        paper=_PAPER,
        slots=_linear,
        supports=FEATURES,
        traits=frozenset({"linear_in_values", "position_free", "shift_invariant"}),
        cost=Cost("2*B*H*T*S*D + B*(H*T + 2*G*S)*D**2", "2*S*G*D"),
        claim="Can be folded into the projections after training: tests/heads/test_knocking.py.",
        differs=("That the identity's diagonal is 1 at the start is inferred.",),
        verified="equation",
    )
)

"""Knocking-heads attention: a gated map shared by all heads acts in the channels of each value."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, whole
from regard.stages import HeadMap

CARD = Card(
    "knocking_heads",
    equation="v_h <- 2 ((v_h W_up) * sigmoid(v_h W_gate)) W_down,   the same W for every h",
    papers=(
        Paper(
            "Knocking-Heads Attention", "Zhou, Chen, Chen, Lan, Li", 2025, "2510.23052", "sections 1-4; appendix A.1"
        ),
    ),
    traits={"position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D + 3*B*G*S*D**2", "2*S*G*D"),
    claim="All heads share one map, which starts as plain attention bit for bit, leaves it, and knocks before scores: "
    "tests/heads/test_knocking.py::test_the_layer_knocks_before_the_scores, "
    "tests/heads/test_knocking.py::test_starts_as_plain_attention_and_leaves_it.",
    differs=("The paper names the maps diagonal at the start; that the diagonal is 1 is inferred.",),
    defaults={"form": "paper, the recommended form"},
)
LINEAR = CARD.variant(
    "knocking_heads_linear",
    "Knocking-heads attention by square maps: one for all queries, one for all keys, one for all values.",
    preset={"form": "linear"},
    equation="q_h <- q_h T_q,   k_h <- k_h T_k,   v_h <- v_h T_v,   the same T for every h",
    traits={"linear_in_values", "position_free", "shift_invariant"},
    cost=Cost("2*B*H*T*S*D + B*(H*T + 2*G*S)*D**2", "2*S*G*D"),
    claim="Can be folded into the projections after training: "
    "tests/heads/test_knocking.py::test_linear_can_be_folded_into_the_projections.",
)


def knock(
    v: Float[Tensor, "B G S V"],
    up: Float[Tensor, "V V"],
    gate: Float[Tensor, "V V"],
    down: Float[Tensor, "V V"],
) -> Float[Tensor, "B G S V"]:
    """The gated map on values. The factor 2 makes it the identity while gate is 0."""
    return 2 * ((v @ up) * torch.sigmoid(v @ gate)) @ down


@CARD.fills("heads", closed=("value_dim",))
class KnockingHeads(HeadMap):
    """`mlp` changes the values only (the recommended form); `linear` changes queries, keys and values.

    It starts as plain attention, and comes before any query-key norm and before rotation.

    Args:
        value_dim: V; default D.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        value_dim: int | None = None,
        form: Literal["mlp", "linear"] = "mlp",
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        whole(self, head_dim=head_dim, value_dim=value_dim)
        choice(self, ("mlp", "linear"), form=form)
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

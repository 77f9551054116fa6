"""Flow-Attention: linear attention as a conserved flow in which sources compete and sinks get a share."""

from typing import Unpack

import torch
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number
from regard.linear._shared import RecurrentMixer
from regard.linear.conserved_flow import FlowState, causal_flow_attention, flow_attention, flow_state
from regard.pipeline.head_mixer import Projections

CARD = Card(
    "flow",
    equation="""q, k <- sigmoid(q), sigmoid(k);   e = 1e-6 in every factor;   sums over the D features of a head
incoming flow of a sink     I_i = (q_i + e) (sum_j k_j + e)     conserved  Ih_i = (q_i + e) (sum_j k_j / O_j + e)
outgoing flow of a source   O_j = (k_j + e) (sum_i q_i + e)     conserved  Oh_j = (k_j + e) (sum_i q_i / I_i + e)
competition c_j = S softmax_j(Oh),   allocation r_i = sigmoid(Ih_i T / S)
out_i = r_i (q_i / I_i) sum_j k_j (c_j v_j)^T
causal: all sums over j <= i; I, O, Ih, Oh are divided by i, a source's c_j is settled when it arrives""",
    papers=(
        Paper(
            "Flowformer: Linearizing Transformers with Conservation Flows",
            "Wu et al.",
            2022,
            "2202.06258",
            "abstract; the authors' code (normal and causal module)",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "cross", "gqa", "streaming", "compile"},
    traits={"nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"},
    cost=Cost("B*H*(T + S)*D*V", "H*(D*V + 4*D + 1) + 1"),
    claim="Linear in length; flows are conserved on both sides: tests/linear/test_flow.py::test_no_square_matrix, "
    "tests/linear/test_flow.py::test_flows_are_conserved.",
    differs=(
        "Factors S and T / S, the bound on conserved outgoing flow and, in the causal form, the divisions by the "
        "number of tokens so far come from the authors' code.",
        "Hidden tokens are neither sinks nor sources; the authors' code takes no mask.",
        "No dropout after the output projection.",
        "The four projections have a bias only with bias=True, as in the authors' code.",
    ),
    verified="third-party",
    defaults={
        "bound": "code",
        "eps": "code",
        "bias": "ours, the authors' code has one",
        "context_dim": "ours, as wide as dim",
    },
)


@CARD.module
class FlowAttention(RecurrentMixer):
    """Linear attention in which sources compete and sinks are allotted their share.

    Args:
        dim, num_heads, rest: as of `HeadMixer`.
        bound: conserved outgoing flows are clamped to [-bound, bound], and their exponentials summed. The authors use
            1, 5 or 10, by folder.
        eps: e, added to every factor of a flow.

    A mask hides keys; of tokens that attend to themselves it hides the queries, too: they no longer take from the flow.
    """

    def __init__(
        self, dim: int, num_heads: int, *, bound: float = 1.0, eps: float = 1e-6, **rest: Unpack[Projections]
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        number(self, above=0, most=50, bound=bound)
        number(self, above=0, eps=eps)
        self.bound, self.eps = bound, eps

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, alone: bool) -> Tensor:
        if alone:  # hidden tokens are left out as sinks and as sources alike
            return self.mix(q, k, v, keep)
        return flow_attention(q, k, v, keep=keep, bound=self.bound, eps=self.eps)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        # Under autocast products come out in half precision, unlike the room's other mechanisms'.
        return self.run(q, k, v, keep, None)[0]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: FlowState | None
    ) -> tuple[Tensor, FlowState | None]:
        if self.causal:
            return causal_flow_attention(q, k, v, keep=keep, state=state, bound=self.bound, eps=self.eps)
        return flow_attention(q, k, v, keep=keep, query_keep=keep, bound=self.bound, eps=self.eps), None

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> FlowState:
        nothing = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype)
        return flow_state(nothing, nothing)

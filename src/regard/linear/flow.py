"""Flow-Attention: queries are sinks and keys are sources of a flow; what all of them share is fixed, so they compete.

    out_i = sigmoid(Ih_i T / S) (q_i / I_i) sum_j k_j (S softmax_j(Oh) v_j)^T

I, O, Ih and Oh, the flows and what conservation makes of them, are in `conserved_flow.py`, with the causal form.
Wu et al. 2022, "Flowformer: Linearizing Transformers with Conservation Flows", https://arxiv.org/abs/2202.06258
(ICML 2022): abstract read, the authors' released module (normal and causal) followed.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._former import Card, Cost, Paper, register
from regard.checks import tokens as check_tokens
from regard.linear.conserved_flow import FlowState, causal_flow_attention, flow_attention, flow_state
from regard.masks import Mask
from regard.pipeline.head_mixer import HeadMixer
from regard.shapes import HeadShape


class FlowAttention(HeadMixer):
    """Linear attention in which sources compete and sinks are allotted their share.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias, context_dim: as of `HeadMixer`.
        bound: conserved outgoing flows are clamped to [-bound, bound]. The authors use 1, 5 or 10.
        eps: added to every factor of a flow.
    """

    supports = frozenset({"causal", "bidirectional", "padding", "cross", "gqa", "streaming", "compile"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        context_dim: int | None = None,
        bound: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        if not 0 < bound <= 50:
            raise ValueError(f"flow: bound must lie in (0, 50] (got {bound}); its exponential is summed")
        if not eps > 0:
            raise ValueError(f"flow: eps must be > 0 (got {eps})")
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            causal=causal,
            bias=bias,
            context_dim=context_dim,
        )
        self.bound, self.eps = bound, eps

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B H T D"]:
        if self.causal:
            return causal_flow_attention(q, k, v, keep=keep, bound=self.bound, eps=self.eps)[0]
        return flow_attention(q, k, v, keep=keep, query_keep=keep, bound=self.bound, eps=self.eps)

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Hidden tokens of x are left out as sinks and as sources alike, so a mask goes with x alone."""
        if context is not None and mask is not None:
            raise ValueError(f"{self._who}: mask hides tokens of x, not of context; leave out one of the two")
        return super().forward(x, context, mask=mask)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FlowState:
        """The state before the first token. Its size does not depend on `capacity`."""
        if not self.causal:
            raise ValueError(f"{self._who}: streaming needs causal=True")
        weight = self.q_proj.weight
        wide = torch.promote_types(weight.dtype if dtype is None else dtype, torch.float32)
        shape = (batch_size, self.num_heads, 0, self.head_dim)
        nothing = torch.zeros(shape, device=weight.device if device is None else device, dtype=wide)
        return flow_state(nothing, nothing)

    def step(self, x: Float[Tensor, "B t M"], state: FlowState) -> tuple[Float[Tensor, "B t M"], FlowState]:
        """The outputs of the next tokens, and the state after them."""
        check_tokens(self._who, "x", x, self.dim)
        if not isinstance(state, FlowState):
            raise TypeError(f"{self._who}: state must be the FlowState of init_state (got {type(state).__name__})")
        if state.tokens.shape[0] != x.shape[0]:
            raise ValueError(
                f"{self._who}: x has batch {x.shape[0]} and state {state.tokens.shape[0]}; they must match"
            )
        out, state = causal_flow_attention(*self.split(x, x), state=state, bound=self.bound, eps=self.eps)
        return self.merge(out), state


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    bound: float = 1.0,
    eps: float = 1e-6,
    bias: bool = False,
) -> FlowAttention:
    return FlowAttention(
        shape.dim,
        shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        causal=causal,
        bias=bias,
        bound=bound,
        eps=eps,
    )


CARD = register(
    Card(
        name="flow",
        family="linear",
        gist="Linear attention as a conserved flow: sources compete, sinks get their share.",
        equation="out_i = sigmoid(Ih_i T/S) (q_i / I_i) sum_j k_j (S softmax_j(Oh) v_j)^T",
        paper=Paper(
            "Flowformer: Linearizing Transformers with Conservation Flows",
            "Wu et al.",
            2022,
            "2202.06258",
            "abstract; the authors' code",
        ),
        build=_build,
        supports=FlowAttention.supports,
        traits=frozenset({"nonnegative", "linear_in_values", "position_free", "shift_invariant", "head_independent"}),
        cost=Cost("B*H*(T + S)*D*V", "H*(D*V + 4*D + 1) + 1"),
        claim="Linear in length; flows are conserved on both sides: tests/linear/test_flow.py.",
        differs=(
            "Factors S and T/S, the bound on conserved outgoing flow and, in the causal form, the divisions by the "
            "number of tokens so far come from the authors' code.",
            "Hidden tokens are neither sinks nor sources; the authors' code takes no mask.",
            "No dropout after the output projection.",
        ),
        verified="third-party",
    )
)

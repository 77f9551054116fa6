"""Gated attention: a sigmoid gate of the query's own token scales what each head puts out."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, refuse
from regard.stages import Gate, GateSite
from regard.weights import Loaded, same, woven

CARD = Card(
    "gated",
    equation="O'_h = O_h * sigmoid(x W_g)_h,   W_g gives one number per head (headwise) or per channel (elementwise)",
    papers=(
        Paper(
            "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
            "Qiu et al.",
            2025,
            "2505.06708",
            "abstract; the gate's formula; official code for the output gate; the other sites and forms are inferred",
        ),
    ),
    traits={"linear_in_values", "position_free", "shift_invariant", "head_independent"},
    cost=Cost("2*B*H*T*S*D + B*T*M*H*D", "2*S*G*D"),
    claim="A head can put out nothing without a sink token: "
    "tests/heads/test_sigmoid_gate.py::test_a_head_can_do_nothing_without_a_sink.",
    differs=("The gate has a projection of its own, not rows interleaved with the query's.",),
    verified="third-party",
    tasks=("text",),
    defaults={
        "site": "paper",
        "granularity": "ours, both are released",
        "combine": "paper",
        "activation": "paper",
        "shared": "paper",
    },
)
HEADWISE = CARD.variant(
    "gated_headwise",
    "Gated attention with one gate per head: a sigmoid of the query's token scales its output.",
    preset={"granularity": "headwise"},
    cost=Cost("2*B*H*T*S*D + B*T*M*H", "2*S*G*D"),
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}


def apply_gate(z: Tensor, logits: Tensor, *, combine: str = "multiply", activation: str = "sigmoid") -> Tensor:
    """z * activation(logits), or z + activation(logits)."""
    gate = _ACTIVATIONS[activation](logits)
    return z * gate if combine == "multiply" else z + gate


@CARD.fills("gate", closed=("bias",))
class SigmoidGate(Gate):
    """A gate at one site of the pipeline; `proj` maps the token to its logits.

    The defaults are the form that the authors released.

    Args:
        site: what is gated: each head's output, its queries, keys or values, or the output projection's ("dense").
        granularity: a gate for each channel, or for each head.
        combine: whether the gate multiplies or is added.
        activation: of the gate's logits.
        shared: one gate for all heads.
        bias: whether `proj` has one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        site: GateSite = "output",
        granularity: Literal["elementwise", "headwise"] = "elementwise",
        combine: Literal["multiply", "add"] = "multiply",
        activation: Literal["sigmoid", "silu"] = "sigmoid",
        shared: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        choice(self, get_args(GateSite), site=site)
        choice(self, ("elementwise", "headwise"), granularity=granularity)
        choice(self, ("multiply", "add"), combine=combine)
        choice(self, _ACTIVATIONS, activation=activation)
        if site == "dense" and (granularity == "headwise" or shared):
            refuse(self, "site", "has no heads", "'dense' with headwise or shared gates", "elementwise, not shared")
        if head_dim is None:
            divides(self, num_heads=num_heads, dim=dim)
        self.site, self.combine, self.activation = site, combine, activation
        heads = num_kv_heads or num_heads if site in ("key", "value") else num_heads
        heads = 1 if shared or site == "dense" else heads
        width = {"headwise": 1, "elementwise": head_dim or dim // num_heads}[granularity]
        self.gate_shape = (heads, dim if site == "dense" else width)
        self.proj = nn.Linear(dim, self.gate_shape[0] * self.gate_shape[1], bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.proj.weight, std=0.02)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def start_neutral(self) -> bool:
        """Nearly open, by its bias alone: sigmoid(4) = 0.982 lets nearly all through and still learns."""
        if self.proj.bias is None:
            weight = self.proj.weight
            self.proj = nn.Linear(*weight.shape[::-1], device=weight.device, dtype=weight.dtype)
        silu, multiply = self.activation == "silu", self.combine == "multiply"
        # silu(1.2785) = 1 and silu(0) = 0 leave the output exactly as it was.
        start = (1.2784645 if silu else 4.0) if multiply else (0.0 if silu else -8.0)
        nn.init.zeros_(self.proj.weight)
        nn.init.constant_(self.proj.bias, start)
        return True

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        if at != self.site:
            return z
        logits = self.proj(x)
        if at != "dense":
            logits = logits.unflatten(-1, self.gate_shape).transpose(1, 2)
        return apply_gate(z, logits, combine=self.combine, activation=self.activation)


@CARD.loads("transformers", "Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")
def _beside_the_queries(theirs: Any) -> Loaded:
    """One projection has the rows of each head's query, then of its gate."""
    H, D, M = theirs.config.num_attention_heads, theirs.head_dim, theirs.config.hidden_size
    biased = theirs.q_proj.bias is not None
    moves = woven(theirs, ("q_proj", "gate.proj"), "q_proj", H)
    return Loaded(lambda: SigmoidGate(M, H, head_dim=D, bias=biased), moves)


@CARD.loads("transformers", "AfmoeAttention")
def _apart(theirs: Any) -> Loaded:
    H, D, M = theirs.config.num_attention_heads, theirs.head_dim, theirs.config.hidden_size
    return Loaded(lambda: SigmoidGate(M, H, head_dim=D), same(theirs, {"gate.proj": "gate_proj"}))

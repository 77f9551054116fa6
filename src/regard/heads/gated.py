"""Gated attention: a sigmoid gate, computed from the query's own token, scales what each head puts out.

    O'_h = O_h * sigmoid(x W_g)_h        W_g gives one number per head (headwise) or per channel (elementwise)

Qiu et al. 2025, https://arxiv.org/abs/2505.06708: abstract and the gate's formula read; the authors' released
code followed for the gate on the attention output. The other sites (value, key, query, after the output
projection), the additive and the SiLU form and the gate shared by heads are variants that the paper compares;
their equations are inferred. Differs from the paper: the gate has a projection of its own instead of rows
interleaved with the query projection's.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.card import FEATURES, Card, Cost, Paper, register
from regard.kinds import Gate, GateSite, HeadShape

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": nn.functional.silu}


def apply_gate(z: Tensor, logits: Tensor, *, combine: str = "multiply", activation: str = "sigmoid") -> Tensor:
    """z * activation(logits), or z + activation(logits)."""
    gate = _ACTIVATIONS[activation](logits)
    return z * gate if combine == "multiply" else z + gate


class SigmoidGate(Gate):
    """A gate at one site of the pipeline; `proj` maps the token to its logits."""

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("site", site, get_args(GateSite)),
            ("granularity", granularity, ("elementwise", "headwise")),
            ("combine", combine, ("multiply", "add")),
            ("activation", activation, tuple(_ACTIVATIONS)),
        ):
            if given not in known:
                raise ValueError(f"SigmoidGate: unknown {name} {given!r}; expected one of {', '.join(known)}")
        if site == "dense" and (granularity == "headwise" or shared):
            raise ValueError("SigmoidGate: heads are merged at site 'dense'; expected elementwise, not shared")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"SigmoidGate: dim {dim} is no multiple of num_heads {num_heads}; pass head_dim")
        self.site, self.combine, self.activation = site, combine, activation
        heads = num_kv_heads or num_heads if site in ("key", "value") else num_heads
        heads = 1 if shared or site == "dense" else heads
        width = {"headwise": 1, "elementwise": head_dim or dim // num_heads}[granularity]
        self.gate_shape = (heads, dim if site == "dense" else width)
        self.proj = nn.Linear(dim, self.gate_shape[0] * self.gate_shape[1], bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.proj.weight, std=0.02)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        if at != self.site:
            return z
        logits = self.proj(x)
        if at != "dense":
            logits = logits.unflatten(-1, self.gate_shape).transpose(1, 2)
        return apply_gate(z, logits, combine=self.combine, activation=self.activation)


def _slots(
    shape: HeadShape,
    *,
    granularity: Literal["elementwise", "headwise"] = "elementwise",
    site: GateSite = "output",
    combine: Literal["multiply", "add"] = "multiply",
    activation: Literal["sigmoid", "silu"] = "sigmoid",
    shared: bool = False,
) -> dict[str, object]:
    gate = SigmoidGate(
        shape.dim,
        shape.num_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_kv_heads,
        site=site,
        granularity=granularity,
        combine=combine,
        activation=activation,
        shared=shared,
    )
    return {"gate": gate}


def _headwise(shape: HeadShape) -> dict[str, object]:
    return _slots(shape, granularity="headwise")


def _card(name: str, gist: str, slots, cost: str) -> Card:
    return Card(
        name=name,
        family="heads",
        gist=gist,
        equation="O' = O * sigmoid(x W_g)",
        paper=Paper(
            "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free",
            "Qiu et al.",
            2025,
            "2505.06708",
            "abstract; official code for the output gate",
        ),
        slots=slots,
        supports=FEATURES,
        traits=frozenset({"linear_in_values", "position_free", "shift_invariant", "head_independent"}),
        cost=Cost(cost, "2*S*G*D"),
        claim="A head can put out nothing without a sink token: tests/heads/test_gated.py.",
        differs=("The gate has a projection of its own, not rows interleaved with the query's.",),
        verified="third-party",
    )


CARD = register(
    _card(
        "gated",
        "A sigmoid gate per channel, from the query token, on each head's output.",
        _slots,
        "2*B*H*T*S*D + B*T*M*H*D",
    )
)
HEADWISE = register(
    _card(
        "gated_headwise",
        "One sigmoid gate per head, from the query token, on its output.",
        _headwise,
        "2*B*H*T*S*D + B*T*M*H",
    )
)

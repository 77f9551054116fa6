"""Infini-attention: softmax inside a segment, and a linear memory of all segments before it."""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import divides, fits, flag, number, refuse, whole
from regard.kernels.check import check_inputs
from regard.linear._infini import InfiniState, all_segments, onwards
from regard.linear._shared import RecurrentMixer, repeat_heads, widened
from regard.pipeline.head_mixer import Projections
from regard.positions._shared import frequencies

CARD = Card(
    "infini",
    equation="""out = g A_dot + (1 - g) A_mem,   g = sigmoid(beta), one a head;   A_dot alone in the first segment
A_dot: causal softmax attention inside a segment of C tokens, rotated, with places that start at 0 in each
A_mem = sigma(q) M / (sigma(q) z) of the segments before,   sigma = elu + 1,   q and k as they are, not rotated
after each segment:  M <- M + sigma(k)^T v,   z <- z + sum sigma(k)
delta:  v - sigma(k) M / (sigma(k) z) in place of v""",
    papers=(
        Paper(
            "Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention",
            "Munkhdalai, Faruqui, Gopal",
            2024,
            "2404.07143",
            "accounts of its equations; a public implementation (infini-transformer-pytorch)",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    traits={"normalised", "nonnegative", "linear_in_values", "shift_invariant", "head_independent"},
    cost=Cost(
        "B*T*D*(H*(min(S, segment) + 1) + (H + G)*(D + 1)*min(1, max(0, S - segment)))",
        "2*G*D*(D + 1 + min(S, segment))",
    ),
    claim="A fact of segments ago is read from a state that has stopped growing: "
    "tests/linear/test_infini.py::test_a_fact_of_segments_ago.",
    differs=(
        "The gate stands on A_dot, as in the public implementation, where the paper has sigmoid(beta) on A_mem: the "
        "same function of -beta.",
        "Segments count real tokens alone, so that padding moves no segment.",
        "The public implementation takes segments as they are given: `InfiniState.closed` ends one early.",
    ),
    verified="third-party",
    example={"segment": 5, "gate_init": 0.5},
    defaults={
        "segment": "ours, the paper's by accounts",
        "delta": "code, infini-transformer-pytorch",
        "rotary_base": "code, infini-transformer-pytorch",
        "gate_init": "code, infini-transformer-pytorch",
        "pre_norm": "ours, the block around it norms",
        "bias": "code, infini-transformer-pytorch",
    },
)


def infini_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    gate: Float[Tensor, " H"],
    w: Float[Tensor, " half"] | None = None,
    keep: Bool[Tensor, "B T"] | None = None,
    *,
    segment: int = 2048,
    delta: bool = False,
    state: InfiniState | None = None,
) -> tuple[Float[Tensor, "B H T V"], InfiniState | None]:
    """Outputs; from a `state`, also the state after these tokens.

    Args:
        gate: beta; large is local.
        w: by how much neighbouring pairs of channels turn from place to place inside a segment; None: not at all.
        keep: True = a real token.
        segment: C.
        delta: whether the memory takes what it doesn't say already.

    Raises:
        ValueError: shapes that don't fit together, or no token a segment.
    """
    check_inputs(q, k, v)
    fits("infini_attention", "H", {"H": q.shape[1]}, gate=gate)
    whole("infini_attention", segment=segment)
    q, k, v, gate = widened(q, k, v, gate)
    gate = gate.sigmoid()[:, None, None]
    if state is None:
        return all_segments(q, k, v, gate, w, keep, segment, delta), None
    outs = [torch.zeros_like(repeat_heads(v[:, :, :0], q.shape[1]))]
    for start in range(0, q.shape[2], segment):
        part = slice(start, start + segment)
        kept = None if keep is None else keep[:, part]
        out, state = onwards(q[:, :, part], k[:, :, part], v[:, :, part], gate, w, kept, segment, delta, state)
        outs.append(out)
    return torch.cat(outs, 2), state


@CARD.module(closed=("context_dim",))
class Infini(RecurrentMixer):
    """Multi-head Infini-attention, causal alone; arguments as of `HeadMixer`.

    Args:
        segment: C, tokens of a segment.
        delta: whether the memory takes what it doesn't say already.
        rotary_base: of the turns inside a segment, of neighbouring channels; None: none.
        gate_init: what each head's beta starts as; at 10 the memory counts for next to nothing.
        pre_norm: whether x is divided by its root mean square, and scaled by a weight, before the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        segment: int = 2048,
        delta: bool = False,
        rotary_base: float | None = 10000.0,
        gate_init: float = 10.0,
        pre_norm: bool = False,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        if not self.causal:
            refuse(self, "causal", "is off, and the memory is that of earlier segments", False, "True")
        whole(self, segment=segment)
        flag(self, delta=delta, pre_norm=pre_norm)
        number(self, gate_init=gate_init)
        if rotary_base is not None:
            number(self, above=1, rotary_base=rotary_base)
            divides(self, pair=2, head_dim=self.head_dim)
        self.segment, self.delta, self.rotary_base, self.gate_init = segment, delta, rotary_base, gate_init
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.norm_weight = nn.Parameter(torch.empty(dim)) if pre_norm else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """beta at its start, the norm's weight at 1; the projections reset themselves."""
        self.gate.fill_(self.gate_init)
        if self.norm_weight is not None:
            self.norm_weight.fill_(1)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.norm_weight is not None:
            (wide,) = widened(x)
            x = (F.normalize(wide, dim=-1) * math.sqrt(self.dim)).to(x.dtype) * self.norm_weight
        return super().split(x, x)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: InfiniState | None
    ) -> tuple[Tensor, InfiniState | None]:
        w = None if self.rotary_base is None else frequencies(self.head_dim, self.rotary_base, q.device)
        return infini_attention(q, k, v, self.gate, w, keep, segment=self.segment, delta=self.delta, state=state)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> InfiniState:
        B, G, D = batch_size, self.num_kv_heads, self.head_dim
        sums = torch.zeros(B, G, D, D + 1, device=device, dtype=dtype)
        none = sums.new_zeros(B, G, 0, D)
        count = torch.zeros(B, device=device, dtype=torch.long)
        return InfiniState(sums, sums.clone(), none, none.clone(), count, count.bool())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segment={self.segment}, delta={self.delta}"

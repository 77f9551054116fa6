"""HGRN2: a gated recurrence of a matrix a head, whose keys are what its bounded forget gate forgets."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import divides, whole
from regard.kernels.linear_scan import linear_scan
from regard.linear.hgrn import BoundedRecurrence
from regard.tracing import as_it_is

CARD = Card(
    "hgrn2",
    equation="""f = sigmoid(x W_f);  in layer l > 0:  f <- g_l + (1 - g_l) f,   g_l = sum_{0 < m <= l} softmax(b)_m
q = silu(x W_q),   k = 1 - f,   v = x W_i
S_t = diag(f_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t / sqrt(D)          (each head)
y_t = W_o (w * o_t / sqrt(mean(o_t^2) + eps)),   o_t all heads side by side""",
    papers=(
        Paper(
            "HGRN2: Gated Linear RNNs with State Expansion",
            "Qin et al.",
            2024,
            "2404.07904",
            "layer of flash-linear-attention, in part by the same authors; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*(M*(2*H*state_dim + M) + 32*H*state_dim + 64*M + 2.5*state_dim*M)",
        "state_dim*M + max(0, conv_size - 1)*(2*H*state_dim + M)",
    ),
    claim="What is forgotten makes room for what is written: a token that forgets all is all that is read, and one "
    "that forgets nothing is never read: tests/linear/test_hgrn2.py::test_forgetting_is_writing.",
    differs=(
        "Heads are given by their number; in the released layer that follows from their width, 128.",
        "Each layer has the table of all layers' bounds, which regard.share makes one; the first layer has none.",
    ),
    example={"layers": 4, "layer": 2, "conv_size": 3, "state_dim": 3},
    tries={"layers": {"layers": 5, "layer": 2}, "layer": {"layers": 4, "layer": 3}},
    defaults={
        "state_dim": "code, flash-linear-attention: as wide as values",
        "layers": "ours, one",
        "layer": "ours, the first",
        "conv_size": "code, flash-linear-attention",
        "eps": "code, flash-linear-attention",
    },
)


class HGRN2State(NamedTuple):
    """All the past leaves behind, whatever its length."""

    s: Float[Tensor, "B H D V"]
    inputs: Float[Tensor, "B past C"]
    """The last inputs of the convolution; none without one."""


@CARD.module
class HGRN2(BoundedRecurrence):
    """The HGRN2 token mixer.

    Args:
        dim, num_heads: M and H; values are M / H wide.
        state_dim: D, features of a head's queries and forget gate; default M / H.
        layers, layer: L, and which of them this is, from 0: the first has no bound. Layers are bound together by
            `regard.share`.
        conv_size: taps of a convolution on queries, forget gate and values; 0: none.
        eps: of the root mean square.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        state_dim: int | None = None,
        layers: int = 1,
        layer: int = 0,
        conv_size: int = 0,
        eps: float = 1e-5,
    ) -> None:
        who = type(self).__name__
        whole(who, dim=dim, num_heads=num_heads)
        divides(who, num_heads=num_heads, dim=dim)
        state_dim = dim // num_heads if state_dim is None else state_dim
        whole(who, state_dim=state_dim)
        width, sizes = num_heads * state_dim, {"layers": layers, "layer": layer, "conv_size": conv_size}
        super().__init__(dim, (width, width, dim), dim, **sizes, eps=eps)
        self.num_heads, self.state_dim = num_heads, state_dim
        self.reset_parameters()

    def run(
        self, x: Tensor, state: HGRN2State | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, HGRN2State]:
        projected = self.in_proj(x)
        with as_it_is(x.device):
            s, past = (None, None) if state is None else state
            (q, _, v), decay, k, inputs = self.read(projected, past, keep, starts)
            q = F.silu(q) / math.sqrt(self.state_dim)
            q, k, v, decay = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (q, k, v, decay))
            out, last = linear_scan(q, k, v, decay, state=s, starts=starts)
            out = self.normed(out.transpose(1, 2).flatten(2)).to(projected.dtype)
        return self.o_proj(out), HGRN2State(last, inputs)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> HGRN2State:
        shape = (batch_size, self.num_heads, self.state_dim, self.dim // self.num_heads)
        s = torch.zeros(shape, device=device, dtype=dtype)
        return HGRN2State(s, self.empty_inputs(batch_size, device, dtype))

"""mLSTM: a matrix memory with exponential input gates, kept in bounds by a running maximum."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, number
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import linear_scan
from regard.kernels.max_scan import max_scan
from regard.linear._recurrence import Recurrence
from regard.linear._scanned import widths
from regard.linear._shared import widened, with_ones
from regard.tracing import as_it_is
from regard.weights import Loaded, only, same, stacked

CARD = Card(
    "mlstm",
    equation="""i, f = c tanh((x W_i + b_i) / c), c tanh((x W_f + b_f) / c), one a head;   q, k, v = x W_q, x W_k, x W_v
m_t = max(log(sigmoid(f_t)) + m_{t-1}, i_t),   m_0 = 0
C_t = exp(log(sigmoid(f_t)) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t^T v_t,   n_t likewise with 1 for v_t
h_t = (q_t C_t / sqrt(D)) / (max(|q_t n_t| / sqrt(D), exp(-m_t)) + eps)
y_t = W_o (layer_norm(h_t) * w * sigmoid(x_t W_g)), each head normed by itself""",
    papers=(
        Paper(
            "xLSTM: Extended Long Short-Term Memory",
            "Beck et al.",
            2024,
            "2405.04517",
            "official code (xlstm_large/model.py); the layer of transformers; not the paper's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*M*(value_expand*M + 2*H + 64*(key_expand + value_expand) + 2.3*key_expand*value_expand*D)",
        "M*(key_expand*value_expand*D + key_expand) + H",
    ),
    claim="A token with a closed forget gate resets the memory, and one with a huge input gate takes it over, without "
    "overflow: tests/linear/test_mlstm.py::test_gates_reset_and_take_over.",
    differs=(
        "Hidden tokens leave the memory as it is; the released layers know no padding.",
        "Of the released block the mixer alone: norm, residual and feed-forward are left to the model.",
        "Matrices start with deviation sqrt(2 / 5 M), the last one's as torch has it: the released model's depends on "
        "the number of layers.",
    ),
    verified="third-party",
    example={"key_expand": 0.5},
    tries={"key_expand": 1.0, "gate_cap": 1.0},
    defaults={
        "key_expand": "code",
        "value_expand": "code",
        "gate_cap": "code",
        "eps": "code",
        "norm_eps": "code",
    },
)


class MatrixMemory(NamedTuple):
    """What is remembered, divided by exp(top)."""

    values: Float[Tensor, "B H D V"]
    keys: Float[Tensor, "B H D"]
    top: Float[Tensor, "B H"]


class Remembered(NamedTuple):
    """What came out, and all that the past leaves behind."""

    out: Float[Tensor, "B H T V"]
    state: MatrixMemory


@checked()
def matrix_memory(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    input_gate: Float[Tensor, "B H T"],
    forget_gate: Float[Tensor, "B H T"],
    *,
    eps: float = 1e-6,
    keep: Bool[Tensor, "B T"] | None = None,
    state: MatrixMemory | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
) -> Remembered:
    """h_t as the card has it, and the last C, n and m.

    Signed weights exp(log(sigmoid(f_{j+1})) + .. + log(sigmoid(f_t)) + i_j) q_t . k_j / sqrt(D), over the absolute
    value of their sum, or over 1 where that is more. No weight overflows: all are scaled by the greatest gate so far.
    Hidden tokens leave the memory as it is. In at least float32.

    Args:
        input_gate, forget_gate: logits: of an exponential, and of a sigmoid.
        eps: added to what is divided by, which is scaled as well.
        state: what the call before gave; None: nothing came before, and m is 0.
        starts: True at the first token of each packed document, as in `linear_scan`.

    Raises:
        ValueError: shapes that don't fit together.
    """
    check_inputs(q, k, v)
    (B, H, T, D), V = q.shape, v.shape[3]
    q, k, v, gate, forget = widened(q, k, v, input_gate, forget_gate)
    lost = F.logsigmoid(forget)
    if keep is not None:
        gate, lost = gate.masked_fill(~keep[:, None], -torch.inf), lost.masked_fill(~keep[:, None], 0)
    none = MatrixMemory(q.new_zeros(B, H, D, V), q.new_zeros(B, H, D), q.new_zeros(B, H))
    values, keys, top = none if state is None else state
    # A document begins with m = 0, which its first token may exceed.
    most = gate if starts is None else torch.where(starts[:, None], torch.maximum(gate, lost), gate)
    tops, last = max_scan(most.mT, lost.mT, state=top, starts=starts)
    # What is divided by what is scaled alike does not depend on the scale, but for eps.
    m = tops.detach().mT
    before = torch.cat([top.detach()[..., None].to(m.dtype), m], -1)[..., :T]
    if starts is not None:
        before = before.masked_fill(starts[:, None], 0)
    past = torch.cat([values, keys[..., None]], -1)
    written = (gate - m).exp()[..., None] * k
    out, after = linear_scan(q / math.sqrt(D), written, with_ones(v), (before - m) + lost, state=past, starts=starts)
    limit = math.log(torch.finfo(m.dtype).max) * 0.9  # where nothing of size is left over it
    least = (-m).clamp(max=limit).exp()[..., None]
    total = torch.maximum(out[..., -1:].abs(), least) + eps * (tops.mT - m).exp()[..., None]
    return Remembered(out[..., :-1] / total, MatrixMemory(after[..., :-1], after[..., -1], last if T else top))


@CARD.module
class MLSTM(Recurrence):
    """The token mixer of xLSTM's mLSTM layer, as in xLSTM-7B.

    Args:
        dim, num_heads: M and H.
        key_expand, value_expand: width of all queries, and of all values, in terms of M.
        gate_cap: c, beyond which no gate's logit goes.
        eps: added to what is divided by.
        norm_eps: of the layer norm.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_expand: float = 0.5,
        value_expand: float = 1.0,
        gate_cap: float = 15.0,
        eps: float = 1e-6,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        D, V = widths(self, dim, num_heads, key_expand=key_expand, value_expand=value_expand)
        number(self, above=0, gate_cap=gate_cap)
        number(self, least=0, eps=eps, norm_eps=norm_eps)
        self.dim, self.num_heads, self.key_dim, self.value_dim = dim, num_heads, D, V
        self.gate_cap, self.eps, self.norm_eps = gate_cap, eps, norm_eps
        self.q_proj = nn.Linear(dim, num_heads * D, bias=False)
        self.k_proj = nn.Linear(dim, num_heads * D, bias=False)
        self.v_proj = nn.Linear(dim, num_heads * V, bias=False)
        self.gate_proj = nn.Linear(dim, num_heads * V, bias=False)
        self.input_gate = nn.Linear(dim, num_heads)
        self.forget_gate = nn.Linear(dim, num_heads)
        self.norm_weight = nn.Parameter(torch.empty(num_heads * V))
        self.o_proj = nn.Linear(num_heads * V, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates don't depend on the token yet: little is written, less is forgotten in later heads, half goes out."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / (5 * self.dim)))
        for linear in (self.gate_proj, self.input_gate, self.forget_gate):
            nn.init.zeros_(linear.weight)
        nn.init.constant_(self.input_gate.bias, -10.0)
        spread = torch.linspace(3.0, 6.0, self.num_heads, device=self.norm_weight.device, dtype=torch.float32)
        self.forget_gate.bias.copy_(spread)
        nn.init.ones_(self.norm_weight)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"

    def run(
        self, x: Tensor, state: MatrixMemory | None, keep: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, MatrixMemory]:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in projected)
        out_gate = self.gate_proj(x)
        with as_it_is(x.device):
            gates = [self.capped(layer, x) for layer in (self.input_gate, self.forget_gate)]
            h, state = matrix_memory(q, k, v, *gates, eps=self.eps, keep=keep, state=state, starts=starts)
            h = F.layer_norm(h, (self.value_dim,), eps=self.norm_eps).transpose(1, 2).flatten(2)
            h = (h * self.norm_weight * torch.sigmoid(out_gate)).to(out_gate.dtype)
        return self.o_proj(h), state

    def capped(self, layer: nn.Linear, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T"]:
        """A gate's logits, which exponentials follow, in at least float32."""
        wide, weight, bias = widened(x, layer.weight, layer.bias)
        return self.gate_cap * torch.tanh(F.linear(wide, weight, bias) / self.gate_cap).mT

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> MatrixMemory:
        shapes = (self.key_dim, self.value_dim), (self.key_dim,), ()
        lead = (batch_size, self.num_heads)
        return MatrixMemory(*(torch.zeros(*lead, *shape, device=device, dtype=dtype) for shape in shapes))


@CARD.loads("transformers", "xLSTMLayer")
def _xlstm(theirs: Any) -> Loaded:
    config = theirs.config
    only(config, {"use_bias": False})
    names = {f"{n}_proj": n for n in "qkv"} | {"gate_proj": "ogate_preact", "o_proj": "out_proj"}
    names |= {"input_gate": "igate_preact", "forget_gate": "fgate_preact", "norm_weight": "multihead_norm.weight"}
    moves = same(theirs, names)
    if config.weight_mode == "fused":
        rows = (theirs.qk_dim, theirs.qk_dim, theirs.v_dim, theirs.v_dim)
        moves += stacked(theirs, ["q_proj", "k_proj", "v_proj", "gate_proj"], "qkv_opreact", rows)
        moves += stacked(theirs, ["input_gate", "forget_gate"], "ifgate_preact")
    options = {
        "key_expand": theirs.qk_dim / config.hidden_size,
        "value_expand": theirs.v_dim / config.hidden_size,
        "gate_cap": config.gate_soft_cap,
        "eps": config.eps,
        "norm_eps": config.norm_eps,
    }
    return Loaded(lambda: MLSTM(config.hidden_size, config.num_heads, **options), moves)

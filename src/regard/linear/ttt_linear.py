"""TTT-Linear: the state is a linear model, trained by a gradient step on each mini-batch of tokens."""

import math
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, fits, flag, number, refuse, whole
from regard.kernels.check import check_inputs
from regard.linear._recurrence import conv_of_real, torch_taps
from regard.linear._shared import RecurrentMixer, widened
from regard.linear._ttt import EPS, Affine, Residual, TTTState, places, taught
from regard.pipeline.head_mixer import Projections
from regard.positions._shared import angles, frequencies
from regard.positions.rotary import rotate

CARD = Card(
    "ttt_linear",
    equation="""f(u) = LN(u W + b) * w + c, one a head;   a token's loss: |f(k_t) - (v_t - k_t)|^2 / 2
g_t = its gradient with respect to k_t W + b, at the W, b of the mini-batch's start
W_i = W - sum_{j <= i} eta_ij k_j^T g_j,   b_i = b - sum_{j <= i} eta_ij g_j,   j of the same mini-batch of n tokens
out_i = q_i + LN(q_i W_i + b_i) * w + c;   its end: W, b <- W_n, b_n
eta_ij = max(0, 1 / i + p_i) base sigmoid(x_j W_e + b_e) / D;   y = W_o LN(out), gate: * gelu(x W_g)""",
    papers=(
        Paper(
            "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
            "Sun et al.",
            2024,
            "2407.04620",
            "the authors' code (ttt-lm-pytorch)",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "compile"},
    lacks={"cross": "a token's own query reads what its key and value have taught"},
    traits={"shift_invariant", "sparse"},
    cost=Cost("B*H*T*(3*D*(D + 1) + 2*mini_batch*(D + 1) + M)", "2*H*D*(D + 1) + H"),
    claim="The loss of pairs that come again falls along a sequence, which the state learns without any training: "
    "tests/linear/test_ttt_linear.py::test_what_comes_again_is_learnt.",
    differs=(
        "Mini-batches count real tokens alone, so that padding moves none; the authors' code takes none.",
        "form='fla' is flash-linear-attention's naive function: eta_i, the rate of the token that reads, weighs all "
        "gradients, q is divided by sqrt(D), and what LN is added to is q_i W_i + b_i, not q_i.",
        "The open mini-batch's gradients are part of the state, so that any number of tokens may come next.",
        "Left out: TTT-MLP, and the convolution before the whole layer.",
    ),
    verified="third-party",
    exceptions={
        "L32 compiled_for_any_length": "mini-batches follow one another, so that each number of them is another graph",
    },
    example={"mini_batch": 5},
    tries={"conv_size": {"share_qk": True, "conv_size": 3}},
    defaults=dict.fromkeys(
        ("mini_batch", "base_rate", "form", "share_qk", "conv_size", "gate", "rotary_base", "bias"), "code"
    ),
)

Form = Literal["official", "fla"]


def taught_linear(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    reading: Float[Tensor, "B H T"],
    writing: Float[Tensor, "B H T"],
    norm: tuple[Float[Tensor, "H D"], Float[Tensor, "H D"]] | None,
    *,
    start: Float[Tensor, "H D1 D"] | None = None,
    mini_batch: int = 16,
    residual: Residual = "query",
    keep: Bool[Tensor, "B T"] | None = None,
    state: TTTState | None = None,
) -> tuple[Float[Tensor, "B H T D"], TTTState]:
    """Outputs before the layer's own norm, and the state after these tokens. eta_ij is reading_i times writing_j.

    Args:
        norm: w and c; None: neither they nor LN, in the loss and in what is read.
        start: W, and b as its last row, before the first token; default 0.
        residual: what LN(z) is added to, the query or z = q W + b itself.
        keep: True = a real token.

    Raises:
        ValueError: shapes that don't fit together, or no token a mini-batch.
    """
    check_inputs(q, k, v)
    whole("taught_linear", mini_batch=mini_batch)
    choice("taught_linear", get_args(Residual), residual=residual)
    B, H, T, D = q.shape
    sizes = {"B": B, "H": H, "T": T, "D": D, "D1": D + 1}
    fits("taught_linear", "B H T D", sizes, k=k, v=v)
    fits("taught_linear", "B H T", sizes, reading=reading, writing=writing)
    for name, z in zip(("norm weight", "norm bias"), norm or (), strict=False):
        fits("taught_linear", "H D", sizes, **{name: z})
    q, k, v, reading, writing = widened(q, k, v, reading, writing)
    affine: Affine | None = None if norm is None else (norm[0].to(q.dtype)[:, None], norm[1].to(q.dtype)[:, None])
    if start is not None:
        fits("taught_linear", "H D1 D", sizes, start=start)
        start = start.to(q.dtype)
    return taught(q, k, v, reading, writing, affine, start, mini_batch, residual, keep, state)


@CARD.module(closed=("context_dim",))
class TTTLinear(RecurrentMixer):
    """The layer of TTT-Linear, causal alone; arguments as of `HeadMixer`, with as many key heads as query heads.

    Args:
        mini_batch: n, tokens whose gradients are taken at one W.
        base_rate: of learning, times a sigmoid of the token, over D.
        form: whose rates and residuals, as the card says: "official" or "fla".
        share_qk: whether queries and keys are one projection behind convolutions of their own, as in the authors'
            Mamba-like block.
        conv_size: taps of these.
        gate: whether gelu(x W_g) multiplies what the norm gives, as in that block.
        rotary_base: of the turns inside a mini-batch, of neighbouring channels; None: none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mini_batch: int = 16,
        base_rate: float = 1.0,
        form: Form = "official",
        share_qk: bool = False,
        conv_size: int = 4,
        gate: bool = False,
        rotary_base: float | None = 10000.0,
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, **rest)
        if not self.causal:
            refuse(self, "causal", "is off, and the state is taught token after token", False, "True")
        if self.num_kv_heads != num_heads:
            refuse(self, "num_kv_heads", "differs from the heads that read", self.num_kv_heads, str(num_heads))
        whole(self, mini_batch=mini_batch, conv_size=conv_size)
        number(self, above=0, base_rate=base_rate)
        choice(self, get_args(Form), form=form)
        flag(self, share_qk=share_qk, gate=gate)
        if rotary_base is not None:
            number(self, above=1, rotary_base=rotary_base)
            divides(self, pair=2, head_dim=self.head_dim)
        self.mini_batch, self.base_rate, self.share_qk, self.conv_size = mini_batch, base_rate, share_qk, conv_size
        self.form: Form = form
        self.rotary_base = rotary_base
        H, D, width = num_heads, self.head_dim, num_heads * self.head_dim
        self.start = nn.Parameter(torch.empty(H, D + 1, D))
        self.norm_weight, self.norm_bias = (nn.Parameter(torch.empty(H, D)) for _ in range(2))
        self.out_weight, self.out_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
        self.rate_proj = nn.Linear(dim, H)
        self.place = nn.Parameter(torch.empty(mini_batch))
        self.gate_proj = nn.Linear(dim, width, bias=False) if gate else None
        if share_qk:
            del self.k_proj
            self.taps = nn.Parameter(torch.empty(2 * width, conv_size))
            self.taps_bias = nn.Parameter(torch.empty(2 * width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in the authors' code: W and rates from a normal of deviation 0.02, norms at 1, all biases and p at 0.

        Convolutions start as torch's; projections reset themselves.
        """
        nn.init.normal_(self.start, std=0.02)
        self.start[:, -1] = 0
        nn.init.normal_(self.rate_proj.weight, std=0.02)
        for p in (self.norm_weight, self.out_weight):
            nn.init.ones_(p)
        for p in (self.norm_bias, self.out_bias, self.rate_proj.bias, self.place):
            nn.init.zeros_(p)
        if self.share_qk:
            torch_taps(self.taps, self.taps_bias)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As if of one head: gates, logits of rates, and what is projected."""
        mixed = [self.q_proj(x), *(() if self.share_qk else (self.k_proj(x),)), self.v_proj(x)]
        gate = x[..., :0] if self.gate_proj is None else self.gate_proj(x)
        return gate[:, None], self.rate_proj(x)[:, None], torch.cat(mixed, -1)[:, None]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: TTTState | None
    ) -> tuple[Tensor, TTTState]:
        gate, rates, mixed = (z[:, 0] for z in widened(q, k, v))
        B, T, H, n = *mixed.shape[:2], self.num_heads, self.mini_batch
        width = H * self.head_dim
        inputs = mixed[..., :0][:, :0]
        if self.share_qk:
            asked, v = mixed.split([width, width], -1)
            past = None if state is None else state.inputs
            both, inputs = conv_of_real(torch.cat([asked, asked], -1), self.taps, self.taps_bias, state=past, keep=keep)
            q, k = both.split(width, -1)
        else:
            q, k, v = mixed.split(width, -1)
        q, k, v = (z.unflatten(-1, (H, -1)).transpose(1, 2) for z in (q, k, v))
        at = places(None if state is None else state.filled, keep, T, n, q.device)
        if self.rotary_base is not None:
            angle = angles(at, frequencies(self.head_dim, self.rotary_base, q.device))
            q, k = (rotate(z, angle, interleaved=True) for z in (q, k))
        by_place = (1 / torch.arange(1, n + 1, device=q.device, dtype=q.dtype) + self.place.to(q.dtype)).clamp(min=0)
        reading = by_place[at][:, None].expand(B, H, T)
        writing = self.base_rate / self.head_dim * rates.sigmoid().mT
        if self.form == "fla":
            q, reading, writing = q / math.sqrt(self.head_dim), reading * writing, torch.ones_like(writing)
        out, state = taught_linear(
            q,
            k,
            v,
            reading,
            writing,
            (self.norm_weight, self.norm_bias),
            start=self.start,
            mini_batch=n,
            residual="query" if self.form == "official" else "output",
            keep=keep,
            state=state,
        )
        out = out.transpose(1, 2).flatten(2)
        out = F.layer_norm(out, (width,), self.out_weight.to(out.dtype), self.out_bias.to(out.dtype), EPS)
        if self.gate_proj is not None:
            out = out * F.gelu(gate, approximate="tanh")
        return out.unflatten(-1, (H, -1)).transpose(1, 2), state._replace(inputs=inputs)

    def empty_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> TTTState:
        B, H, D = batch_size, self.num_heads, self.head_dim
        gained = torch.zeros(B, H, D + 1, D, device=device, dtype=dtype)
        past, channels = (self.conv_size - 1, 2 * H * D) if self.share_qk else (0, 0)
        count = torch.zeros(B, device=device, dtype=torch.long)
        return TTTState(gained, gained.clone(), gained.new_zeros(B, H), count, gained.new_zeros(B, past, channels))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mini_batch={self.mini_batch}, form={self.form!r}"

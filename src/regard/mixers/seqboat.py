"""SeqBoat: a moving average decides which tokens are active, and attention runs over those alone."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, number, refuse, whole
from regard.masks import Mask, causal, full, padding
from regard.mixers.exponential import work_dtype
from regard.mixers.mega_average import DampedAverage
from regard.mixers.seqboat_attention import Held, PackedAttention, Places, Weighting
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil

CARD = Card(
    "seqboat",
    equation="""m_t = silu( EMA(u)_t + omega u_t ),   u = LN(x)      (EMA is Mega's; u is x itself with post_norm)
route  [l_t | s_t] = W_hx m_t,   P_t = softmax(l_t / e^temperature),   t is active when P_t1 > P_t0
pack   c_1 .. c_A = the active m_t in order,   p_i where c_i stood
attend [z | r | v]_i = silu(W_mx c_i),   q = gamma_0 z + beta_0,   k = gamma_1 z + beta_1
       o_i = r_i * sum_j f(scale q_i . k_j + b_ij) v_j   over |i - j| <= W  (j <= i when causal) among the packed
       f = relu(.)^2 with scale 1/W causal, 1/(2W) both ways;   or softmax with scale 1/sqrt(Z)
       b_ij = table[clamp(p_j - p_i)],   or none and q, k turned by p (rotary)
out    y_t = silu( s_t + P_t1 (W_h o + b_h)_t + x_t ),   without the second term where t is inactive
Z = qk_dim, E = value_dim (of r and v), W = window;   with post_norm y is normed""",
    papers=(
        Paper(
            "Sparse Modular Activation for Efficient Sequence Modeling",
            "Ren, Liu, Wang, Xu, Zhu, Zhai",
            2023,
            "2306.11197",
            "abstract; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "dropout", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*M*(M + 2 + 128 + 4*ema_dim)"
        " + 5/6*B*T*(M*(qk_dim + 3*value_dim) + 3*min(window, 5*T/6)*(qk_dim + value_dim))",
        "M*ema_dim + window*(qk_dim + value_dim + 1)",
    ),
    claim="Selective copying by a window shorter than the way back, as noise is not packed: "
    "tests/mixers/test_seqboat.py::test_a_short_window_reaches_far_where_noise_is_left_out.",
    differs=(
        "Always packed, each sequence by itself. The authors' code packs no sequence of a batch in which one is active "
        "throughout; its window then counts inactive tokens, too, in all of them.",
        "One dropout, of the weights, in place of three.",
        "No batch norm, which the code offers: hidden tokens and other sequences would change its mean.",
        "Rotary pairs are (a, a + Z/2), a fixed permutation of the code's neighbours.",
        "The averages start from whole normal distributions, as Mega's; the code cuts them at two deviations.",
    ),
    verified="third-party",
    example={"qk_dim": 6, "value_dim": 10, "ema_dim": 3, "window": 3},
    tries={"max_positions": 3},
    exceptions={
        "L59 long_inputs_in_float32": "of a million tokens the odd one is routed otherwise in float32, as its two "
        "probabilities differ by less than that tells; all others agree",
    },
    tasks=("mqar", "selective_copying"),
    defaults={
        "qk_dim": "ours, as Mega's; the code's model has 3/16 of the width",
        "value_dim": "code, its model",
        "ema_dim": "code, its model",
        "window": "code",
        "weighting": "code",
        "position": "code",
        "max_positions": "code",
        "post_norm": "code",
        "temperature": "code",
    },
)


class SeqBoatState(NamedTuple):
    """What the past leaves behind: the moving average, and the last active tokens as `Held` has them."""

    ema: Float[Tensor, "B M N"]
    k: Float[Tensor, "B s Z"]
    v: Float[Tensor, "B s E"]
    places: Int[Tensor, "B s"]
    seen: int


class Routes(NamedTuple):
    """How tokens are routed."""

    probs: Float[Tensor, "B T 2"]
    active: Bool[Tensor, "B T"]


@CARD.module
class SeqBoat(nn.Module):
    """One SeqBoat layer of one head, normalisation and residual included.

    Args:
        dim: M.
        qk_dim: Z, the width of queries and keys; default M / 4, an even number.
        value_dim: E, the width of values; default 2 M.
        ema_dim: N, moving averages for each channel.
        window: W, active tokens that one sees to each side besides itself; when causal, back alone.
        causal: no token sees a later one. Otherwise a second moving average runs backwards.
        weighting: "relu2" or "softmax".
        position: "relative", a table of distances between original places, or "rotary".
        max_positions: P, of the table of 2 P - 1; distances beyond count as the last.
        post_norm: whether the norm stands behind the layer and its residual, not before.
        temperature: what the router's learned temperature starts from, times sqrt(M).
        dropout: of the weights, in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        ema_dim: int = 16,
        window: int = 256,
        causal: bool = False,
        weighting: Weighting = "relu2",
        position: Places = "relative",
        max_positions: int = 1024,
        post_norm: bool = False,
        temperature: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        qk_dim = max(2, dim // 8 * 2) if qk_dim is None else qk_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        whole(self, ema_dim=ema_dim)
        flag(self, causal=causal, post_norm=post_norm)
        number(self, above=0, temperature=temperature)
        self.dim, self.qk_dim, self.value_dim, self.ema_dim, self.window = dim, qk_dim, value_dim, ema_dim, window
        self.causal, self.post_norm, self.start = causal, post_norm, temperature
        self.norm = nn.LayerNorm(dim)
        self.average = DampedAverage(dim, ema_dim, causal=causal)
        self.omega = nn.Parameter(torch.empty(dim))
        self.hx_proj = nn.Linear(dim, 2 + dim)  # routes, skip
        self.temperature = nn.Parameter(torch.empty(1))
        self.attention = PackedAttention(
            dim,
            qk_dim,
            value_dim,
            window=window,
            causal=causal,
            weighting=weighting,
            position=position,
            max_positions=max_positions,
            dropout=dropout,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of 0.02 cut at two deviations, no bias, and the temperature as told."""
        nn.init.trunc_normal_(self.hx_proj.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.hx_proj.bias)
        nn.init.normal_(self.omega)
        nn.init.constant_(self.temperature, math.log(self.start * self.dim**0.5))

    def receptive_field(self) -> Mask:
        """Whatever is active, the moving average reaches every earlier token (every later one, if not causal)."""
        return causal() if self.causal else full()

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens from all others: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        field = self.receptive_field()
        return spoil(self._run(x, keep, None)[0], bad, bad, field if keep is None else field & padding(keep))

    @checked(M="dim")
    def routes(self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | None = None) -> Routes:
        """The router's probabilities of leaving each token out and of taking it in, and which it takes in."""
        return self._routed(x, key_mask(self, mask, x)[0], None)[2]

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SeqBoatState:
        """Nothing seen yet. No more than `window` tokens are ever kept, so `capacity` limits nothing."""
        if not self.causal:
            refuse(self, "streaming", "needs causal=True", "a layer that sees later tokens", "one built causal")
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        like = self.omega.new_zeros(0, device=device, dtype=dtype)
        k, v = (like.new_zeros(batch_size, 0, width) for width in (self.qk_dim, self.value_dim))
        ema = like.new_zeros(batch_size, self.dim, self.ema_dim, dtype=work_dtype(like))
        return SeqBoatState(ema, k, v, torch.full(k.shape[:2], -1, device=like.device), 0)

    @checked(M="dim")
    def step(
        self, x: Float[Tensor, "B t M"], state: SeqBoatState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], SeqBoatState]:
        """The next t tokens. `mask`: True = a real one, of these t; hidden ones are seen by nobody, now or later."""
        if not isinstance(state, SeqBoatState):
            wanted = "the SeqBoatState of init_state"
            refuse(self, "state", "has the wrong type", type(state).__name__, wanted, error=TypeError)
        if x.shape[0] != len(state.k):
            refuse(self, "x", "has another batch than the state", x.shape[0], f"{len(state.k)} sequences")
        y, ema, held = self._run(shown(self, x, mask), mask, state)
        return y, SeqBoatState(ema, *(state[1:] if held is None else held))

    def _routed(self, x: Tensor, keep: Tensor | None, ema: Tensor | None) -> tuple[Tensor, Tensor, Routes, Tensor]:
        """m, the skip, the routes and the moving average's state."""
        u = x if self.post_norm else self.norm(x)
        average, ema = self.average(u if keep is None else u.masked_fill(~keep[..., None], 0), ema)
        m = F.silu(average + self.omega * u)
        logits, skip = self.hx_proj(m).split([2, self.dim], -1)
        work = work_dtype(logits)
        probs = (logits.to(work) / self.temperature.to(work).exp()).softmax(-1)
        active = probs[..., 1] > probs[..., 0]
        return m, skip, Routes(probs, active if keep is None else active & keep), ema

    def _run(
        self, x: Tensor, keep: Tensor | None, state: SeqBoatState | None
    ) -> tuple[Float[Tensor, "B T M"], Tensor, Held | None]:
        """Outputs, the moving average's state, and what attention holds, where there is a state."""
        m, skip, routes, ema = self._routed(x, keep, None if state is None else state.ema)
        o, held = self.attention(m, routes.active, None if state is None else Held(*state[1:]))
        y = F.silu(skip + o * routes.probs[..., 1:].to(o.dtype) + x)
        return (self.norm(y) if self.post_norm else y).to(skip.dtype), ema, held

"""Mega: a damped moving average of the tokens feeds one head of gated attention."""

from typing import Any, NamedTuple, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole
from regard.masks import Mask, causal, full, padding
from regard.mixers.exponential import work_dtype
from regard.mixers.mega_attention import ChunkAttention, Weighting
from regard.mixers.mega_average import DampedAverage
from regard.mixers.mega_norm import Norm, token_norm
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil
from regard.tracing import readable

CARD = Card(
    "mega",
    equation="""EMA     h_t = (1 - alpha delta) h_{t-1} + alpha beta x_t   (N states a channel, 0 < alpha, delta < 1)
        m_t = silu( sum_n eta_n h_{t,n} / sqrt(N) + omega x_t )
shared  z = silu(W_z m_t),   q = kappa_q z + mu_q,   k = kappa_k z + mu_k,   v = silu(W_v x_t)
gates   update u = sigmoid(W_u m_t),   reset r = silu(W_r m_t)
out     y_t = u c + (1 - u) x_t,   c = silu( W_c m_t + W_o (r * A v)_t )
A       softmax(q k^T / sqrt(Z) + b),   or of s = q k^T / n + b, each by itself, n the keys that a query may see:
        squared ReLU max(s, 0)^2,   Laplace (1 + erf((s - m) / (d sqrt 2))) / 2, m = sqrt(1/2), d = sqrt(1 / (4 pi))
bias    b_ij = table[j - i + P - 1]   or   b_ij = R_i a . R_j b  (rotary turns R)
x is the normed token, but in (1 - u) x_t the token itself; with post_norm x is the token, and y is normed
norm    layer norm, x / rms(x) times a weight a channel ("rms") or times one number ("scale")
Z = qk_dim, P = max_positions""",
    papers=(
        Paper(
            "Mega: Moving Average Equipped Gated Attention",
            "Ma et al.",
            2022,
            "2209.10655",
            "abstract; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "streaming", "dropout", "compile"},
    traits={"shift_invariant"},
    cost=Cost(
        "B*T*S*(2*qk_dim + value_dim) + B*T*M*(2*M + qk_dim + value_dim + 128 + 4*ema_dim)",
        "M*ema_dim + S*(qk_dim + value_dim)",
    ),
    claim="Without the moving average nothing but the bias tells the order of tokens: "
    "tests/mixers/test_mega.py::test_the_average_carries_order_and_chunks.",
    differs=(
        "One dropout, of the weights, in place of three.",
        "The Laplace function divides by the number of keys that a query may see, causal or not, without hidden keys.",
        "No batch norm, which the authors' code offers, too: hidden tokens and other sequences would change its mean.",
    ),
    verified="third-party",
    example={"qk_dim": 6, "value_dim": 10, "ema_dim": 3},
    tries={"chunk": 5, "max_positions": 12},
    tasks=("mqar",),
    defaults={
        "qk_dim": "code, the larger language model",
        "value_dim": "code, the larger language model",
        **dict.fromkeys(("ema_dim", "norm", "post_norm", "chunk", "weighting"), "code"),
        "max_positions": "ours, any length",
    },
)


class MegaState(NamedTuple):
    """What the past leaves behind: the moving average, and the keys and values of the chunk at hand (or of all)."""

    ema: Float[Tensor, "B M N"]
    k: Float[Tensor, "B s Z"]
    v: Float[Tensor, "B s E"]
    keep: Bool[Tensor, "B s"]
    """Which of them are of real tokens."""
    capacity: int


class MegaOptions(TypedDict, total=False):
    """The keywords of `Mega`, but for chunks."""

    qk_dim: int | None
    value_dim: int | None
    ema_dim: int
    causal: bool
    weighting: Weighting
    max_positions: int | None
    dropout: float
    norm: Norm
    post_norm: bool


@CARD.module
class Mega(nn.Module):
    """One Mega layer of one head, normalisation and residual included.

    Args:
        dim: M.
        qk_dim: Z, the width of the shared representation; even. Default M / 4.
        value_dim: E, the width of the values; default 2 M. Both are as in the authors' larger language model.
        ema_dim: N, moving averages for each channel; 16 in the authors' code.
        chunk: C, tokens that see one another; None: all.
        causal: no token sees a later one. Otherwise a second moving average runs backwards.
        weighting: how scores become weights.
        max_positions: P: b is a table of 2 P - 1 numbers (in chunks P = C will do); None: b turns, for any length.
        dropout: of the weights A, in training.
        norm, post_norm: "layer", "rms" or "scale"; whether it stands behind the layer and its residual, not before.
    """

    def __init__(
        self,
        dim: int,
        *,
        qk_dim: int | None = None,
        value_dim: int | None = None,
        ema_dim: int = 16,
        chunk: int | None = None,
        causal: bool = False,
        weighting: Weighting = "softmax",
        max_positions: int | None = None,
        dropout: float = 0.0,
        norm: Norm = "layer",
        post_norm: bool = False,
    ) -> None:
        super().__init__()
        whole(self, dim=dim)
        qk_dim = max(2, dim // 8 * 2) if qk_dim is None else qk_dim
        value_dim = 2 * dim if value_dim is None else value_dim
        whole(self, qk_dim=qk_dim, value_dim=value_dim, ema_dim=ema_dim)
        self.dim, self.qk_dim, self.value_dim, self.ema_dim = dim, qk_dim, value_dim, ema_dim
        self.chunk, self.causal = chunk, causal
        self.post_norm = post_norm
        self.norm = token_norm(norm, dim)
        self.average = DampedAverage(dim, ema_dim, causal=causal)
        self.omega = nn.Parameter(torch.empty(dim))
        self.v_proj = nn.Linear(dim, value_dim)
        self.mixed_proj = nn.Linear(dim, dim + qk_dim + value_dim + dim)  # u, z, r, c
        self.o_proj = nn.Linear(value_dim, dim)
        self.kappa = nn.Parameter(torch.empty(2, qk_dim))
        self.mu = nn.Parameter(torch.empty(2, qk_dim))
        self.attention = ChunkAttention(
            qk_dim, chunk=chunk, causal=causal, weighting=weighting, max_positions=max_positions, dropout=dropout
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for proj in (self.v_proj, self.mixed_proj, self.o_proj):
            nn.init.normal_(proj.weight, std=0.02)
            nn.init.zeros_(proj.bias)
        nn.init.normal_(self.kappa, std=0.02)
        nn.init.zeros_(self.mu)
        nn.init.normal_(self.omega)

    def receptive_field(self) -> Mask:
        """Chunks or not, the moving average reaches every earlier token (and every later one, if not causal)."""
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
        normed = x if self.post_norm else self.norm(x)
        shown = normed if keep is None else normed.masked_fill(~keep[..., None], 0)
        average, _ = self.average(shown)
        out = self._gated(x, normed, average, lambda q, k, v: self.attention(q, k, v, keep))[0]
        field = self.receptive_field()
        return spoil(out, bad, bad, field if keep is None else field & padding(keep))

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MegaState:
        """Nothing seen yet. With chunks no more than one chunk of keys is ever kept, whatever the capacity."""
        if not self.causal:
            refuse(self, "streaming", "needs causal=True", "a layer that sees later tokens", "one built causal")
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        weight = self.v_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        k, v = (
            torch.zeros(batch_size, 0, width, device=device, dtype=dtype) for width in (self.qk_dim, self.value_dim)
        )
        ema = torch.zeros(batch_size, self.dim, self.ema_dim, device=device, dtype=work_dtype(k))
        return MegaState(ema, k, v, torch.ones(batch_size, 0, dtype=torch.bool, device=device), capacity)

    @checked(M="dim")
    def step(
        self, x: Float[Tensor, "B t M"], state: MegaState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], MegaState]:
        """The next t tokens. `mask`: True = a real one, of these t; hidden ones are seen by nobody, now or later."""
        if not isinstance(state, MegaState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the MegaState of init_state", error=TypeError)
        if x.shape[0] != len(state.k):
            refuse(self, "x", "has another batch than the state", x.shape[0], f"{len(state.k)} sequences")
        held, t = state.k.shape[1], x.shape[1]
        if self.chunk is None and held + t > state.capacity:
            refuse(self, "state", f"has capacity {state.capacity}", f"{held + t} tokens", f"capacity >= {held + t}")
        x = shown(self, x, mask)
        normed = x if self.post_norm else self.norm(x)
        average, ema = self.average(normed if mask is None else normed.masked_fill(~mask[..., None], 0), state.ema)
        # Without hidden tokens, now or before, there is no mask to look at.
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        seen = torch.cat([state.keep, real], 1)
        hides = mask is not None or not readable(seen) or not bool(state.keep.all())

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            first = t if self.chunk is None else min(t, self.chunk - held)
            old = torch.cat([state.k.to(k.dtype), k[:, :first]], 1), torch.cat([state.v.to(v.dtype), v[:, :first]], 1)
            out = self.attention.whole(q[:, :first], *old, seen[:, : held + first] if hides else None)
            rest = self.attention(*(z[:, first:] for z in (q, k, v)), None if mask is None else mask[:, first:])
            return torch.cat([out, rest], 1)

        y, k, v = self._gated(x, normed, average, attend)
        k, v = (torch.cat([old, new.to(old.dtype)], 1) for old, new in ((state.k, k), (state.v, v)))
        full_chunks = 0 if self.chunk is None else k.shape[1] // self.chunk * self.chunk
        k, v, seen = (z[:, full_chunks:] for z in (k, v, seen))
        return y, MegaState(ema, k, v, seen, state.capacity)

    def _gated(self, x: Tensor, normed: Tensor, average: Tensor, attend: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Everything but the moving average and the weights: outputs, keys and values."""
        mixed = F.silu(average + self.omega * normed)
        widths = [self.dim, self.qk_dim, self.value_dim, self.dim]
        update, z, reset, candidate = self.mixed_proj(mixed).split(widths, -1)
        v = F.silu(self.v_proj(normed))
        q, k = (F.silu(z)[:, None] * self.kappa[:, None] + self.mu[:, None]).to(v.dtype).unbind(1)
        out = attend(q, k, v) * F.silu(reset)
        update = update.sigmoid()
        y = update * F.silu(candidate + self.o_proj(out)) + (1 - update) * x
        return (self.norm(y) if self.post_norm else y).to(update.dtype), k, v

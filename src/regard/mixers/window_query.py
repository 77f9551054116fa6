"""Window-query attention: the mean of the last few tokens asks, and is added to what is found.

`regard.mixers.multi_query` has the stacks of it, and the recommender around them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, flag, number, refuse, tokens, whole
from regard.masks import Mask, causal, padding
from regard.pipeline.function import attention
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil

CARD = Card(
    "window_query",
    equation="""a_t = mean of the real ones among x_{t-L+1} .. x_t,   n = LayerNorm(a)
q = W_q n + b_q,   k = W_k x + b_k,   v = W_v x + b_v
y = concat_h(softmax(q_h k_h^T / sqrt(D)) v_h) + n              s <= t""",
    papers=(
        Paper(
            "Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for "
            "Sequential Recommendation",
            "Zhu et al.",
            2023,
            "2311.01056",
            "abstract; official code; a summary of its formulas, which agrees; the text itself not read",
        ),
    ),
    supports={"causal", "padding", "packed", "streaming", "dropout", "compile"},
    lacks={"bidirectional": "its windows look back"},
    cost=Cost("B*H*T*S*D", "2*S*H*D + (window - 1)*M"),
    claim="A query hears the last L tokens alike, so that no order within its window changes what it finds: "
    "tests/mixers/test_window_query.py::test_the_order_within_a_window_changes_no_answer.",
    differs=(
        "A row that sees no real token gives the norm's bias.",
        "Distillation takes the logarithm of its softmax as it is, where the code adds 1e-24 to what it takes it of.",
        "The penalty on all parameters' squares is left to the optimiser or the caller.",
    ),
    verified="third-party",
    defaults={"window": "code"},
)

EPS = 1e-24
"""Of norms, within the root."""


class WindowState(NamedTuple):
    """The past: keys, values and which are real, and the last tokens of a window."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    held: Bool[Tensor, "B S"]
    recent: Float[Tensor, "B n M"]
    near: Bool[Tensor, "B n"]


def window_mean(
    x: Float[Tensor, "B S M"], keep: Bool[Tensor, "B S"] | None, window: int, last: int | None = None
) -> Float[Tensor, "B T M"]:
    """The mean of real tokens among the `window` up to each of the `last` ones (default all); 0 where none is."""
    B, S = x.shape[:2]
    T, L = S if last is None else last, window if torch.compiler.is_compiling() else min(window, S)
    keep = x.new_ones(B, S, dtype=torch.bool) if keep is None else keep
    x = F.pad(x.masked_fill(~keep[..., None], 0), (0, 0, L, 0))
    real = F.pad(keep.to(x.dtype), (L, 0))
    total, count = torch.zeros_like(x[:, L + S - T :]), torch.zeros_like(real[:, L + S - T :])
    for back in range(L):
        at = slice(L + S - T - back, L + S - back)
        total, count = total + x[:, at], count + real[:, at]
    return total / count.clamp(min=1)[..., None]


@CARD.module
class WindowQueryAttention(nn.Module):
    """Causal self-attention whose queries are window means, without an output projection.

    Args:
        dim, num_heads: M and H, of which M is a multiple.
        window: L; 1 asks by the token itself, normalised.
        causal: always.
        dropout: of weights, in training.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self, dim: int, num_heads: int = 1, *, window: int = 3, causal: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, window=window)
        divides(self, num_heads=num_heads, dim=dim)
        number(self, least=0, most=1, dropout=dropout)
        flag(self, causal=causal)
        if not causal:
            refuse(self, "causal", "is off, and windows look back", causal, "True")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window, self.causal, self.dropout = window, causal, dropout
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions."""
        return causal()

    @checked(M="dim")
    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        x, bad = quarantine(x)
        k, v = self._split(self.k_proj(x)), self._split(self.v_proj(x))
        out = self._ask(window_mean(x, keep, self.window), k, v, keep)
        return spoil(out, bad, bad, causal() if keep is None else causal() & padding(keep))

    def _split(self, z: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T D"]:
        return z.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _ask(self, mean: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Float[Tensor, "B T M"]:
        n = self.norm(mean)
        mask = causal() if keep is None else causal() & padding(keep)
        dropout = self.dropout if self.training else 0.0
        q = self._split(self.q_proj(n))
        out = attention(q, k.to(q.dtype), v.to(q.dtype), mask=mask, dropout=dropout).transpose(1, 2).flatten(2)
        return out + n.to(out.dtype)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WindowState:
        """The state before any token; it grows by what it is given, whatever the capacity."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        weight = self.q_proj.weight
        device = weight.device if device is None else torch.device(device)
        z = torch.zeros(batch_size, self.num_heads, 0, self.head_dim, device=device, dtype=dtype or weight.dtype)
        none = torch.zeros(batch_size, 0, device=device, dtype=torch.bool)
        recent = torch.zeros(batch_size, 0, self.dim, device=device, dtype=z.dtype)
        return WindowState(z, z.clone(), none, recent, none.clone())

    def step(
        self, x: Float[Tensor, "B t M"], state: WindowState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], WindowState]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t.
        """
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, WindowState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the WindowState of init_state", error=TypeError)
        if len(state.k) != len(x):
            refuse(self, "state", "has another batch than x", len(state.k), f"{len(x)} sequences")
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        k = torch.cat([state.k, self._split(self.k_proj(x)).to(state.k.dtype)], 2)
        v = torch.cat([state.v, self._split(self.v_proj(x)).to(state.v.dtype)], 2)
        held = torch.cat([state.held, keep], 1)
        recent, near = torch.cat([state.recent.to(x.dtype), x], 1), torch.cat([state.near, keep], 1)
        mean = window_mean(recent, near, self.window, x.shape[1])
        out = self._ask(mean, k.to(x.dtype), v.to(x.dtype), held)
        first = max(0, recent.shape[1] - self.window + 1)
        recent = recent[:, first:].to(state.recent.dtype)
        return out, WindowState(k, v, held, recent, near[:, first:])

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, window={self.window}"

"""NAtS, neural attention search: each token learns how long its key is kept.

Always, until the next token of that kind comes, or for a while: types are chosen as a token is written, for each key
head, and a cache drops what has expired. The mask that they make is hard; its gradient is that of weights which count
every earlier key, so that a type whose key is hidden can come back.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, flag, number, refuse, tokens, whole
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import shown
from regard.positions.rotary import Rotary
from regard.routing.nats_attention import (
    GLOBAL,
    LOCAL,
    SLIDING,
    nats_attention,
    next_global,
    priced_types,
    token_types,
)

CARD = Card(
    "nats",
    equation="""type_j = argmax(W x_j + Gumbel noise in training), of global, local, sliding; for each key head
e(j) = the first global token from j on
M_ij = 1 for j <= i if j is global; local and i <= e(j); sliding and i <= j + window
out_i = softmax over M_ij = 1 of q_i . k_j / sqrt(D), times v_j
dM_ij = P_ij (dO_i . v_j - dO_i . out_i) for every j <= i, P = softmax over all j <= i""",
    papers=(
        Paper(
            "Neural Attention Search",
            "Deng, Lindauer",
            2025,
            "2502.13251",
            "abstract; the authors' code, but for its plain masks",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming"},
    lacks={"bidirectional": "tokens expire as later ones come", "cross": "types are of one sequence's own tokens"},
    traits={"normalised", "nonnegative", "sparse", "routed", "straight_through"},
    cost=Cost("B*H*T*(T + 1)*D + 3*B*T*M*G", "S*G*(2*D + 2)"),
    claim="What has expired is dropped, and the output stays that of the masked attention; trained with a price on "
    "keys, few are held and a marked one still is: tests/routing/test_nats.py::test_learns_to_keep_what_is_asked_for.",
    differs=(
        "Of the gradient: every query that a type lets see a key counts for it; the authors' kernel leaves those up to "
        "the next global token out for global ones, and adds terms for the locals that a global token ends.",
        "Which end a global token would have as a local one is open in what was read: `local_end` has both.",
        "Types for chunks of tokens, of their mean, are left out.",
    ),
    example={"window": 2},
    tries={"window": 1, "tau": ..., "sparsity": ..., "local_end": ..., "detached": ..., "first_global": False},
    defaults={
        "window": "ours",
        "tau": "code",
        "sparsity": "ours, no price",
        "first_global": "code",
        "detached": "ours, training from the start",
        "local_end": "ours, the mask's own",
        "base": "ours, as of Llama",
        "bias": "ours",
    },
)


class NatsState(NamedTuple):
    """What has not expired; empty places in front."""

    k: Float[Tensor, "B G n D"]
    v: Float[Tensor, "B G n D"]
    at: Int[Tensor, "B G n"]
    kind: Int[Tensor, "B G n"]
    """-1 = an empty place."""
    length: int
    begun: Bool[Tensor, " B"]
    """Whether there was a token yet that was no padding."""

    @property
    def live(self) -> Int[Tensor, "B G"]:
        """How many keys each head holds."""
        return (self.kind >= 0).sum(-1)


@CARD.module
class NAtS(HeadMixer):
    """Causal self-attention whose tokens say how long they are kept.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        window: queries after its own that see a sliding token.
        tau: of the Gumbel softmax, in training.
        sparsity: the price on keys in training; each query head adds it.
        first_global: whether the first token is global, and in training the last.
        detached: whether types leave the tokens without gradient, as in fine-tuning.
        local_end: see `nats_attention`.
        base: of rotary positions; None for none.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 256,
        tau: float = 1.0,
        sparsity: float = 0.0,
        first_global: bool = True,
        detached: bool = False,
        local_end: Literal["own", "next"] = "own",
        base: float | None = 10000.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        whole(self, 0, window=window)
        number(self, above=0, tau=tau)
        number(self, least=0, sparsity=sparsity)
        flag(self, first_global=first_global, detached=detached)
        choice(self, ("own", "next"), local_end=local_end)
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=True, bias=bias)
        if base is not None and self.head_dim % 2:
            refuse(self, "head_dim", "is odd, and rotation turns pairs", self.head_dim, "an even one, or base=None")
        self.window, self.tau, self.sparsity, self.local_end = window, tau, sparsity, local_end
        self.first_global, self.detached = first_global, detached
        self.rotary = None if base is None else Rotary(self.head_dim, base=base)
        self.type_proj = nn.Linear(dim, 3 * self.num_kv_heads, bias=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of `HeadMixer`; the types' logits stand behind each key."""
        q, k, v = super().split(x, source)
        logits = self.type_proj(source.detach() if self.detached else source)
        return q, torch.cat([k, logits.unflatten(-1, (-1, 3)).transpose(1, 2)], -1), v

    def types(self, logits: Float[Tensor, "B G T 3"], keep: Tensor | None, begun: Tensor) -> Float[Tensor, "B G T 3"]:
        """What the tokens are; all 0 for padding."""
        B, _, T, _ = logits.shape
        real = torch.ones(B, T, dtype=torch.bool, device=logits.device) if keep is None else keep
        number_ = real.long().cumsum(1)
        forced = real & (number_ == 1) & ~begun[:, None] if self.first_global else None
        noise = None
        if self.training:
            noise = -torch.empty_like(logits).exponential_().log()
            if forced is not None and T:
                forced = forced | (real & (number_ == number_[:, -1:]))
        tau = self.tau if self.training else 1.0
        types = token_types(logits, noise=noise, tau=tau, forced=forced)
        if self.training and self.sparsity:
            types = priced_types(types, self.sparsity * self.num_heads // self.num_kv_heads)
        return types * real[:, None, :, None]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: NatsState | None
    ) -> tuple[Tensor, NatsState]:
        """From a state (None = nothing seen) to the state after these tokens."""
        (B, _, t, D), first = q.shape, 0 if state is None else state.length
        k, logits = k[..., :D], k[..., D:]
        here = torch.arange(first, first + t, device=q.device)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, k, here, here)
        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0)
        begun = torch.zeros(B, dtype=torch.bool, device=q.device) if state is None else state.begun
        wide = torch.promote_types(logits.dtype, torch.float32)
        types, at = self.types(logits.to(wide), keep, begun), here.expand(*k.shape[:3])
        if state is not None:
            held = F.one_hot(state.kind.clamp(min=0), 3).to(wide) * (state.kind >= 0)[..., None]
            types, at = torch.cat([held, types], 2), torch.cat([state.at, at], 2)
            k, v = (torch.cat([a.to(b.dtype), b], 2) for a, b in ((state.k, k), (state.v, v)))
        out = nats_attention(q, k, v, types, window=self.window, at=at, local_end=self.local_end)
        begun = begun | (torch.ones_like(begun) if keep is None else keep.any(1)) if t else begun
        return out.to(q.dtype), _living(k, v, at, types.detach(), first + t, begun, self.window)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return self.run(q, k, v, keep, None)[0]

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NatsState:
        """The state before any token; it grows by what has not expired, whatever the capacity."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        z = self.k_proj.weight.new_zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        at = z[..., 0].long()
        begun = torch.zeros(batch_size, dtype=torch.bool, device=z.device)
        return NatsState(z, z.clone(), at, at.clone(), 0, begun)

    def step(
        self, x: Float[Tensor, "B t M"], state: NatsState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], NatsState]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t.
        """
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, NatsState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the NatsState of init_state", error=TypeError)
        if len(state.k) != len(x):
            refuse(self, "state", "has another batch than x", len(state.k), f"{len(x)} sequences")
        out, after = self.run(*self.split(x, x), mask, state)
        return self.merge(out), after._replace(k=after.k.to(state.k.dtype), v=after.v.to(state.v.dtype))


def _living(k: Tensor, v: Tensor, at: Tensor, types: Tensor, length: int, begun: Tensor, window: int) -> NatsState:
    """What the next query can still see."""
    n = k.shape[2]
    kind = torch.where(types.sum(-1) > 0.5, types.argmax(-1), -1)
    over = next_global(kind == GLOBAL, at) < length
    alive = (kind == GLOBAL) | ((kind == LOCAL) & ~over) | ((kind == SLIDING) & (at + window >= length))
    most = int(alive.sum(-1).max()) if alive.numel() else 0
    places = torch.where(alive, torch.arange(n, device=k.device), -1).sort(-1).values[..., n - most :]
    there = places.clamp(min=0)
    k, v = (z.gather(2, there[..., None].expand(*there.shape, z.shape[3])) for z in (k, v))
    kind = kind.gather(2, there).masked_fill(places < 0, -1) if n else kind
    return NatsState(k, v, at.gather(2, there) if n else at, kind, length, begun)

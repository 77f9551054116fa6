"""Multi-head latent attention: keys and values of all heads come from one small latent a token.

Rotation can't be folded into a projection, so each head's keys have N features of the latent, which aren't turned, and
R that are, the same for all heads. A stream holds the latent and those R numbers. Its queries are brought to the
latent's side (the absorbed form): attention with one head of keys of width C + R and of values of width C, the same
numbers.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import divides, flag, number, refuse, tokens, whole
from regard.kernels import execute
from regard.kernels.check import check_mask
from regard.masks import Mask
from regard.mixers._latents import absorb, expand, normed
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.pipeline.streaming import MADE, check_streams
from regard.positions.rotary import Rotary, Scaling
from regard.stages import Made
from regard.tracing import autocasts

CARD = Card(
    "mla",
    equation="""[c | k_r] = x W_kva,   c <- rms_norm(c)         C and R numbers a token, shared by all heads
q_h = [q_n | q_r] of x W_q, or of rms_norm(x W_qa) W_qb;   q_r and k_r turn with their positions
k_h = [c U_h | k_r],   v_h = c W_h,   y = concat_h(softmax(q_h k_h^T / sqrt(N + R)) v_h) W_o
while streaming:   q_h k_h^T = [q_n U_h^T | q_r] [c | k_r]^T,   A v_h = (A c) W_h""",
    papers=(
        Paper(
            "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
            "DeepSeek-AI",
            2024,
            "2405.04434",
            "its equations of queries, keys and values in a summary; the authors' inference code of V3; transformers",
        ),
        Paper("DeepSeek-V3 Technical Report", "DeepSeek-AI", 2024, "2412.19437", "the authors' inference code"),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "streaming", "dropout", "compile"},
    traits={"normalised", "nonnegative", "shift_invariant"},
    cost=Cost(
        "B*H*T*S*(nope_dim + rope_dim + value_dim) + B*S*(M*(kv_rank + rope_dim) + kv_rank*H*(nope_dim + value_dim))",
        "S*(kv_rank + rope_dim)",
    ),
    claim="A token leaves C + R numbers behind, whatever the number of heads, and steps over them give the full pass: "
    "tests/mixers/test_mla.py::test_steps_over_the_latents_give_the_full_pass.",
    differs=(
        "Turned features stay where they are; DeepSeek's code in transformers sorts pairs apart, of queries and keys "
        "alike, so that scores are the same.",
        "Calls of many tokens onto a stream expand keys and values where that takes fewer multiply-adds.",
    ),
    verified="third-party",
    example={"q_rank": 5, "kv_rank": 7, "nope_dim": 4, "rope_dim": 2, "value_dim": 5},
    tries={"absorb": ..., "q_rank": 4},
    defaults={
        "q_rank": "code, the authors' inference code, as in V2-Lite; V2 and V3 have 1536",
        "kv_rank": "code",
        "nope_dim": "code",
        "rope_dim": "code",
        "value_dim": "code",
        "base": "code",
        "interleaved": "code",
        "absorb": "code",
        "eps": "code",
        "bias": "code, transformers",
    },
)


@CARD.module(closed=("scaling", "scale", "kernel"))
class MultiHeadLatentAttention(Attention):
    """Attention from a latent of each token. The projections have transformers' names.

    Args:
        dim, num_heads, causal, dropout, kernel: as in `regard.Attention`.
        q_rank: width that queries are squeezed through; None for a plain projection.
        kv_rank: C, the latent's width.
        nope_dim: N, query and key features a head without position.
        rope_dim: R, even, those with; 0 for none.
        value_dim: V, of a head.
        base, scaling, interleaved: of the rotation, as in `regard.positions.Rotary`.
        absorb: whether `step` attends over the latents where that takes fewer multiply-adds; False always expands them.
        eps: of both norms, under the root.
        bias: whether the projections into the latents and `o_proj` have one.
        scale: default 1 / sqrt(N + R). With YaRN DeepSeek multiplies it by (0.1 mscale_all_dim ln(factor) + 1)^2.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        q_rank: int | None = None,
        kv_rank: int = 512,
        nope_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        base: float = 10000.0,
        interleaved: bool = True,
        absorb: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
        scaling: Scaling | None = None,
        scale: float | None = None,
        kernel: str = "auto",
    ) -> None:
        whole(self, kv_rank=kv_rank, nope_dim=nope_dim, value_dim=value_dim)
        whole(self, 0, rope_dim=rope_dim)
        divides(self, pair=2, rope_dim=rope_dim)
        number(self, least=0, eps=eps)
        flag(self, absorb=absorb, interleaved=interleaved)
        if q_rank is not None:
            whole(self, q_rank=q_rank)
        rotary = Rotary(rope_dim, base=base, scaling=scaling, interleaved=interleaved) if rope_dim else None
        super().__init__(
            dim, num_heads, head_dim=nope_dim + rope_dim, causal=causal, dropout=dropout, scale=scale, bias=bias,
            kernel=kernel, position=rotary, device="meta",
        )  # fmt: skip
        del self.q_proj, self.k_proj, self.v_proj
        self.q_rank, self.kv_rank, self.eps, self.absorb = q_rank, kv_rank, eps, absorb
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        width = num_heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q_proj = nn.Linear(dim, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, q_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_rank, eps=eps)
            self.q_b_proj = nn.Linear(q_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, kv_rank + rope_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps=eps)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=bias)

    def init_state(  # type: ignore[override]
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty state: latents `c` (B, capacity, C) and turned key features `k_r` (B, capacity, R)."""
        check_streams(self)
        whole("init_state", 0, batch_size=batch_size)
        whole("init_state", capacity=capacity)
        weight = self.kv_b_proj.weight
        at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        widths = {"c": self.kv_rank, "k_r": self.rope_dim}
        return KVCache({name: torch.zeros(batch_size, capacity, width, **at) for name, width in widths.items()})

    def step(  # type: ignore[override]
        self,
        x: Float[Tensor, "B t M"],
        state: KVCache,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask, positions: as in `regard.Attention`.
        """
        check_streams(self)
        tokens(self, "x", x, self.dim)
        if not isinstance(state, KVCache):
            given = type(state).__name__
            refuse(self, "state", "has the wrong type", given, "the KVCache of init_state", error=TypeError)
        if mask is not None and not isinstance(mask, Mask):
            refuse(self, "mask", "has the wrong type", type(mask).__name__, "a regard.masks.Mask", error=TypeError)
        (B, t), length = x.shape[:2], state.length + x.shape[1]
        check_mask(mask, B, self.num_heads, t, length, x.device)
        where = self._positions(positions, B, t, x.device, state.length)
        q, new = self._queries(x, where), dict(zip(("c", "k_r"), self._latent(x, where)))
        made = self._made(x, x, where) or {}
        new |= {MADE + name: value.key for name, value in made.items() if value.key is not None}
        if autocasts(x.device):  # the state keeps the dtype that it was made with
            new = {name: z.to(state.buffers[name].dtype) for name, z in new.items() if name in state.buffers}
        held, state = state.append(**new)
        c, k_r = held["c"].to(q.dtype), held["k_r"].to(q.dtype)
        up, absorbs = self._up().to(q.dtype), self._absorbs(t)
        if absorbs:
            q, k, v = absorb(q, up, self.nope_dim), torch.cat([c, k_r], -1)[:, None], c[:, None]
        else:
            k, v = expand(c, k_r, up, self.nope_dim)
        made = {name: Made(value.query, held.get(MADE + name), value.whole) for name, value in made.items()}
        p = self._problem(q, k, v, None, None, self._static(mask), made=made, positions=positions)
        out = execute(p, self.kernel)
        return self._finish(out @ up[:, self.nope_dim :].mT if absorbs else out, x), state

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        k, v = expand(*self._latent(source, where_keys), self._up(), self.nope_dim)
        return self._queries(x, turn), k, v, x, source

    def _queries(self, x: Float[Tensor, "B t M"], where: Tensor) -> Float[Tensor, "B H t D"]:
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self._squeezed(x))
        q_n, q_r = self._split(q, self.num_heads).tensor_split((self.nope_dim,), -1)
        return torch.cat([q_n, self._turned(q_r, where)], -1)

    def _squeezed(self, x: Float[Tensor, "B t M"]) -> Float[Tensor, "B t q_rank"]:
        """What queries are made of, where there is a `q_rank`."""
        return normed(self.q_a_layernorm, self.q_a_proj(x))

    def _latent(
        self, x: Float[Tensor, "B S M"], where: Tensor
    ) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S R"]]:
        c, k_r = self.kv_a_proj_with_mqa(x).tensor_split((self.kv_rank,), -1)
        return normed(self.kv_a_layernorm, c), self._turned(k_r[:, None], where)[:, 0]

    def _turned(self, z: Float[Tensor, "B H S R"], where: Tensor) -> Float[Tensor, "B H S R"]:
        return z if self.position is None else self.position.rotate(z, where)

    def _up(self) -> Float[Tensor, "H NV C"]:
        """Rows of a head: N of its keys, then V of its values."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))

    def _absorbs(self, t: int) -> bool:
        """Whether t queries over the latents cost less than expanding these; not where an export leaves t open."""
        if not self.absorb or isinstance(t, torch.SymInt):
            return False
        both = self.nope_dim + self.value_dim
        return t * (2 * self.kv_rank - both) < both * self.kv_rank

"""Attention-aware routing of experts: tokens that attend to one another vote on each other's experts.

A block of attention and a sparse mixture of experts. The router's probabilities of all tokens are averaged by the
block's own attention, or by how alike tokens are, before the experts are picked: one more call of attention, whose
values are the probabilities. What the experts are given stays as it is.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, flag, number, refuse, tokens, whole
from regard.masks import Mask, causal, full, padding
from regard.mixers.smoothed_router import Experts, Routes, SmoothedRouter, balance, voting
from regard.pipeline.function import attention
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.tokens import apart, key_mask, quarantine, shown, spoil
from regard.shapes import head_shape
from regard.tracing import autocasts

ROUNDED = "an expert runs on as many tokens as chose it, and how many decides how products are rounded"

CARD = Card(
    "smoothed_moe",
    equation="""h = x + attention(LN x),   u = LN h,   r_i = softmax(W u_i + b)           E experts
r'_i = sum_j S_ij r_j,   S the block's attention, mean over heads; or softmax_j(u_i^T W_s u_j / tau); or 1
K_i = the top_k largest of r'_i,   y_i = h_i + sum over e in K_i of r'_ie / (sum over K_i of r'_i) f_e(u_i)
f_e(u) = W_2 gelu(W_1 u + b_1) + b_2;   balance = E sum_e (share of choices that are e) (mean of r'_e)""",
    papers=(
        Paper(
            "Improving Routing in Sparse Mixture of Experts with Graph of Tokens",
            "Nguyen, Tran, Nguyen, Baraniuk",
            2025,
            "2505.00792",
            "abstract",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "gqa", "streaming", "compile"},
    lacks={"cross": "tokens vote on each other's experts"},
    traits={"position_free", "shift_invariant"},
    cost=Cost(
        "B*H*T*T*(3*D + num_experts + 1) + B*T*M*num_experts + 2*B*T*top_k*M*4*M",
        "2*S*G*D + S*num_experts",
    ),
    claim="A small change of the tokens changes fewer of their experts, and tokens alike share one: "
    "tests/mixers/test_smoothed_moe.py::test_votes_steady_the_choice.",
    differs=(
        "Inferred: heads count alike, r' and not r weighs the outputs, the kept are scaled to sum to 1, and r is made "
        "of what the experts are given. `weigh`, `renormalise` and `space` offer what else the words may mean.",
        "That choices have less entropy is no mean entropy of r', which an average raises: steadiness is tested.",
        "Norms, residuals, experts with GELU and the balance of Switch Transformers are the host's, as is usual.",
        "A token that sees no token votes for itself.",
    ),
    verified="reconstructed",
    exceptions=dict.fromkeys(("L4", "L9", "L10"), ROUNDED),
    example={"num_experts": 4, "hidden": 10},
    tries={
        "temperature": {"similarity": "tokens", "temperature": 1.0},
        "metric": {"similarity": "tokens", "metric": "learned"},
    },
    auxiliary="balance_loss",
    defaults={
        **dict.fromkeys(("num_experts", "top_k"), "ours, as in small mixtures"),
        "hidden": "ours, four times dim, as is usual",
        "similarity": "ours, as the attention is there anyway",
        "temperature": "ours, the square root of dim, as dot products grow",
        "space": "ours, as the abstract's model of a token that follows another",
        **{"metric": "ours, without a matrix", "renormalise": "ours, as is usual", "weigh": "ours, r'"},
        **{"auxiliary_weight": "ours, that of Switch Transformers", "bias": "ours, as in every HeadMixer"},
    },
)


@CARD.module
class SmoothedMoE(nn.Module):
    """The block: attention and experts, each with a norm before it and a residual around it.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, bias: of the attention, as in `regard.Attention`.
        num_experts, top_k, space, renormalise, weigh: as of `SmoothedRouter`.
        hidden: of each expert; default 4 dim.
        similarity: who listens to whom: "attention", "tokens" by their dot products, or "none".
        temperature: tau, of "tokens"; default sqrt(dim).
        metric: W_s of "tokens": the "identity", or "learned", which starts as that.
        auxiliary_weight: what training multiplies `balance_loss` by.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        hidden: int | None = None,
        similarity: Literal["attention", "tokens", "none"] = "attention",
        temperature: float | None = None,
        metric: Literal["identity", "learned"] = "identity",
        space: Literal["probs", "logits"] = "probs",
        renormalise: bool = True,
        weigh: Literal["smoothed", "own"] = "smoothed",
        auxiliary_weight: float = 0.01,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        flag(self, causal=causal, bias=bias)
        choice(self, ("attention", "tokens", "none"), similarity=similarity)
        choice(self, ("identity", "learned"), metric=metric)
        number(self, least=0, auxiliary_weight=auxiliary_weight)
        temperature = dim**0.5 if temperature is None else temperature
        number(self, above=0, temperature=temperature)
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, shape.num_kv_heads, shape.head_dim
        self.causal, self.similarity, self.temperature = causal, similarity, temperature
        self.auxiliary_weight: float = auxiliary_weight
        D, G = self.head_dim, self.num_kv_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, n * D, bias=bias) for n in (num_heads, G, G))
        self.o_proj = nn.Linear(num_heads * D, dim, bias=bias)
        self.norm1, self.norm2 = (nn.LayerNorm(dim) for _ in range(2))
        self.router = SmoothedRouter(
            dim, num_experts=num_experts, top_k=top_k, space=space, renormalise=renormalise, weigh=weigh
        )
        self.experts = Experts(dim, num_experts, 4 * dim if hidden is None else hidden)
        learned = similarity == "tokens" and metric == "learned"
        self.metric = nn.Linear(dim, dim, bias=False) if learned else None
        if self.metric is not None:
            nn.init.eye_(self.metric.weight)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, causal={self.causal}, similarity={self.similarity!r}"

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions through this layer."""
        return causal() if self.causal else full()

    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B T M"]:
        """Run the block. `mask` hides tokens: `regard.masks.padding`, or True = a real token."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep)
        x, bad = quarantine(x)
        allowed = self.receptive_field() if keep is None else self.receptive_field() & padding(keep)
        return spoil(self._finish(*self._routed(x, allowed)), bad, bad, allowed)

    def routes(self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | None = None) -> Routes:
        """Which experts the tokens of x use."""
        return self._kept(x, mask)[0]

    def balance_loss(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, ""]:
        """1 where experts are used alike, more where they aren't."""
        routes, keep = self._kept(x, mask)
        return balance(routes, keep)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """The state before any token: keys, values, what tokens say, and which are `real`."""
        if not self.causal:
            refuse(self, "causal", "is off, and this layer sees later tokens", False, "a layer built with causal=True")
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        weight = self.k_proj.weight
        at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        widths = dict.fromkeys("kv", (self.num_kv_heads, self.head_dim))
        if self.similarity != "none":
            widths["said"] = 1, self.router.gate.out_features
        if self.similarity == "tokens":
            widths["u"] = 1, self.dim
        held = {name: torch.zeros(batch_size, heads, capacity, n, **at) for name, (heads, n) in widths.items()}
        return KVCache({**held, "real": torch.zeros(batch_size, 1, capacity, 1, **at)})

    def step(
        self, x: Float[Tensor, "B t M"], state: KVCache, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it."""
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, KVCache):
            refuse(self, "state", "has the wrong type", type(state).__name__, "that of init_state", error=TypeError)
        if state.batch_size != len(x):
            refuse(self, "state", "has another batch than x", state.batch_size, f"{len(x)} sequences")
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        old = {name: z[..., : state.length, :] for name, z in state.buffers.items()}
        real = torch.cat([old["real"][:, 0, :, 0] != 0, keep], 1)
        new: dict[str, Tensor] = {"real": keep[:, None, :, None].to(x.dtype)}
        routed = self._routed(x, causal() & padding(real), old, new)
        new = {name: z.to(state.buffers[name].dtype) for name, z in new.items() if name in state.buffers}
        return self._finish(*routed), state.append(**new)[1]

    def _finish(self, h: Tensor, u: Tensor, routes: Routes) -> Float[Tensor, "B T M"]:
        out: Tensor = h + self.experts(u, routes)
        if autocasts(out.device) and out.dtype != torch.float64:  # residuals stay wide
            out = out.to(torch.get_autocast_dtype(out.device.type))
        return out

    def _kept(self, x: Tensor, mask: Any) -> tuple[Routes, Tensor | None]:
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            refuse(self, "mask", "packs documents, whose routes aren't told", "masks.packed", "one document a row")
        allowed = self.receptive_field() if keep is None else self.receptive_field() & padding(keep)
        return self._routed(x, allowed)[2], keep

    def _routed(
        self, x: Tensor, allowed: Mask, old: dict[str, Tensor] | None = None, new: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Routes]:
        """What attention leaves, its norm, and where that goes; `new` takes what later tokens read."""

        def past(name: str, z: Tensor) -> Tensor:
            if new is not None:
                new[name] = z
            return z if old is None else torch.cat([old[name].to(z.dtype), z], 2)

        D, z = self.head_dim, self.norm1(x)
        q, k, v = (p(z).unflatten(-1, (-1, D)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = past("k", k), past("v", v)
        h = x + self.o_proj(attention(q, k, v, mask=allowed).transpose(1, 2).flatten(2))
        u, vote, said = self.norm2(h), None, None
        if self.similarity != "none":
            said = past("said", self.router.says(u)[:, None])[:, 0]
            vote = voting(q, k, allowed)
        if self.similarity == "tokens":
            asks = u if self.metric is None else self.metric(u)
            vote = voting(asks[:, None], past("u", u[:, None]), allowed, 1 / self.temperature)
        return h, u, self.router(u, vote, said=said)

"""Dynamic mask attention: values say which keys matter; a query sees the w best of those so far.

What a key scores depends on itself alone, so a key that is not among the best w is out for good: w keys are all that a
state holds of the past. Where all score alike, as at the start, they are the last w.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, flag, number, refuse, tokens, whole
from regard.heads.qk_norm import QKNorm
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import shown
from regard.positions.rotary import Rotary
from regard.routing.running_best import DynamicMaskState, dynamic_mask_attention

CARD = Card(
    "dynamic_mask",
    equation="""delta[g,s] = exp(A_g softplus(dt_gs)),   dt_s = W [v_1s | .. | v_Gs]   or without exp, form="linear"
seen by query t: the w = keep_window keys s <= t with the largest delta[g,s]; of equals, the latest
out_t = softmax over those of q_t . k_s / sqrt(D) + delta[g,s], times v_s
q, k: normed to root mean square 1 in each head, times a weight a channel, and rotated""",
    papers=(
        Paper(
            "Trainable Dynamic Mask Sparse Attention",
            "Shi, Wu, Wu, Peng, Wang, Liu, Luo",
            2025,
            "2508.02124",
            "abstract; the authors' layer in transformers (Doge); not the method's own text",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "dropout", "compile"},
    lacks={"bidirectional": "keys compete as they come", "cross": "it chooses among the keys of one sequence"},
    traits={"normalised", "nonnegative", "shift_invariant", "sparse", "routed"},
    cost=Cost(
        "B*H*D*(2*T*min(T, keep_window) - min(T, keep_window)**2) + B*T*G*G*D",
        "min(S, keep_window)*G*(2*D + 1)",
    ),
    claim="It holds w keys, and learns to hold one that matters for as long as it does, where a window of w forgets: "
    "tests/routing/test_dynamic_mask.py::test_learns_to_keep_a_marked_token_far_beyond_the_window.",
    differs=(
        "Of equal keys the latest is kept; the authors' code leaves it to torch.topk. With A = 0, as at the start, all "
        "are equal.",
        "A query that may see no key gives 0, where the authors' code averages all.",
        "The exponential stops at e^80, where theirs goes to infinity.",
        "dropout and bias as in transformers' layer; its stretched rotations are not loaded.",
        "Left out, of the authors' later code: keys kept in whole blocks by majority, and all keys of positive bias "
        "kept in place of w.",
    ),
    verified="third-party",
    exceptions={
        "L13": "what a key scores is made of the values of all key heads, so that a repeated head is no repeated layer",
        "L59": "of a million tokens much alike float32 can't tell which four matter most, and sees others",
    },
    example={"keep_window": 4},
    tries={"keep_window": 5},
    tasks=("mqar(keep_window=16)",),
    defaults={
        "keep_window": "code",
        "form": "code",
        "qk_norm": "code",
        "base": "code",
        "eps": "code",
        "bias": "code",
    },
)

LARGEST = 80.0
"""Above which exp is cut, before float32 overflows."""


@CARD.module
class DynamicMaskAttention(HeadMixer):
    """Causal self-attention of the Doge model.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`; `bias` also of `dt_proj`.
        keep_window: w, keys that a query sees in each of the G key heads.
        form: "exp", or the authors' later "linear".
        qk_norm: whether queries and keys are normed.
        base: of rotary positions; None for none.
        eps: of the norms, under the root.
        dropout: of the weights, in training.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        keep_window: int = 2048,
        form: Literal["exp", "linear"] = "exp",
        qk_norm: bool = True,
        base: float | None = 10000.0,
        eps: float = 1e-6,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        whole(self, keep_window=keep_window)
        choice(self, ("exp", "linear"), form=form)
        flag(self, qk_norm=qk_norm)
        number(self, least=0, most=1, dropout=dropout)
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=True, bias=bias)
        if base is not None and self.head_dim % 2:
            refuse(self, "head_dim", "is odd, and rotation turns pairs", self.head_dim, "an even one, or base=None")
        G, D = self.num_kv_heads, self.head_dim
        self.rotary = None if base is None else Rotary(D, base=base)
        self.norm = QKNorm(D, eps=eps) if qk_norm else None
        self.keep_window, self.form, self.dropout = keep_window, form, dropout
        self.A = nn.Parameter(torch.zeros(G))
        self.dt_proj = nn.Linear(G * D, G, bias=bias)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep_window={self.keep_window}, form={self.form!r}"

    def reset_parameters(self) -> None:
        """As the authors' model: maps normal with std 0.02, A zero, so that the last w keys are seen."""
        nn.init.zeros_(self.A)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.dt_proj):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, state: DynamicMaskState | None
    ) -> tuple[Tensor, DynamicMaskState]:
        """From a state (None = nothing seen) to the state after these tokens."""
        first = 0 if state is None else state.length
        if self.norm is not None:
            q, k, v = self.norm(q, k, v)
        if self.rotary is not None:
            where = torch.arange(first, first + q.shape[2], device=q.device)
            q, k = self.rotary.turn(q, k, where, where)
        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0)
        delta = self.delta(v)
        rate = self.dropout if self.training else 0.0
        return dynamic_mask_attention(q, k, v, delta, keep, window=self.keep_window, dropout=rate, state=state)

    def delta(self, v: Float[Tensor, "B G T D"]) -> Float[Tensor, "B G T"]:
        """How much each key matters, in at least fp32."""
        wide = torch.promote_types(v.dtype, torch.float32)
        dt = F.softplus(self.dt_proj(v.transpose(1, 2).flatten(2)).to(wide))
        grown = self.A.to(wide) * dt
        return (grown.clamp(max=LARGEST).exp() if self.form == "exp" else grown).mT

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        return self.run(q, k, v, keep, None)[0]

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DynamicMaskState:
        """The state before any token; it grows to w keys, whatever the capacity."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        z = self.k_proj.weight.new_zeros(batch_size, self.num_kv_heads, 0, self.head_dim, device=device, dtype=dtype)
        delta = z[..., 0].to(torch.promote_types(z.dtype, torch.float32))
        return DynamicMaskState(z, z.clone(), delta, delta.bool(), 0)

    def step(
        self, x: Float[Tensor, "B t M"], state: DynamicMaskState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], DynamicMaskState]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t.
        """
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, DynamicMaskState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the DynamicMaskState of init_state", error=TypeError)
        if len(state.k) != len(x):
            refuse(self, "state", "has another batch than x", len(state.k), f"{len(x)} sequences")
        out, after = self.run(*self.split(x, x), mask, state)
        return self.merge(out), after._replace(k=after.k.to(state.k.dtype), v=after.v.to(state.v.dtype))

"""Dual attention: some heads hand on features, others how two tokens relate and whose word that is.

Each half of the heads has an output projection of its own; _relational.py has what the second half does.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, flag, number, refuse, whole
from regard.masks import Mask, causal, full
from regard.mixers._relational import Activation, RelationalHeads
from regard.mixers._symbols import PositionalSymbols, RelativeSymbols, SymbolicAttention, Symbols
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.layer import Attention
from regard.positions.rotary import Rotary
from regard.shapes import head_shape

CARD = Card(
    "dual_attention",
    equation="""y = [concat_h(A^h x W_v^h) W_o^s | concat_h(y^h) W_o^r]     Hs sensory heads, then Hr relational ones
y^h_i = sum_j A^h_ij (W_r^h r(i, j) + W_s^h s_j),   A^h of queries and keys of its own, scale 1 / sqrt(D)
r(i, j)_l = act((P_l x_i) . (Q_l x_j) / sqrt(Dr)),   l = 1 .. R,   R Dr = Hr D,   never turned, the same for all heads
s_j: softmax(templates . (W x_j + b)) of a library, by parts;   or a row for place j;   or s_ij for j - i, clipped""",
    papers=(
        Paper(
            "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
            "Altabaa, Lafferty",
            2024,
            "2405.16727",
            "abstract; the authors' code, whose comments have the formulas",
        ),
    ),
    supports={
        "causal",
        "bidirectional",
        "cross",
        "padding",
        "packed",
        "mask",
        "gqa",
        "streaming",
        "dropout",
        "compile",
    },
    traits={"position_free", "shift_invariant"},
    cost=Cost(
        "2*B*H*T*S*D + B*T*S*num_relational_heads*(D + num_relations) + B*(T + S)*M*num_relational_heads*D"
        " + B*T*num_relational_heads*D*num_relations + B*S*M*(M + 2*num_symbols)",
        "S*(2*G*D + num_relational_heads*D)",
    ),
    claim="A relational head with symbols of positions sees how tokens relate and not what they are: turned all alike, "
    "they give the same output: tests/mixers/test_dual_attention.py::test_sees_relations_and_not_features.",
    differs=(
        "num_heads counts heads of both kinds.",
        "Nothing is dropped from the lookup of symbols, where the authors' code drops in evaluation, too.",
        "As in the code, relations have no grouped keys, and biases come on keys and values together.",
        "Keys, relations' keys and symbols are those of the context where there is one; the authors give no such form.",
        "Left out: symbols looked up by relations with neighbours, which the code has, commented out of its models.",
    ),
    verified="third-party",
    example={"num_relational_heads": 2, "num_relations": 2, "num_symbols": 5, "symbol_heads": 2},
    tries={
        "num_relational_heads": 4,
        "num_relations": 4,
        "relation_activation": "tanh",
        "symbol_heads": 3,
        "max_length": {"symbols": "positional", "max_length": 64},
        "max_distance": {"symbols": "relative", "max_distance": 3},
        "share": {"share": True, "num_relational_heads": 3},
        "relational_kv_heads": 1,
        "base": 100.0,
    },
    defaults={
        "num_relational_heads": "code, half of them",
        "num_relations": "code, as many as relational heads",
        "symbols": "code, its language models",
        "num_symbols": "code, the readme's example",
        "symbol_heads": "code, the readme's example",
        "max_length": "ours",
        "max_distance": "ours",
        "relational_kv_heads": "code, as many as relational heads",
        "base": "code, without positions",
    }
    | dict.fromkeys(("relation_activation", "symmetric", "share", "kv_bias", "out_bias"), "code"),
)


class DualState(NamedTuple):
    """The past of both halves; None for one without heads."""

    sensory: KVCache | None
    relational: KVCache | None
    """Its keys, its symbols, and the senders' side of relations."""


@CARD.module(closed=("retriever", "kernel"))
class DualAttention(nn.Module):
    """Sensory and relational heads, each half with an output projection of its own.

    Args:
        dim, num_heads, causal, kernel: as in `regard.Attention`; the width of a head is dim / num_heads.
        num_relational_heads: Hr, how many of them are relational; default num_heads // 2, the rest is sensory.
        num_relations: R; default Hr.
        relation_activation: act; "gelu" is the tanh form.
        symmetric: whether Q = P.
        symbols: how senders are told apart: "symbolic" by a lookup, "positional", or "relative".
        num_symbols, symbol_heads: of the lookup's library.
        max_length: how many positions have a symbol.
        max_distance: m, from which on all distances have one symbol.
        share: whether both halves have the same queries and keys; needs as many heads in each.
        num_kv_heads: of the sensory half; None and num_heads are as many as it has heads.
        relational_kv_heads: of the relational one, whose key heads have symbols of their own.
        base: of rotary positions, in both halves' scores; None for none.
        kv_bias, out_bias: whether keys and values, or both output projections, have one.
        dropout: of weights and outputs, in training.
        retriever: symbols that other layers have, too, in place of those that `symbols` would make.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M).
    """

    def __init__(
        self, dim: int, num_heads: int, *, num_relational_heads: int | None = None, num_relations: int | None = None,
        relation_activation: Activation = "identity", symmetric: bool = False,
        symbols: Literal["symbolic", "positional", "relative"] = "symbolic", num_symbols: int = 512,
        symbol_heads: int = 4, max_length: int = 512, max_distance: int = 16, share: bool = False,
        num_kv_heads: int | None = None, relational_kv_heads: int | None = None, base: float | None = None,
        kv_bias: bool = False, out_bias: bool = False, causal: bool = False, dropout: float = 0.0,
        retriever: Symbols | None = None, kernel: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        D = head_shape(dim, num_heads, None, None, who=type(self).__name__).head_dim
        divides(self, num_heads=num_heads, dim=dim)
        flag(self, symmetric=symmetric, share=share, kv_bias=kv_bias, out_bias=out_bias, causal=causal)
        choice(self, get_args(Activation), relation_activation=relation_activation)
        number(self, least=0, most=1, dropout=dropout)
        Hr = num_heads // 2 if num_relational_heads is None else num_relational_heads
        whole(self, 0, most=num_heads, num_relational_heads=Hr)
        Hs, R = num_heads - Hr, (Hr or 1) if num_relations is None else num_relations
        whole(self, num_relations=R)
        divides(self, num_relations=R, relational_width=Hr * D)
        G = Hs if num_kv_heads in (None, num_heads) else num_kv_heads
        if share and (Hs != Hr or (relational_kv_heads or Hr) != G):
            refuse(self, "share", "needs halves that are alike", f"{Hs} and {Hr} heads", "as many in each")
        make: dict[str, Callable[[], Symbols]] = {
            "symbolic": lambda: SymbolicAttention(dim, symbol_heads, num_symbols),
            "positional": lambda: PositionalSymbols(dim, max_length),
            "relative": lambda: RelativeSymbols(dim, max_distance),
        }
        choice(self, make, symbols=symbols)
        if not (retriever is None or (isinstance(retriever, Symbols) and retriever.dim == dim)):
            got = getattr(retriever, "dim", type(retriever).__name__)
            refuse(self, "retriever", "makes no symbols for this layer", got, f"Symbols of width {dim}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, D
        self.num_relational_heads, self.num_relations = Hr, R
        self.causal, self.dropout = causal, dropout
        self.num_kv_heads = G
        rest: dict[str, Any] = {"head_dim": D, "causal": causal, "dropout": dropout, "kernel": kernel}
        self.sensory = self.relational = None
        if Hs:
            turn = None if base is None else Rotary(D, base=base, interleaved=True)
            self.sensory = Attention(dim, Hs, num_kv_heads=G, position=turn, **rest)
        if Hr:
            found = make[symbols]() if retriever is None else retriever
            of_pairs = {"num_relations": R, "activation": relation_activation, "symmetric": symmetric, "base": base}
            self.relational = RelationalHeads(dim, Hr, found, of_pairs, num_kv_heads=relational_kv_heads, **rest)
        for half in self._halves():
            width, keys = half.num_heads * D, half.num_kv_heads * D
            half.o_proj = nn.Linear(width, width, bias=out_bias)
            if kv_bias:
                half.k_proj, half.v_proj = nn.Linear(dim, keys), nn.Linear(dim, keys)
        if share and self.sensory is not None and self.relational is not None:
            self.relational.q_proj, self.relational.k_proj = self.sensory.q_proj, self.sensory.k_proj

    def _halves(self) -> list[Attention]:
        return [half for half in (self.sensory, self.relational) if half is not None]

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions through this layer."""
        return causal() if self.causal else full()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Arguments as of `regard.Attention`."""
        outs, first = [], 0
        for half in self._halves():
            heads = slice(first, first := first + half.num_heads)
            own = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == self.num_heads
            outs.append(half(x, context, mask=mask[:, heads] if own else mask, positions=positions))  # type: ignore[index]
        return F.dropout(torch.cat(outs, -1), self.dropout, self.training)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DualState:
        """Empty caches of both halves."""
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        made = [half and half.init_state(batch_size, capacity, **at) for half in (self.sensory, self.relational)]
        return DualState(*made)  # type: ignore[arg-type]

    def step(
        self,
        x: Float[Tensor, "B t M"],
        state: DualState,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], DualState]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it."""
        if not isinstance(state, DualState):
            given = type(state).__name__
            refuse(self, "state", "has the wrong type", given, "the DualState of init_state", error=TypeError)
        outs: list[Tensor] = []
        after: list[Any] = []
        for half, past in zip((self.sensory, self.relational), state, strict=True):
            if half is None or past is None:
                after.append(None)
                continue
            out, now = half.step(x, past, mask=mask, positions=positions)
            outs.append(out)
            after.append(now)
        return F.dropout(torch.cat(outs, -1), self.dropout, self.training), DualState(*after)

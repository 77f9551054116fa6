"""Relational heads: attention that hands on how two tokens relate, and a symbol of the sender instead of its features.

Relations of a pair are as many numbers as there are relations, the same for all heads. They are summed with a head's
weights first and brought to its width after that, so that nothing of size T S H D is formed.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.kernels.problem import combine, dots, softmax
from regard.mixers._symbols import RelativeSymbols, Symbols
from regard.pipeline.layer import Attention
from regard.positions.rotary import Rotary
from regard.positions.shaw import relative_values
from regard.stages import Made, Position, Rows, Tokens

Activation = Literal["identity", "relu", "sigmoid", "tanh", "gelu", "silu"]
_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def relations(
    p: Float[Tensor, "B R t Dr"], q: Float[Tensor, "B R s Dr"], activation: Activation = "identity"
) -> Float[Tensor, "B R t s"]:
    """r(i, j) of receivers' p_i and senders' q_j."""
    return _ACT[activation](dots(p, q) * p.shape[-1] ** -0.5)


def related(
    weights: Float[Tensor, "B H t s"], r: Float[Tensor, "B R t s"], mix: Float[Tensor, "H D R"]
) -> Float[Tensor, "B H t D"]:
    """W_r^h sum_j A_ij^h r(i, j)."""
    return torch.einsum("bhtr,hdr->bhtd", torch.einsum("bhts,brts->bhtr", weights, r), mix)


def relational_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    s: Float[Tensor, "B G S V"],
    of_receivers: Float[Tensor, "B R T Dr"],
    of_senders: Float[Tensor, "B R S Dr"],
    mix: Float[Tensor, "H V R"],
    *,
    activation: Activation = "identity",
    mask: Bool[Tensor, "#B #H T S"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Relational heads in one piece, with symbols s brought to the heads' width; layers do the same in chunks."""
    weights = softmax(dots(q, k) * q.shape[-1] ** -0.5, mask)
    return combine(weights, s) + related(weights, relations(of_receivers, of_senders, activation), mix)


class Relations(Position):
    """What relational heads read besides the symbols of senders: relations, and symbols of pairs."""

    def __init__(
        self, dim: int, heads: int, width: int, pairs: RelativeSymbols | None, *, num_relations: int,
        activation: Activation, symmetric: bool, base: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.num_relations, self.pairs = activation, num_relations, pairs
        self.rotary = None if base is None else Rotary(width, base=base, interleaved=True)
        self.receiver_proj = nn.Linear(dim, heads * width, bias=False)
        self.sender_proj = None if symmetric else nn.Linear(dim, heads * width, bias=False)
        self.mix = nn.Parameter(torch.empty(heads, width, num_relations))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.mix, a=5**0.5)

    def prepare(self, tokens: Tokens) -> Made:
        p, q = self.receiver_proj(tokens.x), (self.sender_proj or self.receiver_proj)(tokens.context)
        p, q = (z.unflatten(-1, (self.num_relations, -1)).transpose(1, 2) for z in (p, q))
        return Made(p, q, None if self.pairs is None else tokens.v_proj(self.pairs.table.to(p.dtype)))

    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        return z if self.rotary is None else self.rotary.rotate(z, positions)

    def values(self, weights: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t D"]:
        p, q, table = rows.made
        assert p is not None
        assert q is not None
        r = relations(p.to(weights.dtype), q.to(weights.dtype), self.activation)
        if rows.allowed is not None:  # what overflows where nobody looks must not reach the rest as 0 * inf
            r = r.masked_fill(~rows.allowed.any(1, keepdim=True), 0)
        out = related(weights, r, self.mix.to(weights.dtype))
        if self.pairs is None:
            return out
        table = table.to(weights.dtype).unflatten(-1, (-1, self.mix.shape[1])).transpose(0, 1)
        table = table.repeat_interleave(weights.shape[1] // len(table), 0)
        return out + relative_values(weights, table, self.pairs.index(rows.i, rows.j))


class RelationalHeads(Attention):
    """The relational half: attention whose values are symbols, and relations besides."""

    position: Relations

    def __init__(
        self, dim: int, num_heads: int, symbols: Symbols, of_pairs: dict[str, Any], *, head_dim: int, **rest: Any
    ) -> None:
        pairs = symbols if isinstance(symbols, RelativeSymbols) else None
        position = Relations(dim, num_heads, head_dim, pairs, **of_pairs)
        super().__init__(dim, num_heads, head_dim=head_dim, position=position, **rest)
        self.symbols = symbols if pairs is None else None

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k = self._split(self.q_proj(x), self.num_heads), self._split(self.k_proj(source), self.num_kv_heads)
        if self.symbols is None:
            v = torch.zeros_like(k)
        else:
            s = self.symbols(source, where_keys).expand(len(source), -1, -1)
            v = self._split(self.v_proj(s), self.num_kv_heads)
        return *self.position.turn(q, k, turn, where_keys), v, x, source

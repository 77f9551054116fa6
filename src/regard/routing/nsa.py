"""Native sparse attention: past blocks in brief, the best in full, and a window, added up by gates.

What a query gives to blocks in brief says which of them it reads in full, so that the choice, which has no gradient, is
trained through the brief ones. Query heads that share keys choose together.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, flag, refuse, tokens, whole
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.tokens import shown
from regard.positions.rotary import Rotary
from regard.routing.nsa_branches import BlockMLP, Brief, complete, cut, mean, native_sparse_attention

CARD = Card(
    "nsa",
    equation="""k~_c, v~_c = phi(keys, values c stride .. c stride + length - 1)          phi: mean, or an MLP
P[h,t,c] = softmax over { c : c stride + length - 1 <= t } of q_t . k~_c / sqrt(D),   o1 = sum_c P v~_c
rank[t,j] = sum over c, and the group's heads h, of P[h,t,c] (share of c's tokens that are in block j)
            inf for the first block, the query's own, floor(t / block), and the one before it; later ones never
o2 = softmax over { s <= t : s in one of the `count` best blocks } of q_t . k_s / sqrt(D), times v_s
o3 = the same over { t - window < s <= t }
out_t = g1 o1 + g2 o2 + g3 o3,   (g1, g2, g3) = sigmoid(x_t W_g) in each head""",
    papers=(
        Paper(
            "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention",
            "Yuan et al.",
            2025,
            "2502.11089",
            "abstract; accounts of the method; code of flash-linear-attention, native-sparse-attention-triton and "
            "native-sparse-attention-pytorch; the method's own text not read",
        ),
    ),
    supports={"causal", "padding", "packed", "gqa", "streaming", "compile"},
    lacks={"bidirectional": "blocks are read once they are past", "cross": "its blocks are those of one sequence"},
    traits={"linear_in_values"},
    cost=Cost(
        "B*H*D*(2*T*floor(T/block) + T*(min(T, count*block) + min(T, window))*2"
        " - min(T, count*block)**2 - min(T, window)**2) + 3*B*T*M*H",
        "2*S*G*D + 2*G*D*S/block",
    ),
    claim="It costs less than the square of the length, and with all blocks chosen and only their gate open it is full "
    "attention: tests/routing/test_nsa.py::test_four_times_the_tokens_cost_far_less_than_sixteen_times, "
    "tests/routing/test_nsa.py::test_all_blocks_are_full_attention.",
    differs=(
        "Defaults are those of flash-linear-attention, whose three branches share keys and values and whose blocks in "
        'brief are means; compress="mlp" and own_kv=True are the paper\'s.',
        "A block in brief counts for those that it overlaps by how much it does: the paper's double sum as recalled, "
        "and what native-sparse-attention-triton does.",
        "Inferred: keys are rotated before phi, as in flash-linear-attention; phi's one hidden layer, with ReLU, is as "
        "wide as its input, as in native-sparse-attention-pytorch.",
        "Hidden keys count in no mean and are zeros to the MLP; blocks of hidden keys alone aren't read in brief. "
        "Blocks count from the first token of a row, padding among them.",
        "Left out, of native-sparse-attention-pytorch: learned keys and values beside the blocks in brief, a bias of "
        "the gates that opens the window first, and gradients through the choice.",
    ),
    verified="third-party",
    example={"block": 2, "count": 3, "window": 3},
    tries={
        "length": {"compress": "mlp", "length": 4, "stride": 2},
        "stride": {"compress": "mlp", "length": 4, "stride": 1},
        "compress": {"compress": "mlp", "length": 2, "stride": 2},
        "block": 3,
        "count": 4,
    },
    tasks=("mqar(block=8, window=8)",),
    defaults={
        "block": "code, flash-linear-attention; the paper's too, by accounts of it",
        "count": "code, flash-linear-attention; the paper's too, by accounts of it",
        "window": "code, flash-linear-attention; the paper's too, by accounts of it",
        "compress": "code, flash-linear-attention",
        "length": "ours, as in accounts of the paper",
        "stride": "ours, as in accounts of the paper",
        "own_kv": "code, flash-linear-attention",
        "base": "code, flash-linear-attention",
        "bias": "code, flash-linear-attention",
    },
)


class NSAState(NamedTuple):
    """The past."""

    past: KVCache
    """Keys, values, and which are `real`."""
    brief: KVCache
    """The same of brief blocks."""


@CARD.module
class NativeSparseAttention(HeadMixer):
    """Causal self-attention of three branches, with a gate for each in every head.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`; H / G heads choose together.
        block: keys in a block that is read in full.
        count: such blocks a query reads, at least 3: the first, its own and the one before it are among them.
        window: keys that the third branch sees, the query's own among them.
        compress: "mean", over `block` keys, or "mlp", over `length` keys every `stride` keys.
        length, stride: of the MLP's blocks, stride at most the length.
        own_kv: whether each branch has keys and values of its own.
        base: of rotary positions; None for none.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = 64,
        count: int = 16,
        window: int = 512,
        compress: Literal["mean", "mlp"] = "mean",
        length: int = 32,
        stride: int = 16,
        own_kv: bool = False,
        base: float | None = 10000.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        whole(self, block=block, window=window, length=length)
        whole(self, 3, count=count)
        whole(self, most=length, stride=stride)
        choice(self, ("mean", "mlp"), compress=compress)
        flag(self, own_kv=own_kv)
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=True, bias=bias)
        if base is not None and self.head_dim % 2:
            refuse(self, "head_dim", "is odd, and rotation turns pairs", self.head_dim, "an even one, or base=None")
        self.rotary = None if base is None else Rotary(self.head_dim, base=base)
        self.block, self.count, self.window, self.compress, self.own_kv = block, count, window, compress, own_kv
        self.length, self.stride = (length, stride) if compress == "mlp" else (block, block)
        G, D = self.num_kv_heads, self.head_dim
        if own_kv:
            self.k_proj, self.v_proj = (nn.Linear(dim, 3 * G * D, bias=self.q_proj.bias is not None) for _ in range(2))
        self.g_proj = nn.Linear(dim, 3 * num_heads, bias=False)
        self.k_compress, self.v_compress = (BlockMLP(G, length, D) if compress == "mlp" else None for _ in range(2))

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, block={self.block}, count={self.count}, window={self.window}, "
            f"compress={self.compress!r}"
        )

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S C"]) -> tuple[Tensor, Tensor, Tensor]:
        """Behind each query its gates' logits."""
        D = self.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return torch.cat([q, self.g_proj(x).unflatten(-1, (-1, 3)).transpose(1, 2)], -1), k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        q, k = self._turned(q, k, 0)
        return self._branches(q, k, v, self._in_brief(k, v, keep), keep)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NSAState:
        """The state before any token, with room for `capacity` of them."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        weight = self.k_proj.weight
        at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}

        def room(heads: int, n: int) -> KVCache:
            kept = {name: torch.zeros(batch_size, heads, n, self.head_dim, **at) for name in "kv"}
            return KVCache({**kept, "real": torch.zeros(batch_size, 1, n, 1, device=at["device"], dtype=torch.bool)})

        blocks = complete(capacity, self.length, self.stride)
        return NSAState(room(self.num_kv_heads * (3 if self.own_kv else 1), capacity), room(self.num_kv_heads, blocks))

    def step(
        self, x: Float[Tensor, "B t M"], state: NSAState, *, mask: Bool[Tensor, "B t"] | None = None
    ) -> tuple[Float[Tensor, "B t M"], NSAState]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: True = a real token, of these t.
        """
        tokens(self, "x", x, self.dim)
        x = shown(self, x, mask)
        if not isinstance(state, NSAState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the NSAState of init_state", error=TypeError)
        if state.past.batch_size != len(x):
            refuse(self, "state", "has another batch than x", state.past.batch_size, f"{len(x)} sequences")
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        q, k, v = self.split(x, x)
        q, k = self._turned(q, k, state.past.length)
        dtype = state.past.buffers["k"].dtype
        held, past = state.past.append(k=k.to(dtype), v=v.to(dtype), real=keep[:, None, :, None])
        first, last = (complete(n, self.length, self.stride) for n in (state.past.length, past.length))
        fill = slice(first * self.stride, (last - 1) * self.stride + self.length if last > first else first)
        k, v = (held[n][:, :, fill].to(q.dtype) for n in "kv")
        new = self._in_brief(k, v, held["real"][:, 0, fill, 0])
        blocks, brief = state.brief.append(
            k=new.k.to(dtype), v=new.v.to(dtype), real=new.real.expand(len(x), -1)[:, None, :, None]
        )
        k, v, bk, bv = (z[n].to(q.dtype) for z in (held, blocks) for n in "kv")
        known = Brief(bk, bv, blocks["real"][:, 0, :, 0], self.length, self.stride)
        return self.merge(self._branches(q, k, v, known, held["real"][:, 0, :, 0])), NSAState(past, brief)

    def _turned(self, q: Tensor, k: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Queries, whose gates stay as they are, and keys, rotated."""
        if self.rotary is None:
            return q, k
        where = torch.arange(first, first + k.shape[2], device=k.device)
        q, gates = q.tensor_split((self.head_dim,), -1)
        q, k = self.rotary.turn(q, k, where, where)
        return torch.cat([q, gates], -1), k

    def _in_brief(self, k: Tensor, v: Tensor, keep: Bool[Tensor, "B S"] | None) -> Brief:
        length, stride, G = self.length, self.stride, self.num_kv_heads
        k, v = (cut(z[:, :G], length, stride) for z in (k, v))
        real = None if keep is None else cut(keep[:, None, :, None], length, stride)
        k, v = (
            mean(z, real) if phi is None else phi(z, real) for z, phi in ((k, self.k_compress), (v, self.v_compress))
        )
        some = k.new_ones(1, k.shape[2], dtype=torch.bool) if real is None else real[:, 0, ..., 0].any(2)
        return Brief(k, v, some, length, stride)

    def _branches(self, q: Tensor, k: Tensor, v: Tensor, brief: Brief, keep: Tensor | None) -> Tensor:
        q, gates = q.tensor_split((self.head_dim,), -1)
        options: dict[str, Any] = {"block": self.block, "count": self.count, "window": self.window, "keep": keep}
        if self.own_kv:
            (_, k, own_k), (_, v, own_v) = (z.chunk(3, 1) for z in (k, v))
            options["own"] = own_k, own_v
        return native_sparse_attention(q, k, v, gates.sigmoid(), brief, **options)

"""ChunkAttention: attention whose streaming state stores what the rows of a batch share once.

    out_b = softmax(q_b K_b^T / sqrt(D)) V_b over all tokens of row b, from chunks that rows with equal beginnings share

Exactly plain attention; the state and the two-phase decoding are `regard.cache.PrefixTree`. Ye et al. 2024,
"ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition" (arXiv 2402.15220): the
abstract read and the authors' released code followed.

Differs from the paper: a layer has no token ids, so tokens are known by their features (equal features give equal keys
and values); the state is a value: stepping from it forks its sequences, and they are freed when the last state that
holds them is gone. While gradients are wanted nothing is shared, as every row has a gradient of its own.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard._former import PLAIN, Card, Cost, Paper, register
from regard.cache.prefix_tree import PrefixTree
from regard.checks import tokens as check_tokens
from regard.masks import causal as past
from regard.pipeline.function import attention
from regard.pipeline.layer import Attention
from regard.shapes import HeadShape


@dataclass(frozen=True, eq=False)
class Branches:
    """One sequence of the tree for every batch row."""

    tree: PrefixTree
    sequences: tuple[int, ...]
    capacity: int

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.tree.length(self.sequences[0]) if self.sequences else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all chunks in use in the tree, shared ones counted once."""
        return self.tree.nbytes

    def __del__(self) -> None:
        for sequence in self.sequences:
            self.tree.free(sequence)


class ChunkAttention(Attention):
    """Multi-head attention that streams with a prefix tree. `chunk` is the number of tokens stored together.

    Other arguments and shapes: as in `regard.Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        chunk: int = 64,
        bias: bool = False,
        context_dim: int | None = None,
        kernel: str = "auto",
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            causal=causal,
            bias=bias,
            context_dim=context_dim,
            kernel=kernel,
        )
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"ChunkAttention: chunk must be an int >= 1, got {chunk!r}")
        self.chunk = chunk

    def init_state(  # type: ignore[override]
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Branches:
        """An empty tree with a sequence for every row; room is taken as tokens come, up to the capacity of each."""
        keys = super().init_state(batch_size, capacity, device="meta", dtype=dtype).buffers["k"]
        device = self.k_proj.weight.device if device is None else device
        tree = PrefixTree(self.num_kv_heads, self.head_dim, chunk=self.chunk, device=device, dtype=keys.dtype)
        return Branches(tree, tuple(tree.add() for _ in range(batch_size)), capacity)

    def step(  # type: ignore[override]
        self, x: Float[Tensor, "B t M"], state: Branches
    ) -> tuple[Float[Tensor, "B t M"], Branches]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it."""
        self._needs("streaming", "has no streaming form")
        check_tokens(self._who, "x", x, self.dim)
        if not isinstance(state, Branches):
            raise TypeError(f"step: state must be what init_state gives, got {type(state).__name__}")
        (B, t, _), tree = x.shape, state.tree
        if len(state.sequences) != B:
            raise ValueError(f"step: x has batch {B} and the state {len(state.sequences)}; they must match")
        if state.length + t > state.capacity:
            raise ValueError(
                f"step: {t} new token{'s' * (t != 1)} exceed{'s' * (t == 1)} capacity {state.capacity} "
                f"({state.length} are held); create the state with capacity >= {state.length + t}"
            )
        where = torch.arange(state.length, state.length + t, device=x.device)
        q, k, v, _, _ = self._project(x, x, where, where, where)
        state = Branches(tree, tuple(map(tree.fork, state.sequences)), state.capacity)
        wanted = torch.is_grad_enabled() and (k.requires_grad or tree.k.requires_grad)
        # Single tokens are generated ones, which are not worth a name each.
        tree.append(state.sequences, k, v, tokens=None if wanted or t == 1 else _names(x))
        if t == 1:
            out = tree.attend(q[:, :, 0], state.sequences)[:, :, None]
        else:
            rows = [(q[b : b + 1], *(z[None] for z in tree.keys(s))) for b, s in enumerate(state.sequences)]
            outs = [attention(*row, mask=past(), kernel=self.kernel) for row in rows]
            out = torch.cat(outs) if outs else q
        return self._finish(out, x), state


def _names(x: Float[Tensor, "B t M"]) -> list[list[bytes]]:
    """A short name for every token, the same for the same features."""
    rows = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [[hashlib.blake2b(token.tobytes(), digest_size=16).digest() for token in row] for row in rows]


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    chunk: int = 64,
) -> ChunkAttention:
    return ChunkAttention(
        shape.dim,
        shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        causal=causal,
        chunk=chunk,
    )


CARD = register(
    Card(
        name="chunk_attention",
        family="cache",
        gist="Decoding reads a prefix that several sequences share once, from a tree of chunks.",
        equation="out = sum_C exp(m[C] - m) o[C] / sum_C exp(m[C] - m) z[C], chunks C that rows share, then own ones",
        paper=Paper(
            "ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition",
            "Ye et al.",
            2024,
            "2402.15220",
            "abstract; the authors' code",
        ),
        build=_build,
        supports=frozenset({"causal", "bidirectional", "cross", "padding", "mask", "gqa", "streaming", "compile"}),
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim=(
            "Faster decoding and less memory where sequences share a long prompt, with exact results: "
            "benchmarks/prefix_tree.py measures both against separate caches."
        ),
        differs=(
            "Tokens are known by their features, as a layer has no ids.",
            "A full last chunk is shared too, and forks share half-filled chunks.",
            "Prompts (several tokens in one step) run row by row.",
        ),
        verified="third-party",
        example={"chunk": 4},
    )
)

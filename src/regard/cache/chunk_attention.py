"""ChunkAttention: decoding reads a prefix that several sequences share once, from a tree of chunks.

Exactly plain attention; the state and the two-phase decoding are `regard.cache.PrefixTree`. The state is a value:
stepping from it forks its sequences, and they are freed when the last state that holds them is gone.
"""

import hashlib
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cache.prefix_tree import PrefixTree
from regard.cards import PLAIN, Card, Paper
from regard.checks import refuse, tokens, whole
from regard.masks import Mask
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import Projections
from regard.pipeline.layer import Attention
from regard.pipeline.streaming import check_streams
from regard.tracing import autocasts

CARD = Card(
    "chunk_attention",
    equation="""out_b = softmax(q_b K_b^T / sqrt(D)) V_b over all tokens of row b
    = sum_C exp(m[C] - m) o[C] / sum_C exp(m[C] - m) z[C]
C: the chunks that rows with equal beginnings share, then own ones;   m = max_C m[C]
m[C] = max s, z[C] = sum exp(s - m[C]), o[C] = sum exp(s - m[C]) v over a chunk's scores s and values v""",
    papers=(
        Paper(
            "ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition",
            "Ye et al.",
            2024,
            "2402.15220",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "gqa", "streaming", "compile"},
    traits=PLAIN,
    claim="Less memory where sequences share a long prompt, with exact results; `python -m benchmarks.prefix_tree` "
    "measures the time, too: tests/cache/test_chunk_attention.py::test_rows_with_one_prompt_store_it_once.",
    differs=(
        "A layer has no token ids, so tokens are known by their features (equal features give equal keys and values).",
        "A full last chunk is shared too, and forks share half-filled chunks.",
        "While gradients are wanted nothing is shared, as every row has a gradient of its own.",
        "Prompts (several tokens in one step) run row by row.",
        "The order of sequences never changes, empty ones give 0, and keys may be grouped.",
    ),
    verified="third-party",
    example={"chunk": 4},
    tries={"chunk": ...},
    defaults={"chunk": "ours", "kernel": "ours", "bias": "ours", "context_dim": "ours, as wide as dim"},
)


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


@CARD.module
class ChunkAttention(Attention):
    """Multi-head attention that streams with a prefix tree.

    Args:
        dim, num_heads, kernel, rest: as in `regard.Attention`, as are the shapes.
        chunk: how many tokens are stored together; the default is this library's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        chunk: int = 64,
        kernel: str = "auto",
        **rest: Unpack[Projections],
    ) -> None:
        super().__init__(dim, num_heads, kernel=kernel, **rest)
        whole(self, chunk=chunk)
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
        tree = PrefixTree(
            self.num_kv_heads, self.head_dim, chunk=min(self.chunk, capacity), device=device, dtype=keys.dtype
        )
        return Branches(tree, tuple(tree.add() for _ in range(batch_size)), capacity)

    def step(  # type: ignore[override]
        self,
        x: Float[Tensor, "B t M"],
        state: Branches,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], Branches]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask, positions: as in `regard.Attention`; this layer has nothing that reads positions.
        """
        check_streams(self)
        tokens(self, "x", x, self.dim)
        if not isinstance(state, Branches):
            given = type(state).__name__
            refuse(self, "state", "has the wrong type", given, "what init_state gives", error=TypeError)
        (B, t, _), tree = x.shape, state.tree
        if len(state.sequences) != B:
            refuse(self, "x", "has another batch than the state", B, f"{len(state.sequences)} sequences")
        if not (mask is None or isinstance(mask, Mask)):
            refuse(self, "mask", "has the wrong type", type(mask).__name__, "a regard.masks.Mask", error=TypeError)
        if (end := state.length + t) > state.capacity:
            new = f"with {t} new token{'s' * (t != 1)} exceeds capacity {state.capacity}"
            refuse(self, "x", new, f"{state.length} held before", f"a state with capacity >= {end}")
        self._positions(positions, B, t, x.device)
        where = torch.arange(state.length, state.length + t, device=x.device)
        q, k, v, _, _ = self._project(x, x, where, where, where)
        if autocasts(x.device):  # the tree keeps the dtype it was made with
            q, k, v = (z.to(tree.k.dtype) for z in (q, k, v))
        state = Branches(tree, tuple(map(tree.fork, state.sequences)), state.capacity)
        wanted = torch.is_grad_enabled() and (k.requires_grad or tree.k.requires_grad)
        # Single tokens are generated ones, which are not worth a name each.
        tree.append(state.sequences, k, v, tokens=None if wanted or t == 1 else _names(x))
        if t == 1 and mask is None:
            out = tree.attend(q[:, :, 0], state.sequences)[:, :, None]
        else:
            rows = [(q[b : b + 1], *(z[None] for z in tree.keys(s))) for b, s in enumerate(state.sequences)]
            field = self.receptive_field() if mask is None else self.receptive_field() & mask
            allowed = None if mask is None else field.at(where, torch.arange(end, device=x.device))
            outs = [
                attention(*row, mask=field if allowed is None else allowed[b % len(allowed)][None], kernel=self.kernel)
                for b, row in enumerate(rows)
            ]
            out = torch.cat(outs) if outs else q
        return self._finish(out, x), state


def _names(x: Float[Tensor, "B t M"]) -> list[list[bytes]]:
    """A short name for every token, the same for the same features."""
    rows = x.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [[hashlib.blake2b(token.tobytes(), digest_size=16).digest() for token in row] for row in rows]

"""Delta correction: what sparse attention misses, known of some queries, is added to those after."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import refuse, whole
from regard.kernels import Problem
from regard.masks import Mask, full, padding, prefix
from regard.masks import window as window_mask
from regard.masks.tensors import Packed, unpacked
from regard.mixers.sparse_correction import Mode, check_options, delta_attention
from regard.pipeline import streaming
from regard.pipeline.layer import Attention
from regard.pipeline.paged_cache import State
from regard.pipeline.tokens import key_mask, spoil
from regard.stages import Position, Selector

CARD = Card(
    "delta_correction",
    equation="""A*_i: sparse attention,   A_a: attention over all keys j <= a,   a = stride floor(i / stride)
y_i = A*_i + (A_a - A*_a)          so y_a = A_a
y_i = A_i of the last T mod stride + max(tail, stride) queries, if tail > 0
mode = "recompute":   y_i = A_i where i = a, else A*_i;      mode = "sparse":   y_i = A*_i for all""",
    papers=(
        Paper(
            "Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction",
            "Willette, Lee, Hwang",
            2025,
            "2505.11254",
            "abstract, summaries; official code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "mask", "gqa", "compile"},
    lacks={
        "cross": "its windows are those of one sequence",
        "streaming": "it is for prompts; what follows is dense: `prompt` gives the state for steps of `dense()`",
    },
    traits={"normalised", "linear_in_values", "head_independent"},
    cost=Cost("2*B*H*D*(T*min(S, 2*window - 1 + sinks) + (T - tail)*S/stride + tail*S)", ""),
    claim="Outputs are nearer to full attention's than sparse ones, and than those with as many dense rows and no "
    "correction: tests/mixers/test_delta_correction.py::test_corrected_outputs_are_nearer_to_full_attention.",
    differs=(
        "The last group may be short; the authors' code fails unless the stride divides the rows before the tail.",
        "Sequences no longer than the tail are dense, which the authors' code does not handle.",
        "tail = 0 leaves no dense rows at the end, and with it outputs do not depend on how many tokens follow.",
        "Groups count from the first token of a row, padding among them, and the tail from the last: pad on the left "
        "by multiples of the stride, on the right only without a tail. Packed documents are run one by one.",
        "It has gradients, and a form that is not causal, which the paper does not.",
        "HiP is not in the library; any other mask or selector of it may be the sparse method (`pattern`).",
    ),
    verified="third-party",
    example={"stride": 4, "window": 4, "sinks": 1, "tail": 0},
    tries={"tail": 1},
    exceptions={
        "L50 exported_with_a_free_length": "it has a dense row for each group, and 1 or T of them at some "
        "lengths, which torch's one graph for all would have to tell apart",
    },
    defaults={
        "stride": "code",
        "window": "code",
        "sinks": "code",
        "tail": "code",
        "mode": "code",
        "bias": "ours",
    },
)


@CARD.module(closed=("pattern", "position", "kernel"))
class DeltaCorrection(Attention):
    """`delta_attention` as a layer, for prompts; `prompt` and `dense` go on from there, token by token.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, kernel: as in `regard.Attention`.
        stride: gamma, from one dense query to the next.
        window, sinks: the sparse method: so many keys back, and so many first ones.
        tail: at least so many of the last queries are dense; 0: none.
        mode: "delta", "recompute" or "sparse", as in `delta_attention`.
        bias: whether the projections have one.
        pattern: another sparse method, a mask or a selector.
        position: one that turns queries and keys, as `regard.positions.Rotary`.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        stride: int = 64,
        window: int = 2048,
        sinks: int = 1024,
        tail: int = 128,
        mode: Mode = "delta",
        bias: bool = False,
        causal: bool = False,
        pattern: Mask | Selector | None = None,
        position: Position | None = None,
        kernel: str = "auto",
    ) -> None:
        check_options(self, stride, tail, mode)
        whole(self, window=window)
        whole(self, 0, sinks=sinks)
        if not (pattern is None or isinstance(pattern, Mask | Selector)):
            got = type(pattern).__name__
            refuse(self, "pattern", "has the wrong type", got, "a Mask or a Selector", error=TypeError)
        sizes: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
        super().__init__(dim, num_heads, **sizes, causal=causal, bias=bias, position=position, kernel=kernel)
        if position is not None and (position.prepares() or any(map(position.changes, ("bias", "values")))):
            wanted = "one that embeds tokens or turns queries and keys"
            refuse(self, "position", "adds to scores or values", type(position).__name__, wanted)
        self.stride, self.tail, self.mode = stride, tail, mode
        if pattern is None:
            pattern = window_mask(window) | prefix(sinks) if sinks else window_mask(window)
        self.pattern = pattern

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """As in `regard.Attention`, of one sequence."""
        if context is None and positions is None and unpacked(mask)[0] is not None:
            keep, packed = key_mask(self, mask, x)
            assert packed is not None
            return self._one_by_one(x, packed, keep)
        p, x, allowed, bad = self._prepare(x, context, mask, positions)
        return spoil(self._finish(self._corrected(p), x), *bad, allowed)

    def dense(self) -> Attention:
        """Full attention with the same projections, for what follows a prompt."""
        shapes: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "position": self.position,
        }
        with torch.device("meta"):  # its own projections are not kept
            made = Attention(self.dim, self.num_heads, causal=self.causal, kernel=self.kernel, **shapes)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(made, name, getattr(self, name))
        return made.train(self.training)

    def prompt(
        self, x: Float[Tensor, "B T M"], capacity: int, *, mask: Mask | None = None
    ) -> tuple[Float[Tensor, "B T M"], State]:
        """The outputs of a prompt, as `forward` gives them, and its keys and values as a state for `dense().step`.

        Args:
            capacity: most tokens that the state will hold.
        """
        made = self.dense()
        p, x, _, state = streaming.ahead(made, x, made.init_state(len(x), capacity), mask)
        return self._finish(self._corrected(p), x), state

    def _corrected(self, p: Problem) -> Float[Tensor, "B H T V"]:
        dense = full() if p.mask is None else p.mask
        sparse = self.pattern if isinstance(self.pattern, Selector) else dense & self.pattern
        options: dict[str, Any] = {"stride": self.stride, "tail": self.tail, "mode": self.mode}
        options |= {"scale": p.scale, "kernel": self.kernel}
        return delta_attention(p.q, p.k, p.v, sparse, dense=dense, **options)

    def _one_by_one(
        self, x: Float[Tensor, "B T M"], packed: Packed, keep: Bool[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T M"]:
        """Each document without any padding, which would be in its tail."""
        out, rows = torch.zeros_like(x), packed.lengths * (len(x) if packed.batch == 1 else 1)
        for b, lengths in enumerate(rows):
            start = 0
            for n in lengths:
                at = (slice(b, b + 1), slice(start, start + n))
                start += n
                if n:
                    out[at] = self(x[at], mask=None if keep is None else padding(keep[at]))
        return out

    def _crosses_borders(self) -> bool:
        return True

    def extra_repr(self) -> str:
        own = f"stride={self.stride}, pattern={self.pattern!r}, tail={self.tail}, mode={self.mode!r}"
        return f"{super().extra_repr()}, {own}"

"""FlexAttention: a language model looks closer at parts of an image that its layer before looked at.

A small copy of the image stands among the text. Tokens of the image in detail are keys and values only, the same
features in every layer, and only those are read that lie where a row's attention to the small copy was large in the
layer before. Nothing is lost for good: each layer selects anew. Not torch's FlexAttention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import fits, flag, number, refuse, tokens, whole
from regard.masks import Mask, causal, padding
from regard.mixers.detail_attention import DetailKeys, high_res_attention, looking, seen_by, turned, turns
from regard.mixers.detail_selection import grid_of, select_detail, weights_on
from regard.pipeline.function import attention
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.tokens import key_padding, quarantine, shown, spoil
from regard.shapes import HeadShape, head_shape


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x, detail = (torch.randn(2, n, shape.dim, generator=generator, dtype=torch.float64) for n in (12, 36))
    return x, detail, torch.rand(2, 12, 36, generator=generator) < 0.5


CARD = Card(
    "high_res_attention",
    equation="""o_i  = sum over j <= i of softmax_j(q_i . k_j / sqrt(D)) v_j          q, k turned by their places
o'_i = softmax over [j <= i, n chosen for i] of [q_i . k_j, q_i . k'_n] / sqrt(D), times [v; v']
y = W_o ((1 - a) o + a o')                             rows that choose;   k' = W_k' detail,   v' = W_v' detail
k' is turned by the small copy's cosines and sines, resized to the detail's grid (bicubic)
chosen for the next layer: w = sum over heads of o's weights on the small copy, scaled to 0 .. 255 in each row;
                           w > threshold;   max pool to 9 x 9;   nearest on the detail's grid""",
    papers=(
        Paper(
            "FlexAttention for Efficient High-Resolution Vision-Language Models",
            *("Li, Chen, Cai, Chen, Hong, Chen, Shen, Gan", 2024, "2407.20228", "abstract; official code"),
        ),
    ),
    inputs=_inputs,
    supports={"causal", "padding", "gqa", "streaming", "compile"},
    lacks={
        **{"bidirectional": "it is a language model's", "packed": "its image stands at one place of a row"},
        "cross": "its context is an image in detail, and besides itself",
    },
    cost=Cost("B*H*T*D*(2*(T + 1) + S)", "2*S*G*D + S"),  # each row chooses half of the detail
    claim="What stands in detail alone is read through the layer before's selection, with a ninth of the detail, and "
    "not through any other: tests/mixers/test_high_res.py::test_the_selection_reads_the_bright_cell.",
    differs=(
        "Cells on the detail's grid by whole numbers, floor(index * cells / grid), where the code's ratio is float32.",
        "Where fewer heads make keys, own and detail keys are shared alike; the code fits equal numbers only.",
        "Detail that no row of a batch has chosen is not projected; what one row has chosen is masked for the others.",
        "No dropout (the code has some in plain layers); `alpha`, which grows there, is the caller's to set.",
    ),
    verified="third-party",
    example={"image": (1, 10)},
    tries={"image": (2, 11), "threshold": ..., "cells": ...},
    defaults={
        "image": "ours, one that is small",
        "alpha": "code, as training ends",
        **dict.fromkeys(("threshold", "cells"), "code"),
        **dict.fromkeys(("base", "bias"), "code, of Llama"),
    },
)


@CARD.module
class HighResAttention(nn.Module):
    """A causal layer with rotary places that may read an image in detail.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal: as in `regard.Attention`; always causal.
        image: the places of the small copy, from the first to behind the last: a square map, row by row.
        alpha: the share of what is read with detail; less than 1 early in training.
        base: of the rotary frequencies.
        threshold, cells: as of `regard.mixers.select_detail`.
        bias: whether q, k and v have one.

    Shapes: x (B, T, M), context (B, S, M) -> (B, T, M), S a square number.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        image: tuple[int, int] = (1, 10),
        alpha: float = 1.0,
        base: float = 10000.0,
        threshold: float = 64,
        cells: int = 9,
        bias: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        flag(self, causal=causal, bias=bias)
        if not causal:
            refuse(self, "causal", "is off, and this layer is not bidirectional", causal, "causal=True")
        number(self, least=0, most=1, alpha=alpha)
        self.dim, self.num_heads, G, D = dim, num_heads, shape.num_kv_heads, shape.head_dim
        self.num_kv_heads, self.head_dim, self.base, self.alpha = G, D, base, alpha
        self.causal, self.image, self.threshold, self.cells = True, image, threshold, cells
        self.q_proj = nn.Linear(dim, num_heads * D, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, G * D, bias=bias) for _ in range(2))
        self.detail = DetailKeys(dim, G, D, image=image, base=base, bias=bias)
        self.o_proj = nn.Linear(num_heads * D, dim, bias=False)

    def receptive_field(self) -> Mask:
        """Which tokens may reach which through this layer."""
        return causal()

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S M"] | None = None,
        chosen: Bool[Tensor, "B T S"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Run the layer.

        Args:
            context: the image in detail, a square map row by row.
            chosen: which of it each row reads, of `select` in the layer before; None: none.
            mask: hides tokens: `regard.masks.padding`, or True = a real token.
        """
        tokens(self, "x", x, self.dim)
        keep = key_padding(self, mask, x)
        x, bad = quarantine(x)
        out = self._run(*self._heads(x), context, chosen, keep)
        return spoil(out, bad, bad, causal() if keep is None else causal() & padding(keep))

    def select(
        self,
        x: Float[Tensor, "B T M"],
        detail_grid: int,
        rows: Bool[Tensor, "B T"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B T"] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        state: KVCache | None = None,
    ) -> Bool[Tensor, "B T S"]:
        """What the next layer's rows read of detail_grid x detail_grid tokens, by this layer's weights. No gradient.

        Args:
            rows: which may read any; None: all behind the small copy.
            mask, state: as of `forward`, or of `step` where x follows on tokens that were.
            sizes: of images that were padded to squares, as of `select_detail`.
        """
        tokens(self, "x", x, self.dim)
        if state is None:
            (q, k, _), keep = self._heads(x), key_padding(self, mask, x)
        else:
            q, k, _, keep = self._behind(x, state, mask)[0]
        (B, T), (_, stop), S = x.shape[:2], self.image, k.shape[2]
        if stop > S:
            refuse(self, "x", "does not hold the small copy of the image", f"{S} tokens", f"{stop} or more")
        if rows is None:
            rows = (torch.arange(S - T, S, device=x.device) >= stop).expand(B, T)
        fits(self, "B T", {"B": B, "T": T}, rows=rows)
        at = looking(rows)
        asks = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        weights = weights_on(asks, k, seen_by(at + S - T, S, keep), self.image)
        best = select_detail(weights, detail_grid, threshold=self.threshold, cells=self.cells, sizes=sizes)
        return rows[..., None] & best.new_zeros(B, T, best.shape[2]).scatter(1, at[..., None].expand_as(best), best)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """The state before any token: keys, values, and which are `real`."""
        whole(self, 0, batch_size=batch_size)
        whole(self, capacity=capacity)
        w = self.k_proj.weight
        at: dict[str, Any] = {"device": device or w.device, "dtype": dtype or w.dtype}
        widths = {**dict.fromkeys("kv", (self.num_kv_heads, self.head_dim)), "real": (1, 1)}
        return KVCache({name: torch.zeros(batch_size, n, capacity, w, **at) for name, (n, w) in widths.items()})

    def step(
        self,
        x: Float[Tensor, "B t M"],
        state: KVCache,
        context: Float[Tensor, "B S M"] | None = None,
        chosen: Bool[Tensor, "B t S"] | None = None,
        *,
        mask: Bool[Tensor, "B t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these places, and the state with them in it."""
        tokens(self, "x", x, self.dim)
        (q, k, v, real), new = self._behind(x, state, mask)
        return self._run(q, k, v, context, chosen, real), state.append(**new)[1]

    def _behind(self, x: Tensor, state: KVCache, mask: Any) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Any]:
        """Queries, and keys and values with those before them; which are real; and what is new of them."""
        if not isinstance(state, KVCache):
            refuse(self, "state", "has the wrong type", type(state).__name__, "that of init_state", error=TypeError)
        if state.batch_size != len(x):
            refuse(self, "state", "has another batch than x", state.batch_size, f"{len(x)} sequences")
        q, k, v = self._heads(shown(self, x, mask), state.length)
        keep = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        new = {"k": k, "v": v, "real": keep[:, None, :, None]}
        new = {name: z.to(state.buffers[name].dtype) for name, z in new.items()}
        old = {name: z[..., : state.length, :] for name, z in state.buffers.items()}
        k, v = (torch.cat([old[name].to(z.dtype), z], 2) for name, z in (("k", k), ("v", v)))
        return (q, k, v, torch.cat([old["real"][:, 0, :, 0] != 0, keep], 1)), new

    def _heads(self, x: Float[Tensor, "B T M"], before: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        made, D = (self.q_proj(x), self.k_proj(x), self.v_proj(x)), self.head_dim
        q, k, v = (z.unflatten(-1, (-1, D)).transpose(1, 2) for z in made)
        tables = turns(before, before + x.shape[1], D, self.base, x.device)
        return turned(q, *tables), turned(k, *tables), v

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, context: Tensor | None, chosen: Tensor | None, keep: Tensor | None
    ) -> Float[Tensor, "B T M"]:
        lost, sized = None, {"B": q.shape[0], "T": q.shape[2], "M": self.dim}
        if context is not None:
            sized = fits(self, "B S M", sized, context=context)
            grid_of(self, "context", sized["S"])
        if chosen is None:
            out = attention(q, k, v, mask=causal() if keep is None else causal() & padding(keep))
        else:
            if context is None:
                refuse(self, "chosen", "goes with a context", tuple(chosen.shape), "the tokens it chooses from")
            fits(self, "B T S", sized, chosen=chosen)
            if chosen.dtype != torch.bool:
                refuse(self, "chosen", "has the wrong dtype", chosen.dtype, "torch.bool", error=TypeError)
            far_k, far_v, chosen, lost = self.detail(context, chosen)
            out = high_res_attention(q, k, v, far_k, far_v, chosen, keep=keep, alpha=self.alpha)
        return spoil(self.o_proj(out.transpose(1, 2).flatten(2)), lost, None, None)

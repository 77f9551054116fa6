"""Layers that read the keys and values of an earlier layer, and so have none of their own, nor a cache.

Brandon et al. 2024, "Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
https://arxiv.org/abs/2405.12981 (abstract): of every n layers the first makes keys and values for all. YOCO (Sun et al.
2024, https://arxiv.org/abs/2405.05254) has one such layer for the upper half of a model.

    y, kv = with_kv(first, x)                      second(x, kv)         second = SharedKV(512, 8, causal=True)
    y, state, kv = step_with_kv(first, x, state)   second(x, kv)         the same call: nothing is kept of it
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Never, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.checks import called, refuse, tokens
from regard.kernels import execute
from regard.kernels.check import check_mask
from regard.kernels.pages import Pages
from regard.masks import Mask
from regard.masks.tensors import unpacked
from regard.pairwise import as_mask
from regard.pipeline import streaming
from regard.pipeline.layer import Attention
from regard.pipeline.paged_cache import PagedKVCache, State
from regard.pipeline.tokens import quarantine, spoil
from regard.slots import SLOTS


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What a layer attended to, for others to read: made by `with_kv` and `step_with_kv`, not by hand."""

    k: Float[Tensor, "B G S D"]
    """After rotation."""
    v: Float[Tensor, "B G S D"]
    first_key: int = 0
    """How many earlier ones a cache has dropped."""
    mask: Mask | None = None
    """What that layer was told besides its own pattern, such as padding; it holds for who reads them too."""
    positions: Int[Tensor, "*b T"] | None = None
    """Where its queries stood; those of who reads them stand there too. None: one place a token."""
    bad: Bool[Tensor, "B S"] | None = None
    """Which tokens held NaN or infinity."""
    pages: Pages | None = None
    """Where they lie in a pool; `k` and `v` then have their shapes, and hold nothing."""


def with_kv(
    layer: Attention,
    x: Float[Tensor, "B T M"],
    *,
    mask: Mask | Bool[Tensor, "#B #H T T"] | None = None,
    positions: Int[Tensor, "*b T"] | None = None,
) -> tuple[Float[Tensor, "B T M"], KeyValues]:
    """`layer(x, mask=, positions=)`, and the keys and values that it made."""
    check_makes(layer)
    p, x, allowed, bad = layer._prepare(x, None, mask, positions)
    packed = unpacked(mask)[0]
    if packed is not None and positions is None:
        positions = packed.to(x.device).positions_of(x.shape[1])
    out = spoil(layer._finish(execute(p, layer.kernel), x), *bad, allowed)
    B, T = x.shape[:2]
    told = check_mask(as_mask(mask, B, layer.num_heads), B, layer.num_heads, T, T, x.device)
    return out, KeyValues(p.k, p.v, mask=told, positions=positions, bad=bad[1])


def step_with_kv(
    layer: Attention,
    x: Float[Tensor, "B t M"],
    state: State,
    *,
    mask: Mask | None = None,
    positions: Int[Tensor, "*b t"] | None = None,
) -> tuple[Float[Tensor, "B t M"], State, KeyValues]:
    """`layer.step(x, state, mask=, positions=)`, and all keys and values that the new tokens may see."""
    check_makes(layer)
    if isinstance(state, PagedKVCache) and state.ragged:
        mask, positions = streaming._of_unequal_lengths(layer, state, x, mask, positions)
    p, x, halo, state = streaming.ahead(layer, x, state, mask, positions)
    out = execute(p, layer.kernel)
    out = layer._finish(out[:, :, halo:] if halo else out, x)
    return out, state, KeyValues(p.k, p.v, p.first_key, mask, positions, None, p.pages)


def check_makes(layer: nn.Module) -> None:
    """Refuse a layer whose keys and values are not those of `regard.Attention`."""
    if isinstance(layer, Attention):
        kind = type(layer)
        if kind.forward is Attention.forward and kind.step is Attention.step:
            return
    got = type(layer).__name__
    refuse("with_kv", "layer", "makes no keys and values that others could read", got, "regard.Attention")


def check_shared(layers: Sequence[nn.Module]) -> frozenset[int]:
    """Which of a model's layers make keys and values that others read, each the nearest's below. What can't be read
    is refused."""
    makes, found = None, set()
    for n, layer in enumerate(layers):
        if not isinstance(layer, SharedKV):
            makes = n
            continue
        if makes is None:
            refuse(
                "layers", f"layer {n}", "reads keys and values of a layer below", "none there", "one that makes them"
            )
        check_makes(layers[makes])
        below = cast(Attention, layers[makes])
        sizes = [(z.num_kv_heads, z.head_dim) for z in (below, layer)]
        if sizes[0] != sizes[1]:
            got = f"{sizes[1]} and {sizes[0]} of layer {makes}"
            refuse("layers", f"layer {n}", "reads other heads than there are", got, "one number and width of key heads")
        here, there = layer.receptive_field().reach, below.receptive_field().reach
        if there is not None and (here is None or here > there):
            got = f"{here or 'all'} keys back; layer {makes} keeps {there}"
            refuse("layers", f"layer {n}", "sees further than what it reads is kept", got, f"at most {there}")
        found.add(makes)
    return frozenset(found)


class SharedKV(Attention):
    """A `regard.Attention` without keys and values of its own: it reads those of another layer.

    Queries stand where that layer's own stood, and what its call's mask hid is hidden here as well.

    Args:
        dim, num_heads, ...: as of `regard.Attention`; `num_kv_heads` and `head_dim` are the other layer's. Parts that
            read the tokens behind keys, or earlier queries again, are refused, and of `heads` only what it makes of
            queries counts: keys come as the other layer normalised and rotated them.

    Shapes: x (B, T, M), kv of S >= T keys -> (B, T, M).
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if self.context_dim != dim:
            refuse("SharedKV", "context_dim", "is of keys, which it doesn't make", self.context_dim, "none")
        if self._halo() or self._reads_tokens() or self._preparing() or self._reach():
            filled = {"heads": self.heads, **self._stages()} if self._reach() else self._stages()
            parts = ", ".join(type(stage).__name__ for stage in filled.values())
            refuse("SharedKV", "slots", "read tokens behind keys, or earlier queries", parts, "parts that read q and k")
        if self.gate is not None and self.gate.site in ("key", "value"):
            got = f"{type(self.gate).__name__} at {self.gate.site!r}"
            refuse("SharedKV", "gate", "is of keys or values, which it doesn't make", got, "one of queries or outputs")
        del self.k_proj, self.v_proj
        if self.heads is not None:
            self._freeze_unread(self.heads)

    @classmethod
    def of(cls, layer: nn.Module) -> "SharedKV":
        """A layer with the parts of this one, as `regard.create` makes it, in place of it."""
        if type(layer) is not Attention:
            refuse("SharedKV", "layer", "can't read another's keys and values", type(layer).__name__, "a part's layer")
        assert isinstance(layer, Attention)
        told = {n: getattr(layer, n) for n in ("num_kv_heads", "head_dim", "causal", "scale", "dropout", "kernel")}
        parts = {name: getattr(layer, name) for name in SLOTS}
        weight = layer.q_proj.weight
        at = {"device": weight.device, "dtype": weight.dtype, "bias": layer.q_proj.bias is not None}
        made = cls(layer.dim, layer.num_heads, **told, **at, **parts)
        made.q_proj, made.o_proj = layer.q_proj, layer.o_proj
        made.supports, made.lacks = layer.supports, layer.lacks
        return made

    def forward(self, x: Float[Tensor, "B T M"], kv: KeyValues) -> Float[Tensor, "B T M"]:  # type: ignore[override]
        """Attend from x, the T tokens that `kv` ends with."""
        tokens(self, "x", x, self.dim)
        if not isinstance(kv, KeyValues):
            wanted = "the KeyValues of with_kv or step_with_kv"
            refuse(self, "kv", "has the wrong type", type(kv).__name__, wanted, error=TypeError)
        (B, T), (b, G, S, D) = x.shape[:2], kv.k.shape
        if (b, G, D) != (B, self.num_kv_heads, self.head_dim) or S < T:
            wanted = f"batch {B}, {self.num_kv_heads} heads of width {self.head_dim}, at least {T} tokens"
            refuse(self, "kv", "does not fit", f"(B, G, S, D) = {(b, G, S, D)}", wanted)
        reach = self.receptive_field().reach
        if kv.first_key and (reach is None or reach + T - 1 > S):
            got = f"the last {S} of {kv.first_key + S} keys for {T} queries"
            wanted = "a layer that reads no further back than the one that keeps them"
            refuse(self, "kv", "have lost some that this layer sees", got, wanted)
        first = kv.first_key + S - T
        where = self._positions(kv.positions, B, T, x.device, first)
        x, bad = quarantine(x)
        q, unturned, x = self._queries(x, where)
        positions = None if where.dim() == 3 else kv.positions
        pages = kv.pages
        k, v = kv.k, kv.v
        if pages is not None and self.selector is not None:
            (k, v), pages = (z.to(q.dtype) for z in pages.gathered()), None
        allowed = self._static(kv.mask)
        p = self._problem(q, k, v, None, None, allowed, kv.first_key, positions=positions)
        out = execute(replace(p, pages=pages, unturned=unturned), self.kernel)
        return spoil(self._finish(out, x), bad, kv.bad, allowed)

    def init_state(self, *_: Any, **__: Any) -> Never:
        raise ValueError(f"{called(self)}: keeps nothing of its own; give forward what step_with_kv of the other gives")

    step = plan = init_state  # type: ignore[assignment]

    def _queries(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, those before rotation where a memory needs them, and the tokens behind them."""
        if self.position is not None and self.position.changes("embed"):
            x = self.position.embed(x, where)
        q = self._gated(self._split(self.q_proj(x), self.num_heads), x, "query")
        none = q.new_zeros(q.shape[0], self.num_kv_heads, *q.shape[2:])  # in place of keys, which are made already
        if self.heads is not None:
            q = self.heads(q, none, none)[0]
        if self.position is None or not self.position.changes("rotate"):
            return q, None, x
        return self.position.turn(q, none, where, where)[0], q if self.memory is not None else None, x

    def _freeze_unread(self, heads: nn.Module) -> None:
        """Parameters for keys and values alone take no gradient, and are none to train."""
        held = [w for w in heads.parameters() if w.requires_grad]
        like = self.q_proj.weight
        if not held or like.is_meta:
            return
        with torch.enable_grad():
            q = torch.ones(1, self.num_heads, 1, self.head_dim, device=like.device, dtype=like.dtype)
            none = q.new_zeros(1, self.num_kv_heads, 1, self.head_dim)
            total = heads(q, none, none)[0].sum()
            read = torch.autograd.grad(total, held, allow_unused=True) if total.requires_grad else [None] * len(held)
        for w, grad in zip(held, read, strict=True):
            w.requires_grad_(grad is not None)

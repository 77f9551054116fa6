"""The pipeline as a layer: projections around `attention`, with every stage a slot.

x - project - position - score - bias - score mix - mask - normalise - weight mix - values - gate - project - y
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import FEATURES
from regard.checks import called, fits, flag, refuse, tokens, whole
from regard.kernels import Plan, Problem, choose, execute
from regard.kernels.check import check_mask, check_options
from regard.kinds import CachePolicy
from regard.masks import Mask, causal, full
from regard.masks.tensors import Kept, Lengths, unpacked
from regard.pairwise import as_mask, as_parts
from regard.pipeline import kept, nearby, streaming
from regard.pipeline.function import selected, spelled_out, unless_softmax
from regard.pipeline.kept import KeptCache
from regard.pipeline.page_pool import PagePool
from regard.pipeline.paged_cache import State
from regard.pipeline.tokens import apart, key_mask, lacks_packed, quarantine, spoil
from regard.shapes import head_shape
from regard.slots import IN_KERNELS, SLOTS, Slots
from regard.stages import Gate, GateSite, HeadMap, Made, Memory, Near, Position, Selector, Stage, Tokens


class Attention(nn.Module):
    """Multi-head attention whose stages are slots; `regard.create` fills them by name.

    Args:
        dim: M, the model width.
        num_heads: H.
        num_kv_heads: G, dividing H; default H. 1 is multi-query attention.
        head_dim: D; default dim / num_heads.
        causal: no query sees a later key.
        scale: default 1 / sqrt(D).
        dropout: of the weights, in training.
        bias: whether the four projections have one.
        context_dim: width of `context` in cross-attention; default dim.
        kernel: as in `attention`.
        device, dtype: of the parameters, those of the parts included.
        mask: a static pattern, combined with the one given to `forward`.
        heads, position, score, score_mix, normalizer, memory, weight_mix, selector, gate: the stages; see
            `regard.stages`. Functions as FlexAttention takes them will do at `mask` and `score_mix`, as in `attention`.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    supports: frozenset[str] = FEATURES
    lacks: Mapping[str, str] = {}
    reads_as_kept: bool = True
    """False where `_problem` makes other keys or values of those kept, which no kernel may then read where they lie."""
    mask: Mask | None
    heads: HeadMap | None
    position: Position | None
    selector: Selector | None
    memory: Memory | None
    gate: Gate | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
        kernel: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **slots: Unpack[Slots],
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim)
        flag("Attention", causal=causal, bias=bias)
        slots = as_parts({**slots, "mask": as_mask(slots.get("mask"), heads=num_heads)})  # type: ignore[assignment]
        check_options(scale, dropout, who="Attention", **slots)
        G, D = shape.num_kv_heads, shape.head_dim
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, G, D
        self.causal, self.scale, self.dropout, self.kernel = causal, scale, dropout, kernel
        context_dim = dim if context_dim is None else context_dim
        whole(type(self).__name__, context_dim=context_dim)
        self.context_dim = context_dim
        make: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * D, **make)
        self.k_proj = nn.Linear(context_dim, G * D, **make)
        self.v_proj = nn.Linear(context_dim, G * D, **make)
        self.o_proj = nn.Linear(num_heads * D, dim, **make)
        for name in SLOTS:
            part: Any = slots.get(name)
            if isinstance(part, nn.Module) and (device is not None or dtype is not None):
                part.to(device=device, dtype=dtype)
            setattr(self, name, part)
        if self._reach() and not causal:
            what = f"is off, and {type(self.heads).__name__} reads the tokens before each"
            refuse("Attention", "causal", what, False, "a layer built with causal=True")

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, causal={self.causal}" + ("" if self.mask is None else f", mask={self.mask!r}")

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions through this layer.

        A key stands for the `reach` tokens before it, too, where `heads` reads earlier tokens (`HeadMap.reach`).
        """
        static = causal() if self.causal else None
        if self.mask is not None:
            static = self.mask if static is None else static & self.mask
        return full() if static is None else static

    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        positions: Int[Tensor, "*b T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """Attend from x to context (default: to x itself).

        Args:
            mask: True = may attend; combined with the layer's own. Pad keys with `regard.masks.padding(keep)`. Where
                `heads` reads earlier tokens, each reads those that this mask lets it see.
            positions: where the tokens of x stand, for absolute and rotary schemes and whatever else counts queries
                (left-padded batches); (T,) or (B, T), default 0, 1, 2, ..., anew in each document of `masks.packed`. A
                position part with several `axes` also takes (B or 1, T, axes), as `regard.positions.grid` gives; the
                other parts then count.
        """
        if context is None and positions is None and self._crosses_borders() and unpacked(mask)[0] is not None:
            keep, packed = key_mask(self, mask, x)
            assert packed is not None
            return apart(self, x, packed, keep)
        p, x, allowed, bad = self._prepare(x, context, mask, positions)
        return spoil(self._finish(execute(p, self.kernel), x), *bad, allowed)

    def plan(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
        state: State | None = None,
        device: str | None = None,
    ) -> Plan:
        """Which kernel `forward` would run for these arguments, and why not the others; meta tensors will do.

        Args:
            state: with it, which kernel `step` would run for these tokens; the state stays as it is.
            device: "cpu" or "cuda", where tensors on meta are taken to be; no such device need be there.
        """
        if state is not None:
            if type(self).step is not Attention.step:
                why = "can't be planned for: this layer steps in its own way"
                refuse(self, "state", why, type(state).__name__, "None")
            if not (context is None and (mask is None or isinstance(mask, Mask))):
                refuse(self, "context, mask", "are not what step takes", "given", "a Mask of regard.masks, no context")
            return choose(streaming.ahead(self, x, state.fork(), mask)[0], self.kernel, device)
        return choose(self._prepare(x, context, mask, None)[0], self.kernel, device)

    @overload
    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        pool: PagePool | None = None,
        policy: None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State: ...

    @overload
    def init_state(self, batch_size: int, capacity: int, *, policy: CachePolicy) -> KeptCache: ...

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        pool: PagePool | None = None,
        policy: CachePolicy | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State | KeptCache:
        """An empty cache for `step`. A layer whose mask looks back only W tokens keeps only those and never fills up.

        Args:
            capacity: most tokens it will hold.
            pool: where its tokens are kept in pages, taken when they are needed (`regard.cache.PagePool`); the state is
                then a `PagedKVCache`, whose forks and beams share what they have in common. Default: memory of its own.
            policy: what is kept of the past, such as `regard.create("snapkv", budget=512)`; the state is then a
                `KeptCache`, which never fills up. Queries see what is kept where it stood.
            device, dtype: default the projection's.
        """
        if policy is not None:
            return kept.init_state(self, batch_size, policy, pool)
        return streaming.init_state(self, batch_size, capacity, pool=pool, device=device, dtype=dtype)

    @overload
    def step(
        self,
        x: Float[Tensor, "B t M"],
        state: State,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], State]: ...

    @overload
    def step(
        self,
        x: Float[Tensor, "B t M"],
        state: KeptCache,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], KeptCache]: ...

    def step(
        self,
        x: Float[Tensor, "B t M"],
        state: State | KeptCache,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*b t"] | None = None,
    ) -> tuple[Float[Tensor, "B t M"], State | KeptCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: over places in the cache, counted from 0, e.g. `padding` of the whole sequence's keys.
            positions: where the new tokens stand, as in `forward`; (t,), (B, t) or coordinates, default behind those
                held, one place a token.
        """
        if isinstance(state, KeptCache):
            return kept.step(self, x, state, mask, positions)
        return streaming.step(self, x, state, mask, positions)

    def _prepare(
        self, x: Tensor, context: Tensor | None, mask: Mask | Tensor | None, positions: Tensor | None
    ) -> tuple[Problem, Tensor, Mask | None, tuple[Tensor | None, Tensor | None]]:
        """The problem for the kernel, the tokens behind its queries, what may be seen, which tokens held NaN or inf."""
        tokens(self, "x", x, self.dim)
        if context is None:
            source = x
        else:
            self._needs("cross", "attends only to its own tokens; call it without context")
            if self._reach():
                what = f"is not taken: {type(self.heads).__name__} reads tokens in their order"
                refuse(self, "context", what, type(context).__name__, "none")
            fits(self, "B S context_dim", {"context_dim": self.context_dim}, context=context)
            source = context
        packed, others = unpacked(mask)
        if packed is not None:
            lacks_packed(self)
            if self._crosses_borders():
                wanted = "x and the mask alone, and of one document where it is looked into"
                refuse(self, "mask", "packs documents, which this layer runs one by one", "masks.packed", wanted)
            packed.fits(self, source.shape[1])
            if context is None and positions is None:
                positions = packed.to(x.device).positions_of(x.shape[1])
        if any(not (isinstance(part, Kept | Lengths) and "padding" in self.supports) for part in others):
            self._needs("mask", "takes no mask")
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        if source.shape[0] != B:
            refuse(self, "context", "has another batch than x", source.shape[0], f"{B} sequences")
        call_mask = check_mask(as_mask(mask, B, self.num_heads), B, self.num_heads, T, S, x.device)
        if call_mask is not None and call_mask == causal() and self.causal:
            call_mask = None
        allowed = self._static(call_mask)
        where = self._positions(positions, B, T, x.device)
        where_keys = where if context is None else torch.arange(S, device=x.device)
        # Relative schemes stand bottom-right, as masks and biases do; what is added to tokens counts each side from 0.
        turn = torch.arange(S - T, S, device=x.device) if context is not None and positions is None else where
        x, bad = quarantine(x)
        source, bad_source = (x, bad) if context is None else quarantine(source)
        near = Near(nearby.sees(call_mask, self._reach(), 0, T, x.device)) if self._reach() else Near()
        q, k, v, x, source, unturned = self._projected(x, source, where, where_keys, turn, near)
        if self._reach():
            bad = bad_source = nearby.spread(bad, near.sees, self._reach())
        told = None
        if where.dim() == 3:  # only the position knows what to do with coordinates
            told, where, positions = where, torch.arange(T, device=x.device), None
        made = self._made(x, source, where, told=told)
        p = self._problem(q, k, v, x, source, allowed, made=made, positions=positions)
        if unturned is not None:
            p = replace(p, unturned=unturned)
        return p, x, allowed, (bad, bad_source)

    def _problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None,
        context: Tensor | None,
        mask: Mask | None,
        first_key: int = 0,
        made: dict[str, Made] | None = None,
        positions: Tensor | None = None,
    ) -> Problem:
        reads = self._reads_tokens()
        filled = {name: getattr(self, name) for name in IN_KERNELS}
        filled["normalizer"] = unless_softmax(filled["normalizer"])
        return Problem(
            q=q,
            k=k,
            v=v,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            mask=mask if self.selector is None else selected(self.selector, q, k, mask, (made or {}).get("selector")),
            dropout=self.dropout if self.training else 0.0,
            x=x if reads else None,
            context=context if reads else None,
            first_key=first_key,
            made=made,
            positions=positions,
            **filled,
        )

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, rotated, and the tokens behind them."""
        q, k, v, x, source = self._placeless(x, source, where, where_keys, Near())
        if self.position is not None and self.position.changes("rotate"):
            q, k = self.position.turn(q, k, turn, where_keys)
        return q, k, v, x, source

    def _projected(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor, near: Near
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The same where a heads part may read earlier tokens, and the queries before rotation where a memory needs
        them."""
        rotates = self.position is not None and self.position.changes("rotate")
        keeps = self.memory is not None and rotates
        if not (keeps or self._reach()):
            return *self._project(x, source, where, where_keys, turn), None
        q, k, v, x, source = self._placeless(x, source, where, where_keys, near)
        unturned = q if keeps else None
        if self.position is not None and rotates:
            q, k = self.position.turn(q, k, turn, where_keys)
        return q, k, v, x, source, unturned

    def _placeless(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, near: Near
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values before rotation, and the tokens behind them."""
        if self.position is not None and self.position.changes("embed"):
            alone = source is x
            x = self.position.embed(x, where)
            source = x if alone else self.position.embed(source, where_keys)
        asking, asked, before = x, source, 0
        if near.before is not None:
            before = near.before.shape[1]
            asking = asked = torch.cat([near.before.to(x.dtype), x], 1)
        q = self._split(self.q_proj(asking), self.num_heads)
        k, v = (self._split(proj(asked), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        q, k, v = self._gated(q, asking, "query"), self._gated(k, asked, "key"), self._gated(v, asked, "value")
        if self.heads is not None:
            q, k, v = self.heads.along(q, k, v, before, near.sees) if self.heads.reach else self.heads(q, k, v)
        return q, k, v, x, source

    def _made(
        self,
        x: Tensor,
        source: Tensor,
        where: Tensor,
        past: dict[str, Tensor] | None = None,
        told: Tensor | None = None,
    ) -> dict[str, Made] | None:
        """What the stages make of the tokens; `past` is what they made of the last one before, `told` coordinates."""
        if not (preparing := self._preparing()):
            return None
        past, given = past or {}, (x, source, where, self.q_proj, self.k_proj, self.v_proj)
        return {name: stage.prepare(Tokens(*given, past.get(name), told)) for name, stage in preparing.items()}

    def _finish(self, out: Float[Tensor, "B H T D"], x: Tensor) -> Tensor:
        out = self._gated(out, x, "output")
        return self._gated(self.o_proj(out.transpose(1, 2).flatten(2)), x, "dense")

    def _gated(self, z: Tensor, x: Tensor, at: GateSite) -> Tensor:
        return z if self.gate is None else self.gate(z, x, at)

    def _split(self, z: Tensor, heads: int) -> Tensor:
        return z.view(*z.shape[:-1], heads, self.head_dim).transpose(1, 2)

    def _static(self, mask: Mask | None) -> Mask | None:
        static = self.receptive_field() if self.causal or self.mask is not None else None
        return mask if static is None else static if mask is None else static & mask

    def _stages(self) -> dict[str, Stage]:
        """The stages that kernels work through, by slot."""
        filled: dict[str, Any] = {name: getattr(self, name) for name in IN_KERNELS}
        return {name: stage for name, stage in filled.items() if stage is not None}

    def _halo(self) -> int:
        return sum(stage.halo for stage in self._stages().values())

    def _reach(self) -> int:
        """How many tokens before each its heads part reads."""
        return 0 if self.heads is None else self.heads.reach

    def _crosses_borders(self) -> bool:
        """Whether a part groups or mixes neighbouring tokens, which packed documents make of others' tokens, or counts
        places from the first token of a row, where a document has its own."""
        placed = self.mask is not None and not self.mask.is_shift_invariant
        placed = placed or any(stage.placed for stage in self._stages().values())
        return placed or self.selector is not None or self._halo() > 0

    def _reads_tokens(self) -> bool:
        return any("tokens" in stage.needs for stage in self._stages().values())

    def _preparing(self) -> dict[str, Stage | Selector]:
        found: dict[str, Stage | Selector] = {name: part for name, part in self._stages().items() if part.prepares()}
        if self.selector is not None and self.selector.prepares():
            found["selector"] = self.selector
        return found

    def _positions(self, positions: Tensor | None, B: int, T: int, device: torch.device, first: int = 0) -> Tensor:
        if positions is None:
            return torch.arange(first, first + T, device=device)
        axes = 1 if self.position is None else self.position.axes
        counts = positions.dtype in (torch.int64, torch.int32)
        if axes > 1 and positions.shape in ((1, T, axes), (B, T, axes)) and (counts or positions.is_floating_point()):
            return positions
        if not counts or positions.shape not in ((T,), (B, T)):
            got = f"{positions.dtype} {tuple(positions.shape)}"
            words = "" if axes == 1 else f", or coordinates of shape (1 or {B}, {T}, {axes})"
            refuse(self, "positions", "don't fit x", got, f"integers of shape ({T},) or ({B}, {T}){words}")
        return positions

    def _needs(self, feature: str, what: str) -> None:
        if feature not in self.supports:
            raise ValueError(f"{called(self)}: this mechanism {what} (no {feature!r} on its card)")


spelled_out(Attention.__init__, Slots)

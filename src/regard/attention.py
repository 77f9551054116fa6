"""The pipeline: `attention`, a function of queries, keys and values, and `Attention`, the layer around it.

    x - project - position - score - bias - score mix - mask - normalise - weight mix - values - gate - project - y

Each stage is a slot. With every slot empty this is scaled dot-product attention (Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762, eq. 1 and section 3.2.2):  softmax(q k^T / sqrt(D)) v.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cache import KVCache
from regard.card import FEATURES
from regard.kernels import Plan, Problem, choose, execute
from regard.kernels.check import check_bias, check_inputs, check_mask, check_options
from regard.kinds import Gate, GateSite, HeadMap, Mix, Normalizer, Position, Selector
from regard.layer import check_tokens, head_counts, quarantine, spoil
from regard.masks import Mask, causal, full
from regard.masks.tensors import Kept, Lengths


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    position: Position | None = None,
    score_mix: Mix | None = None,
    normalizer: Normalizer | None = None,
    weight_mix: Mix | None = None,
    selector: Selector | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Float[Tensor, "B H T V"]:
    """Exact attention with any of the pipeline's stages.

    Query head h reads key head h // (H // G). The last query stands where the last key stands, so with T < S a causal
    mask is aligned bottom-right. A query that may attend to nothing gives 0 (and zero gradients).

    Args:
        mask: True = may attend. A `regard.masks.Mask` keeps its structure, so sparse kernels can use it.
        bias: added to the scaled scores; -inf masks.
        position: rotates q and k, and adds to scores and values, as its hooks say. (`embed` is for tokens, not here.)
        score_mix, normalizer, weight_mix: stages before, at and after the softmax.
        selector: looks at q and k (after rotation) and says which pairs to keep of those the mask allows.
        scale: multiplies q . k before any bias; default 1 / sqrt(D).
        dropout: probability with which weights are dropped; applied whenever > 0, as torch does.
        kernel: "auto" lets `plan` choose; a name runs that kernel or raises.

    Raises:
        ValueError, TypeError: inputs that don't fit together, before any work is done.
    """
    p = _problem(q, k, v, mask, bias, position, score_mix, normalizer, weight_mix, selector, scale, dropout)
    return execute(p, kernel)


def plan(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    position: Position | None = None,
    score_mix: Mix | None = None,
    normalizer: Normalizer | None = None,
    weight_mix: Mix | None = None,
    selector: Selector | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Plan:
    """Which kernel `attention` would run for these arguments, and why not the others. Runs nothing.

    Tensors on the meta device will do: only shapes, dtypes and the mask count.
    """
    p = _problem(q, k, v, mask, bias, position, score_mix, normalizer, weight_mix, selector, scale, dropout)
    return choose(p, kernel)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor | None,
    bias: Tensor | None,
    position: Position | None,
    score_mix: Mix | None,
    normalizer: Normalizer | None,
    weight_mix: Mix | None,
    selector: Selector | None,
    scale: float | None,
    dropout: float,
) -> Problem:
    check_inputs(q, k, v)
    check_options(
        scale,
        dropout,
        position=position,
        score_mix=score_mix,
        normalizer=normalizer,
        weight_mix=weight_mix,
        selector=selector,
    )
    for name, stage in (("score_mix", score_mix), ("weight_mix", weight_mix)):
        if stage is not None and "tokens" in stage.needs:
            raise ValueError(
                f"attention: {name} {type(stage).__name__} reads the tokens behind q and k; use it in regard.Attention"
            )
    B, H, T, D = q.shape
    p = Problem(
        q=q,
        k=k,
        v=v,
        scale=D**-0.5 if scale is None else scale,
        mask=check_mask(mask, B, H, T, k.shape[2], q.device),
        bias=bias,
        position=position,
        score_mix=score_mix,
        normalizer=_normalizer(normalizer),
        weight_mix=weight_mix,
        dropout=dropout,
    )
    if bias is not None:
        p = check_bias(p)
    if position is not None and position.changes("rotate"):
        p = replace(p, q=position.rotate(q, p.i), k=position.rotate(k, p.j))
    return p if selector is None else replace(p, mask=_selected(selector, p.q, p.k, p.mask))


def _selected(selector: Selector, q: Tensor, k: Tensor, mask: Mask | None) -> Mask | None:
    """The pairs that the selector keeps, of those the mask allows. Without data (meta tensors), all of these."""
    if q.is_meta:
        return mask
    with torch.no_grad():
        kept = selector(q.detach(), k.detach(), mask)
    if not isinstance(kept, Mask):
        raise TypeError(f"attention: selector {type(selector).__name__} must return a Mask, got {type(kept).__name__}")
    return kept if mask is None else mask & kept


def _normalizer(normalizer: Normalizer | None) -> Normalizer | None:
    """None for softmax, so that every kernel knows it."""
    return None if normalizer is None or normalizer.is_softmax else normalizer


class Attention(nn.Module):
    """Multi-head attention whose stages are slots. See DESIGN for the order; `regard.create` fills them by name.

    Args:
        dim: M, the model width.
        num_heads: H.
        num_kv_heads: G, dividing H; default H. 1 is multi-query attention.
        head_dim: D; default dim / num_heads.
        causal: no query sees a later key.
        mask: a static pattern, combined with the one given to `forward`.
        position, heads, score_mix, normalizer, weight_mix, selector, gate: the stages; see `regard.kinds`.
        scale: default 1 / sqrt(D).
        dropout: of the weights, in training.
        bias: whether the four projections have one.
        context_dim: width of `context` in cross-attention; default dim.
        kernel: as in `attention`.

    Shapes: x (B, T, M), context (B, S, context_dim) -> (B, T, M).
    """

    supports: frozenset[str] = FEATURES

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        mask: Mask | None = None,
        position: Position | None = None,
        heads: HeadMap | None = None,
        score_mix: Mix | None = None,
        normalizer: Normalizer | None = None,
        weight_mix: Mix | None = None,
        selector: Selector | None = None,
        gate: Gate | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = False,
        context_dim: int | None = None,
        kernel: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        G, D = head_counts(dim, num_heads, num_kv_heads, head_dim)
        check_options(
            scale,
            dropout,
            position=position,
            score_mix=score_mix,
            normalizer=normalizer,
            weight_mix=weight_mix,
            selector=selector,
        )
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"Attention: mask must be a regard.masks.Mask, got {type(mask).__name__}")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim = dim, num_heads, G, D
        self.causal, self.mask, self.scale, self.dropout, self.kernel = causal, mask, scale, dropout, kernel
        context_dim = dim if context_dim is None else context_dim
        make: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * D, **make)
        self.k_proj = nn.Linear(context_dim, G * D, **make)
        self.v_proj = nn.Linear(context_dim, G * D, **make)
        self.o_proj = nn.Linear(num_heads * D, dim, **make)
        self.position, self.heads, self.gate = position, heads, gate
        self.score_mix, self.normalizer, self.weight_mix, self.selector = score_mix, normalizer, weight_mix, selector
        for part in (position, heads, gate, score_mix, normalizer, weight_mix, selector):
            if part is not None and (device is not None or dtype is not None):
                part.to(device=device, dtype=dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, {self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, causal={self.causal}" + ("" if self.mask is None else f", mask={self.mask!r}")

    def receptive_field(self) -> Mask:
        """Which key positions may reach which query positions through this layer."""
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
            mask: True = may attend; combined with the layer's own. Pad keys with `regard.masks.padding(keep)`.
            positions: where the tokens of x stand, for absolute and rotary schemes (left-padded or packed batches);
                (T,) or (B, T), default 0, 1, 2, ...
        """
        p, x, allowed, bad = self._prepare(x, context, mask, positions)
        return spoil(self._finish(execute(p, self.kernel), x), *bad, allowed)

    def plan(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "#B #H T S"] | None = None,
    ) -> Plan:
        """Which kernel `forward` would run for these arguments, and why not the others; meta tensors will do."""
        return choose(self._prepare(x, context, mask, None)[0], self.kernel)

    def _prepare(
        self, x: Tensor, context: Tensor | None, mask: Mask | Tensor | None, positions: Tensor | None
    ) -> tuple[Problem, Tensor, Mask | None, tuple[Tensor | None, Tensor | None]]:
        """The problem for the kernel, the tokens behind its queries, what may be seen, which tokens held NaN or inf."""
        check_tokens(self._who, "x", x, self.dim)
        if context is None:
            source = x
        else:
            self._needs("cross", "attends only to its own tokens; call it without context")
            check_tokens(self._who, "context", context, self.k_proj.in_features)
            source = context
        if mask is not None:
            plain_padding = isinstance(mask, Kept | Lengths) and "padding" in self.supports
            if not plain_padding:
                self._needs("mask", "takes no mask")
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        if source.shape[0] != B:
            raise ValueError(f"Attention: x has batch {B} and context {source.shape[0]}; they must match")
        call_mask = check_mask(mask, B, self.num_heads, T, S, x.device)
        if call_mask is not None and call_mask == causal() and self.causal:
            call_mask = None
        allowed = self._static(call_mask)
        where = self._positions(positions, B, T, x.device)
        where_keys = where if context is None else torch.arange(S, device=x.device)
        # Relative schemes stand bottom-right, as masks and biases do; what is added to tokens counts each side from 0.
        turn = torch.arange(S - T, S, device=x.device) if context is not None and positions is None else where
        x, bad = quarantine(x)
        source, bad_source = (x, bad) if context is None else quarantine(source)
        q, k, v, x, source = self._project(x, source, where, where_keys, turn)
        return self._problem(q, k, v, x, source, allowed), x, allowed, (bad, bad_source)

    def init_state(
        self,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for `step`. A layer whose mask looks back only W tokens keeps only those and never fills up.

        Args:
            capacity: most tokens it will hold.
            device, dtype: default the projection's.
        """
        self._needs("streaming", "has no streaming form")
        if not self.causal:
            raise ValueError("Attention: streaming needs causal=True, this layer sees later tokens; rebuild it causal")
        if self.position is not None and not self.position.streams:
            raise ValueError(
                f"Attention: {self.position} changes with the whole length, so cached keys go stale; it can't stream"
            )
        if self.selector is not None and not self.selector.streams:
            raise ValueError(f"Attention: {self.selector} chooses for whole blocks of queries at once; it can't stream")
        for name, n, least in (("batch_size", batch_size, 0), ("capacity", capacity, 1)):
            if isinstance(n, bool) or not isinstance(n, int) or n < least:
                raise ValueError(f"init_state: {name} must be an int >= {least}, got {n!r}")
        G, D, halo = self.num_kv_heads, self.head_dim, self._halo()
        reach = self.receptive_field().reach if self.selector is None else None
        window = None if reach is None else max(1, reach - 1 + halo)
        n = capacity if window is None else 0
        weight = self.k_proj.weight
        at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        buffers = {name: torch.zeros(batch_size, G, n, D, **at) for name in "kv"}  # type: ignore[arg-type]
        if self._reads_tokens():
            buffers["x"] = torch.zeros(batch_size, n, self.dim, **at)
        if halo:
            buffers["q"] = torch.zeros(batch_size, self.num_heads, n, D, **at)
        return KVCache(buffers, window=window)

    def step(
        self, x: Float[Tensor, "B t M"], state: KVCache, *, mask: Mask | None = None
    ) -> tuple[Float[Tensor, "B t M"], KVCache]:
        """The next t tokens: what `forward` would give at these positions, and the state with them in it.

        Args:
            mask: over absolute positions, e.g. `padding` of the whole sequence's keys.
        """
        self._needs("streaming", "has no streaming form")
        if not self.causal:
            raise ValueError("Attention: streaming needs causal=True, this layer sees later tokens; rebuild it causal")
        check_tokens(self._who, "x", x, self.dim)
        if not isinstance(state, KVCache):
            raise TypeError(f"step: state must be the KVCache of init_state, got {type(state).__name__}")
        if mask is not None and not isinstance(mask, Mask):
            raise TypeError(f"step: mask must be a regard.masks.Mask, got {type(mask).__name__}")
        t = x.shape[1]
        where = torch.arange(state.length, state.length + t, device=x.device)
        q, k, v, x, _ = self._project(x, x, where, where, where)
        new = {"k": k, "v": v}
        if "x" in state.buffers:
            new["x"] = x
        if "q" in state.buffers:
            new["q"] = q
        held, state = state.append(**new)
        first_key = state.length - held["k"].shape[-2]
        halo = min(self._halo(), held["k"].shape[-2] - t)
        if halo:
            q = held["q"][:, :, -(halo + t) :]
        tokens = held.get("x")
        p = self._problem(
            q,
            held["k"],
            held["v"],
            None if tokens is None else tokens[:, -q.shape[2] :],
            tokens,
            self._static(mask),
            first_key,
        )
        out = execute(p, self.kernel)
        return self._finish(out[:, :, halo:] if halo else out, x), state

    def _problem(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None,
        context: Tensor | None,
        mask: Mask | None,
        first_key: int = 0,
    ) -> Problem:
        tokens = self._reads_tokens()
        return Problem(
            q=q,
            k=k,
            v=v,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            mask=mask if self.selector is None else _selected(self.selector, q, k, mask),
            position=self.position,
            score_mix=self.score_mix,
            normalizer=_normalizer(self.normalizer),
            weight_mix=self.weight_mix,
            dropout=self.dropout if self.training else 0.0,
            x=x if tokens else None,
            context=context if tokens else None,
            first_key=first_key,
        )

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, rotated, and the tokens behind them."""
        if self.position is not None and self.position.changes("embed"):
            alone = source is x
            x = self.position.embed(x, where)
            source = x if alone else self.position.embed(source, where_keys)
        q = self._split(self.q_proj(x), self.num_heads)
        k, v = (self._split(proj(source), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        q, k, v = self._gated(q, x, "query"), self._gated(k, source, "key"), self._gated(v, source, "value")
        if self.heads is not None:
            q, k, v = self.heads(q, k, v)
        if self.position is not None and self.position.changes("rotate"):
            q, k = self.position.rotate(q, turn), self.position.rotate(k, where_keys)
        return q, k, v, x, source

    def _finish(self, out: Float[Tensor, "B H T D"], x: Tensor) -> Tensor:
        out = self._gated(out, x, "output")
        return self._gated(self.o_proj(out.transpose(1, 2).flatten(2)), x, "dense")

    def _gated(self, z: Tensor, x: Tensor, at: GateSite) -> Tensor:
        return z if self.gate is None else self.gate(z, x, at)

    def _split(self, z: Tensor, heads: int) -> Tensor:
        return z.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def _static(self, mask: Mask | None) -> Mask | None:
        static = self.receptive_field() if self.causal or self.mask is not None else None
        return mask if static is None else static if mask is None else static & mask

    def _mixes(self) -> list[Mix]:
        return [m for m in (self.score_mix, self.weight_mix) if m is not None]

    def _halo(self) -> int:
        return sum(m.halo for m in self._mixes())

    def _reads_tokens(self) -> bool:
        return any("tokens" in m.needs for m in self._mixes())

    def _positions(self, positions: Tensor | None, B: int, T: int, device: torch.device) -> Tensor:
        if positions is None:
            return torch.arange(T, device=device)
        if positions.dtype not in (torch.int64, torch.int32) or positions.shape not in ((T,), (B, T)):
            raise ValueError(
                f"Attention: positions must be integers of shape ({T},) or ({B}, {T}), got {positions.dtype} "
                f"{tuple(positions.shape)}"
            )
        return positions

    def _needs(self, feature: str, what: str) -> None:
        if feature not in self.supports:
            raise ValueError(f"{self._who}: this mechanism {what} (no {feature!r} on its card)")

    @property
    def _who(self) -> str:
        return str(getattr(self, "name", "Attention"))

"""Token by token: the state of an `Attention` layer, and what it does with the next tokens."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.checks import called, refuse, tokens, whole
from regard.kernels import Problem, execute
from regard.kernels.check import check_mask
from regard.masks import Mask, padding
from regard.pipeline import nearby, quick_step
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.page_pool import PagePool
from regard.pipeline.paged_cache import PagedKVCache, State
from regard.pipeline.tokens import quarantine
from regard.stages import Made, Near, Tokens
from regard.tracing import autocasts

if TYPE_CHECKING:
    from regard.pipeline.layer import Attention

MADE = "made."
"""What a stage makes of every key stands in the cache under its slot's name behind this."""
ASKED = "asked."
"""What it makes of every query, likewise, where a mix needs earlier rows again."""
WHERE = "where"
"""Where queries stand, likewise."""


def check_streams(layer: "Attention") -> None:
    """Refuse a layer that can't go token by token."""
    layer._needs("streaming", "has no streaming form")
    if not layer.causal:
        refuse(layer, "causal", "is off, and this layer sees later tokens", False, "a layer built with causal=True")
    for part in (layer.position, layer.selector):
        if part is not None and not part.streams:
            why = "reads the whole length, so cached keys go stale"
            raise ValueError(f"{called(layer)}: {type(part).__name__} {why}; it can't stream")


def init_state(
    layer: "Attention",
    batch_size: int,
    capacity: int,
    *,
    pool: PagePool | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> State:
    """See `Attention.init_state`."""
    check_streams(layer)
    whole("init_state", 0, batch_size=batch_size)
    whole("init_state", capacity=capacity)
    if not (pool is None or isinstance(pool, PagePool)):
        refuse("init_state", "pool", "has the wrong type", type(pool).__name__, "a PagePool", error=TypeError)
    G, D, halo = layer.num_kv_heads, layer.head_dim, layer._halo()
    reach = layer.receptive_field().reach if layer.selector is None else None
    window = None if reach is None else max(1, reach - 1 + halo, layer._reach())
    n = capacity if window is None and pool is None else 0
    weight = layer.q_proj.weight
    at: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
    buffers = {name: torch.zeros(batch_size, G, n, D, **at) for name in "kv"}
    if layer._reads_tokens() or layer._reach():
        buffers["x"] = torch.zeros(batch_size, n, layer.dim, **at)
    if halo:
        buffers["q"] = torch.zeros(batch_size, layer.num_heads, n, D, **at)
        buffers[WHERE] = torch.zeros(batch_size, n, 1, dtype=torch.long, device=at["device"])
    none = torch.zeros(batch_size, 0, layer.dim, device=at["device"], dtype=weight.dtype)  # whatever the cache's is
    here = torch.zeros(0, dtype=torch.long, device=none.device)
    for name, stage in layer._preparing().items():
        made = stage.prepare(Tokens(none, none, here, layer.q_proj, layer.k_proj, layer.v_proj))
        for prefix, value in ((MADE, made.key), (ASKED, made.query if halo else None)):
            if value is not None:
                buffers[prefix + name] = value.new_zeros(batch_size, value.shape[1], n, value.shape[3])
    if pool is not None:
        return PagedKVCache.empty(pool, batch_size, capacity, window, buffers)
    return KVCache(buffers, window=window)


def step(
    layer: "Attention", x: Tensor, state: State, mask: Mask | None, positions: Tensor | None = None
) -> tuple[Tensor, State]:
    """See `Attention.step`."""
    if mask is None and positions is None and (done := quick_step.step(layer, x, state)) is not None:
        return done
    p, x, halo, state = ahead(layer, x, state, mask, positions)
    out = execute(p, layer.kernel)
    return layer._finish(out[:, :, halo:] if halo else out, x), state


def ahead(
    layer: "Attention", x: Tensor, state: State, mask: Mask | None, positions: Tensor | None = None
) -> tuple[Problem, Tensor, int, State]:
    """What the step's kernel is given, the tokens, how many rows of the past are computed again, and the next state."""
    check_streams(layer)
    tokens(layer, "x", x, layer.dim)
    if not isinstance(state, KVCache | PagedKVCache):
        refuse(
            "step", "state", "has the wrong type", type(state).__name__, "the KVCache of init_state", error=TypeError
        )
    if not (mask is None or isinstance(mask, Mask)):
        refuse("step", "mask", "has the wrong type", type(mask).__name__, "a Mask of regard.masks", error=TypeError)
    (B, t), where_from = x.shape[:2], state.length
    check_mask(mask, B, layer.num_heads, t, where_from + t, x.device)  # now, for the cache will have been written to
    if isinstance(state, PagedKVCache) and state.ragged:
        mask, positions = _of_unequal_lengths(layer, state, x, mask, positions)
    where = layer._positions(positions, B, t, x.device, where_from)
    clean, bad = quarantine(x) if layer._preparing() else (x, None)
    near = Near()
    if layer._reach():
        reach = layer._reach()
        near = Near(nearby.sees(mask, reach, where_from, t, x.device), nearby.before(state, reach, x))
    q, k, v, x, _, unturned = layer._projected(x, x, where, where, where, near)
    # What stages carry on from token to token must not carry on the NaN of a hidden one; keys show it who may see it.
    seen = x if bad is None else layer._project(clean, clean, where, where, where)[3]
    told = None
    if where.dim() == 3:  # only the position knows what to do with coordinates
        told, where, positions = where, torch.arange(where_from, where_from + t, device=x.device), None
    new = {"k": k, "v": v}
    if "x" in state.buffers or layer._reach():
        new["x"] = x
    if "q" in state.buffers:
        new["q"] = q
        new[WHERE] = where.long().expand(len(x), t)[..., None]
    made = layer._made(seen, seen, where, _last(state), told) or {}
    new |= {MADE + name: value.key for name, value in made.items() if value.key is not None}
    if layer._halo():
        new |= {ASKED + name: value.query for name, value in made.items() if value.query is not None}
    if autocasts(x.device):  # the cache keeps the dtype it was made with
        new = {name: z.to(state.buffers[name].dtype) for name, z in new.items() if name in state.buffers}
    S, pages = state.kept + t, None
    in_place = layer.reads_as_kept and layer.selector is None
    if isinstance(state, PagedKVCache) and t == 1 and new.keys() == {"k", "v"} and in_place:
        state = state.write(**new)
        pages = state.pages(S)
        held = dict(zip("kv", pages.stand_ins(), strict=True))
    else:
        held, state = state.append(**new)
    held = {name: z.to(q.dtype) if name in "qkv" else z for name, z in held.items()}
    first_key, halo = state.length - S, min(layer._halo(), S - t)
    if halo:
        q = held["q"][:, :, -(halo + t) :]
        positions = held[WHERE][:, -(halo + t) :, 0]
    for name, value in made.items():
        query = value.query
        if halo and query is not None:
            query = held[ASKED + name][:, :, -(halo + t) :]
        made[name] = Made(query, held.get(MADE + name), value.whole)
    past = held.get("x")
    behind = None if past is None else past[:, -q.shape[2] :]
    p = layer._problem(q, held["k"], held["v"], behind, past, layer._static(mask), first_key, made, positions)
    if unturned is not None:
        p = replace(p, unturned=unturned)
    return (p if pages is None else replace(p, pages=pages)), x, halo, state


def _of_unequal_lengths(
    layer: "Attention", state: PagedKVCache, x: Tensor, mask: Mask | None, positions: Tensor | None
) -> tuple[Mask, Tensor]:
    """Nobody sees the places before shorter sequences, whose tokens stand where they would alone."""
    layer._needs("padding", "takes no sequences of different lengths")
    placed = None if layer.mask is None or layer.mask.is_shift_invariant else repr(layer.mask)
    for name, got in (("selector", layer.selector and type(layer.selector).__name__), ("mask", placed)):
        if got is not None:
            refuse(layer, name, "counts places in the batch, not in each sequence", got, "states of one length")
    B, t = x.shape[:2]
    if state.batch_size != B:
        refuse("step", "x", "has another batch than the state", B, f"{state.batch_size} sequences")
    pads = torch.tensor(state.pads, device=x.device)[:, None]
    kept = padding(torch.arange(state.length + t, device=x.device) >= pads)
    if positions is None:
        positions = torch.arange(state.length, state.length + t, device=x.device) - pads
    return kept if mask is None else mask & kept, positions


def _last(state: State) -> dict[str, Tensor]:
    """What each stage made of the last token seen."""
    made = [name for name in state.buffers if name.startswith(MADE)] if state.length else []
    if isinstance(state, PagedKVCache):
        return {name.removeprefix(MADE): state.read(name, 1) for name in made}
    end = state.length if state.window is None else state.kept
    return {name.removeprefix(MADE): state.buffers[name][..., end - 1 : end, :] for name in made}

"""One token through a layer of plain parts: what `streaming.step` does, with its questions asked once.

Around the projections and the kernel a step has some hundred small questions to ask, which take as long as both.
"""

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled

from regard.kernels import execute, few
from regard.masks import Mask, causal
from regard.pipeline.kv_cache import KVCache
from regard.pipeline.paged_cache import State
from regard.stages import Position

if TYPE_CHECKING:
    from regard.pipeline.layer import Attention


_NOWHERE = torch.empty(0, dtype=torch.long, device="cpu")


def step(layer: "Attention", x: Tensor, state: State) -> tuple[Tensor, KVCache] | None:
    """The next token of each sequence, and the state with it; None where the long way must be gone."""
    if torch.compiler.is_compiling() or is_grad_enabled() or type(x) is not Tensor or type(state) is not KVCache:
        return None
    if not x.is_cpu or is_autocast_enabled("cpu") or x.layout is not torch.strided or x.is_nested:
        return None
    if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != layer.dim or x.dtype is not layer.q_proj.weight.dtype:
        return None
    if state.buffers.keys() != {"k", "v"} or not plain(layer):
        return None
    position, reach = layer.position, None if layer.mask is None else _reach(layer.mask)
    where = torch.tensor([state.length], device="cpu") if position is not None else _NOWHERE
    embeds = position is not None and position.changes("embed")
    if layer.heads is layer.gate is None and not embeds and _projects_as_usual(type(layer)):  # type: ignore[arg-type]
        flat = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        if (done := _joined(layer, flat, state, reach)) is not None:
            return done
        q, k, v = (layer._split(z, n) for z, n in zip(flat, (layer.num_heads, *2 * (layer.num_kv_heads,)), strict=True))
        if position is not None and position.changes("rotate"):
            q, k = position.turn(q, k, where, where)
    else:
        q, k, v, x, _ = layer._project(x, x, where, where, where)
    held, state = state.append(k=k, v=v)
    k, v = held["k"], held["v"]
    if reach is not None and reach < k.shape[2]:
        k, v = k[:, :, -reach:], v[:, :, -reach:]
    position = position if position is not None and position.changes("bias") else None
    out = few.quick(q, k, v, causal=True, scale=layer.scale, position=position)
    if out is None:
        first_key = state.length - held["k"].shape[2]
        p = layer._problem(q, held["k"], held["v"], None, None, layer._static(None), first_key, positions=None)
        out = execute(p, layer.kernel)
    return layer._finish(out, x), state


def _joined(
    layer: "Attention", flat: tuple[Tensor, Tensor, Tensor], state: KVCache, reach: int | None
) -> tuple[Tensor, KVCache] | None:
    """The same where all that lies between the projections is one call; None where it isn't, and nothing is written."""
    position, turn, (q, k, v) = layer.position, None, flat
    if position is not None and position.changes("rotate"):
        turn = position.sines(state.length) if q.dtype is torch.float32 else None
        if turn is None:
            return None
    held = state.buffers["k"], state.buffers["v"]
    if not few.joins(q, k, v, *held) or q.shape[2] != layer.num_heads * layer.head_dim:
        return None
    if (found := state.ahead(1)) is None:
        return None
    out, odd = few.joined(
        *(q, k, v, found[0]["k"], found[0]["v"]),
        reach=state.length + 1 if reach is None else reach,
        scale=layer.head_dim**-0.5 if layer.scale is None else layer.scale,
        turn=turn,
        position=position if position is not None and position.changes("bias") else None,
    )
    if odd:
        state.written[0] -= 1  # who goes the long way writes there again
        return None
    return layer.o_proj(out), found[1]


@cache
def _projects_as_usual(kind: Any) -> bool:
    """Whether layers of this class make queries, keys and values of tokens, and tokens of outputs, as all do."""
    from regard.pipeline.layer import Attention

    return all(getattr(kind, name) is getattr(Attention, name) for name in ("_project", "_placeless", "_finish"))


@lru_cache(maxsize=64)
def _reach(mask: Mask) -> int | None:
    """How many keys a query sees of a mask by distance alone, under causality."""
    return (causal() & mask).reach


def plain(layer: "Attention") -> bool:
    """Whether a step is projections, positions by distance or rotation, and softmax over all keys of its reach."""
    position: Position | None = layer.position
    return (
        layer.causal
        and layer.reads_as_kept
        and layer.kernel == "auto"
        and "streaming" in layer.supports
        and (layer.heads is None or not layer.heads.reach)
        and not (layer.dropout and layer.training)
        and layer.score is layer.score_mix is layer.weight_mix is layer.selector is layer.memory is None
        and (layer.normalizer is None or layer.normalizer.is_softmax)
        and (layer.mask is None or few.banded(layer.mask))
        and (position is None or _plain_position(position))
    )


def _plain_position(position: Position) -> bool:
    if not position.streams or position.needs or position.prepares() or position.changes("values"):
        return False
    return position.by_distance or not position.changes("bias")

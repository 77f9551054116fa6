"""A step whose past is what a cache policy keeps of it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import called, refuse, tokens, whole
from regard.kernels import execute
from regard.kinds import CachePolicy, Kept, Turn
from regard.masks import Mask, causal, dense
from regard.masks.tensors import Kept as Padding
from regard.masks.tensors import Lengths
from regard.pipeline import streaming
from regard.pipeline.kv_cache import check_rows

if TYPE_CHECKING:
    from regard.pipeline.layer import Attention


@dataclass(frozen=True, eq=False)
class KeptCache:
    """What a policy holds for one layer: a value, as a `KVCache` is."""

    policy: CachePolicy
    held: Any
    """The policy's own state."""
    batch_size: int
    length: int = 0
    """Tokens seen so far."""

    def reorder(self, index: Int[Tensor, " B2"]) -> "KeptCache":
        """The cache of batch rows `index` (beam search)."""
        check_rows(self, index)
        return replace(self, held=self.policy.reorder(self.held, index), batch_size=len(index))

    def fork(self) -> "KeptCache":
        """The same: what one is stepped to, the other doesn't see."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return int(self.held.nbytes)


def init_state(layer: "Attention", batch_size: int, policy: CachePolicy, pool: object = None) -> KeptCache:
    """See `Attention.init_state`."""
    streaming.check_streams(layer)
    whole("init_state", 0, batch_size=batch_size)
    if not isinstance(policy, CachePolicy):
        wanted = "a cache policy, such as regard.create('snapkv', budget=512)"
        refuse("init_state", "policy", "has the wrong type", type(policy).__name__, wanted, error=TypeError)
    if pool is not None:
        refuse("init_state", "pool", "is given beside a policy, which stores keys itself", "both", "one of them")
    position = layer.position
    placed = position is not None and (position.changes("bias") or position.changes("values") or position.prepares())
    filled = {
        "position": placed,
        "mask": layer.mask is not None,
        "selector": layer.selector is not None,
        "heads": bool(layer._reach()),
        "stages": bool(layer._halo() or layer._reads_tokens() or layer._preparing()) or not layer.reads_as_kept,
    }
    if found := [name for name, asks in filled.items() if asks]:
        got = f"{', '.join(found)} of {called(layer)}"
        refuse("init_state", "policy", "drops keys that the layer counts on", got, "a layer without such parts")
    return KeptCache(policy, policy.init_state(batch_size, layer.num_kv_heads, layer.head_dim), batch_size)


def step(
    layer: "Attention", x: Tensor, state: KeptCache, mask: Mask | None, positions: Tensor | None
) -> tuple[Tensor, KeptCache]:
    """See `Attention.step`."""
    tokens(layer, "x", x, layer.dim)
    B, t = x.shape[:2]
    if state.batch_size != B:
        refuse("step", "x", "has another batch than the state", B, f"{state.batch_size} sequences")
    here = torch.arange(state.length, state.length + t, device=x.device)
    keep = None
    if mask is not None:
        if not isinstance(mask, Padding | Lengths):
            refuse("step", "mask", "is none that a policy knows", mask, "padding, as regard.masks.padding says it")
        keep = mask.at(here, here).diagonal(dim1=-2, dim2=-1)[:, 0].expand(B, t)
    where = layer._positions(positions, B, t, x.device, state.length)
    q, k, v, x, _ = layer._project(x, x, where, where, where)
    scale = layer.head_dim**-0.5 if layer.scale is None else layer.scale
    kept, held = state.policy.update(state.held, k, v, q, keep=keep, scale=scale, turn=turn_of(layer))
    allowed = may_see(kept, layer.num_heads, t)
    p = layer._problem(q, kept.k, kept.v, None, None, allowed, positions=positions)
    if kept.bias is not None:
        p = replace(p, bias=kept.bias.repeat_interleave(layer.num_heads // kept.bias.shape[1], 1)[:, :, None])
    out = layer._finish(execute(p, layer.kernel), x)
    return out, replace(state, held=held, length=state.length + t)


def may_see(kept: Kept, heads: int, t: int) -> Mask | None:
    """What the last t tokens may see of what is kept for them: all before, and among them causally."""
    allowed = causal() if t > 1 else None
    if kept.full:
        return allowed
    real = (kept.positions >= 0).repeat_interleave(heads // kept.positions.shape[1], 1)
    there = dense(real[:, :, None].expand(-1, -1, t, -1))
    return there if allowed is None else allowed & there


def turn_of(layer: "Attention") -> Turn | None:
    """How the layer's position turns heads; None where it doesn't."""
    position = layer.position
    if position is None or not position.changes("rotate"):
        return None

    def turn(z: Tensor, at: Tensor, /) -> Tensor:
        return position.rotate(z, at)

    return turn

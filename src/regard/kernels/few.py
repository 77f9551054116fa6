"""One query a head, or a few, against a long cache, in C++: keys and values are read once, as they lie.

Grouped keys serve all their query heads at once, bf16 is widened in registers, and sums are in fp32. Nothing is copied,
and nothing formed but what masks and biases ask for, over the keys that the mask's bounds leave. There is no backward.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from regard import tracing
from regard.kernels.cost import Cost, asked, products
from regard.kernels.finite import honest
from regard.kernels.native import build
from regard.kernels.native.decode import NOTHING, NUMBERS, decode, launch, step
from regard.kernels.problem import CAUSAL, Problem, beyond_softmax, key_range, nothing
from regard.masks import Mask
from regard.masks.algebra import And
from regard.masks.patterns import Diagonals
from regard.stages import Position, Rows

MOST = 16
"""Queries. Kernels for more of them do their products in larger tiles."""
TINY = 2**16
"""Queries times keys times widths up to which nobody can make good what launching more than one kernel costs."""


def why_not(p: Problem) -> list[str]:
    """Few queries on a CPU, in fp32 or bf16: softmax with additive terms that need no q or k, and no gradients."""
    reasons = []
    T, D, V = p.q.shape[2], p.q.shape[3], p.v.shape[3]
    if T > MOST:
        reasons.append(f"{T} queries, more than {MOST}")
    if p.q.dtype not in NUMBERS:
        reasons.append(f"{p.q.dtype}: it is for fp32 and bf16")
    if p.device_kind not in ("cpu", "meta"):
        reasons.append(f"tensors on {p.device_kind}, not on the CPU")
    if not (p.q.is_meta or (build.readable(p.q) and build.readable(p.k) and build.readable(p.v))):
        reasons.append("it reads memory: no tensor subclasses, no torch.func, no torch.compile")
    if p.dropout:
        reasons.append("dropout")
    if p.stages or p.bias is not None:
        reasons += beyond_softmax(p)
        if p.position_bias is not None and not p.position_bias.by_distance:
            reasons.append(f"the bias of position {type(p.position).__name__} is no function of distance alone")
    if torch.is_grad_enabled() and _learns(p):
        reasons.append("it has no backward, and gradients are wanted")
    if reasons or (reasons := build.why_not()):
        return reasons
    width = step()
    return [f"widths {D} and {V} are no multiples of {width}"] if D % width or V % width else []


def cost(p: Problem) -> Cost:
    """Keys and values of the reach are read once; masks are asked about every key."""
    B, H, G, T, _ = p.shape
    D, V, S = p.q.shape[3], p.v.shape[3], len(range(*key_range(p, slice(0, T)).indices(p.k.shape[2])))
    formed, calls = 0.0, 3.0
    if p.mask is not None and not _plain(p.mask, T):
        formed, calls = p.mask.batch * p.mask.heads * asked(p.mask) * T * S, calls + 12
    if p.position_bias is not None or p.bias is not None:
        formed, calls = formed + 24.0 * H * T * S, calls + 8
    read = float(p.q.element_size() * B * (H * T + G * S) * (D + V))
    return Cost(products(p, T * S), formed, calls, "C++ for few queries, which reads the cache once", read, "few")


def run(p: Problem) -> Tensor:
    """(B, H, T, V), honest about NaN by itself: it sees scores and outputs pass by."""
    if p.q.is_meta:
        return nothing(p, *p.q.shape[:3], p.v.shape[3])
    out, odd = _run(p)
    return honest(p, lambda clean: _run(clean)[0]) if odd else out


def quick(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, position: Position | None = None
) -> Tensor | None:
    """What `attention` gives for plain calls that are small or have one query, in as few questions as will do: they
    take longer than the work. None wherever an answer is not the usual one: then the long way tells, or refuses.

    Args:
        position: adds to the scores of one query by distance alone.
    """
    if is_compiling() or _get_tracing_state() is not None or tracing.active() or _len_torch_dispatch_stack():
        return None
    if not type(q) is type(k) is type(v) is Tensor or not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if (dtype := q.dtype) not in NUMBERS or dtype is not k.dtype or dtype is not v.dtype:
        return None
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    try:
        (B, H, T, D), K, (b, G, S, V) = q.shape, k.shape, v.shape
        (_, _, _, a), (_, _, _, c), (_, _, _, d) = strides = q.stride(), k.stride(), v.stride()
    except (RuntimeError, ValueError):  # nested, sparse, or of another rank
        return None
    if not (b == B and K == (B, G, S, D) and B and T and S and G and H and H % G == 0 and a == c == d == 1):
        return None
    if (T > 1 and (T > MOST or B * H * T * D * S > TINY)) or q.is_neg() or k.is_neg() or v.is_neg() or build.why_not():
        return None
    if D % (width := step()) or V % width or not (D and V):
        return None
    row = None if position is None else by_distance(position, q, S)
    added = NOTHING if row is None else (row.data_ptr(), 0, row.stride(1) * (row.shape[1] > 1), 0)
    scale = D**-0.5 if scale is None else scale
    out, odd = launch(q, k, v, (B, H, T, D, G, S, V), strides, scale, causal and T > 1, added)
    return None if odd else out


def joined(
    q: Float[Tensor, "B 1 HD"],
    k: Float[Tensor, "B 1 GD"],
    v: Float[Tensor, "B 1 GD"],
    keys: Float[Tensor, "B G S D"],
    values: Float[Tensor, "B G S D"],
    *,
    reach: int,
    scale: float,
    turn: tuple[Tensor, Tensor] | None,
    position: Position | None,
) -> tuple[Float[Tensor, "B 1 HD"], bool]:
    """A step of decoding at once: queries and the new token's key are turned by (cos, sin), its key and value written
    to the last place of `keys` and `values`, and the last `reach` of these attended to.

    Nothing is asked: `joins` says where it may be called. Returns the outputs, and whether anything was not finite:
    then these are not to be used, but the key and value are in their place.
    """
    (B, G, S, D), (kb, kh, kt, _), (vb, vh, vt, _) = keys.shape, keys.stride(), values.stride()
    q = q.view(B, -1, 1, D)
    n, H = min(S, reach), q.shape[1]
    row = None if position is None else by_distance(position, q, n)
    added = NOTHING if row is None else (row.data_ptr(), 0, row.stride(1) * (row.shape[1] > 1), 0)
    if n < S:
        keys, values = keys[:, :, S - n :], values[:, :, S - n :]
    cos, sin = (0, 0) if turn is None else (turn[0].data_ptr(), turn[1].data_ptr())
    joining = k.data_ptr(), v.data_ptr(), cos, sin
    strides = (H * D, D, D, 1), (kb, kh, kt, 1), (vb, vh, vt, 1)
    out, odd = launch(q, keys, values, (B, H, 1, D, G, n, D), strides, scale, False, added, joining=joining)
    return out.view(B, 1, H * D), odd


def joins(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `joined` may be called with tensors of these kinds."""
    if is_compiling() or _get_tracing_state() is not None or tracing.active() or _len_torch_dispatch_stack():
        return False
    given, D = (q, k, v, keys, values), keys.shape[3]
    if any(type(x) is not Tensor or not x.is_cpu or x.dtype is not q.dtype or x.stride(-1) != 1 for x in given):
        return False
    if q.dtype not in NUMBERS or build.why_not() or D % step() or not (q.is_contiguous() and k.shape == v.shape):
        return False
    B, G = keys.shape[:2]
    return k.shape == (B, 1, G * D) and values.shape == keys.shape and k.is_contiguous() and v.is_contiguous()


def with_lse(
    q: Float[Tensor, "G n D"], k: Float[Tensor, "G S D"], v: Float[Tensor, "G S V"]
) -> tuple[Float[Tensor, "G n V"], Float[Tensor, "G n"]] | None:
    """Attention of scaled queries over all keys, and the log-sum-exp of their scores; None where it isn't for them: in
    other numbers than fp32, where gradients are wanted, or where something is not finite."""
    if is_compiling() or _get_tracing_state() is not None or tracing.active() or _len_torch_dispatch_stack():
        return None
    if any(
        type(x) is not Tensor or not x.is_cpu or x.dtype is not torch.float32 or x.stride(2) != 1 for x in (q, k, v)
    ):
        return None
    if (is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)) or build.why_not():
        return None
    (G, n, D), (_, S, V) = q.shape, v.shape
    if D % (width := step()) or V % width or not (G and n and S and D and V):
        return None
    lse = torch.empty((G, n), device="cpu")
    strides = (0, *q.stride()), (0, *k.stride()), (0, *v.stride())
    out, odd = launch(q[None], k, v, (1, G, n, D, G, S, V), strides, 1.0, False, lse=lse.data_ptr())
    return None if odd else (out[0], lse)


def _run(p: Problem) -> tuple[Tensor, bool]:
    T, S = p.q.shape[2], p.k.shape[2]
    keys = key_range(p, slice(0, T))
    k, v, bias = p.k, p.v, None
    if keys != slice(0, S):
        k, v = k[:, :, keys], v[:, :, keys]
    if p.position_bias is not None and T == 1:
        bias = by_distance(p.position_bias, p.q, k.shape[2])
    elif p.position_bias is not None:
        bias = _biases(p.position_bias, p.q, p.i, p.j[keys])
    if p.bias is not None:
        given = p.bias if p.bias.shape[3] == 1 else p.bias[..., keys]
        bias = given.float() if bias is None else bias + given
    mask = None if _plain(p.mask, T) else p.mask.at(p.i, p.j[keys])  # type: ignore[union-attr]
    causal = T > 1 and p.mask is not None and p.mask == CAUSAL
    return decode(p.q, k, v, p.scale, causal=causal, bias=bias, mask=mask)


class _Row(NamedTuple):
    """What a position adds by distance, and what it was made of."""

    row: Tensor
    about: tuple[torch.dtype, int, int]
    """dtype, heads, and how many attributes the position had."""
    names: tuple[str, ...]
    plain: tuple[Any, ...]
    tensors: list[Tensor]


_ROWS: WeakKeyDictionary[Position, _Row] = WeakKeyDictionary()


def by_distance(position: Position, q: Tensor, S: int) -> Float[Tensor, "1 #H 1 S"]:
    """What the position adds to the scores of one query at the last of S keys.

    Kept for twice as many keys and cut from there, as long as numbers and tensors of the position are what they were:
    tensors are compared, since they can be written into behind everybody's back.
    """
    held = vars(position)
    tensors: list[Tensor] = [x for x in position._parameters.values() if x is not None]
    tensors += [x for x in position._buffers.values() if x is not None]
    kept, about = _ROWS.get(position), (q.dtype, q.shape[1], len(held))
    if kept is not None and kept.row.shape[-1] >= S and kept.about == about and len(kept.tensors) == len(tensors):
        same = tuple(map(held.get, kept.names)) == kept.plain
        if same and all(map(torch.equal, kept.tensors, tensors)):
            return kept.row.narrow(-1, kept.row.shape[-1] - S, S)
    n = max(64, 2 * S)
    row = _biases(position, q, torch.tensor([n - 1], device="cpu"), torch.arange(n, device="cpu"))
    if _told(position):
        names = tuple(name for name, x in held.items() if isinstance(x, int | float | str | torch.dtype))
        plain = tuple(map(held.get, names))
        _ROWS[position] = _Row(row, about, names, plain, [x.detach().clone() for x in tensors])
    return row.narrow(-1, n - S, S)


def _told(position: Position) -> bool:
    """Whether numbers and tensors of its own are all that it computes with."""
    rest = {n: x for n, x in vars(position).items() if not n.startswith("_")}
    return not position._modules and all(isinstance(x, int | float | str | torch.dtype) for x in rest.values())


def _biases(position: Position, q: Tensor, i: Tensor, j: Tensor) -> Float[Tensor, "1 #H t s"]:
    return position.bias(Rows(q=q, k=q, scores=q.new_empty(0), i=i, j=j)).float()


def banded(mask: Mask | None) -> bool:
    """Whether all that counts for a mask is how far behind a query the key is, from bound to bound."""
    parts = mask.parts if isinstance(mask, And) else () if mask is None else (mask,)
    return all(isinstance(part, Diagonals) and part.step == 1 for part in parts)


def _plain(mask: Mask | None, T: int) -> bool:
    """Whether it hides nothing of the keys within its reach but what causality hides."""
    return mask is None or mask == CAUSAL or (T == 1 and banded(mask))


def _learns(p: Problem) -> bool:
    held = (q for stage in p.stages for q in stage.parameters())
    return any(t is not None and t.requires_grad for t in (p.q, p.k, p.v, p.bias, *held))

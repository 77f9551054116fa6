"""The Triton programs as operators that autograd and torch.compile know: shapes, launches, gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.kernels import _triton_attention as programs
from regard.kernels.triton_attention import Launch, interpreted, launch


@torch.library.custom_op("regard::triton_attention", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Sequence[Tensor], scale: float, block: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Outputs, and the base-2 logarithm of each row's sum: saturated rows would lose digits in another base."""
    out, bound = _forward_like(q, k, v, lists, scale, block, shape)
    q, k, v, o = _readable(q, k, v, out)
    how = launch(q.shape, k.shape, v.shape, (block[0], block[1]))
    with torch.cuda.device_of(q):
        programs.forward[how.programs[:1]](
            q, k, v, o, bound, *_lists(lists, slice(0, 4), q),
            *_strides(q, k, v, o), *_sizes(q, k, v, block, shape), scale / math.log(2), **_options(how, lists, block),
        )  # fmt: skip
    return out if o is out else out.copy_(o), bound


@forward.register_fake
def _forward_like(
    q: Tensor, k: Tensor, v: Tensor, lists: Sequence[Tensor], scale: float, block: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)  # heads lie side by side for the output projection
    return out, q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("regard::triton_attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bound: Tensor, dout: Tensor, dbound: Tensor,
    lists: Sequence[Tensor], scale: float, block: Sequence[int], shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (q, k, v)]
    q, k, v, o, g, dq, dk, dv = _readable(q, k, v, out, dout, *grads)
    delta, dbound = torch.empty_like(bound), dbound.contiguous()
    sizes, scales = _sizes(q, k, v, block, shape), (scale, scale / math.log(2))
    how = launch(q.shape, k.shape, v.shape, (block[0], block[1]))
    options = _options(how, lists, block)
    with torch.cuda.device_of(q):
        programs.backward_queries[how.programs[:1]](
            q, k, v, o, bound, g, dbound, dq, delta, *_lists(lists, slice(0, 4), q),
            *_strides(q, k, v, o, g, dq), *sizes, *scales, **options,
        )  # fmt: skip
        programs.backward_keys[how.programs[1:]](
            q, k, v, bound, g, delta, dk, dv, *_lists(lists, slice(4, 8), q),
            *_strides(q, k, v, g, dk, dv), *sizes, *scales, **options,
        )  # fmt: skip
    dq, dk, dv = (to if to is made else to.copy_(made) for to, made in zip(grads, (dq, dk, dv), strict=True))
    return dq, dk, dv


@backward.register_fake
def _backward_like(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bound: Tensor, dout: Tensor, dbound: Tensor,
    lists: Sequence[Tensor], scale: float, block: Sequence[int], shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lists, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, *lists)


def _differentiate(ctx: Any, dout: Tensor, dbound: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    q, k, v, out, bound, *lists = ctx.saved_tensors
    dq, dk, dv = backward(q, k, v, out, bound, dout, dbound, lists, *ctx.rest)
    return dq, dk, dv, [None] * len(lists), None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('attention: kernel "triton" has no second derivatives; expected kernel="eager" for them')


forward.register_autograd(_differentiate, setup_context=_save)
backward.register_autograd(_refuse)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Rows without gaps. The interpreter neither multiplies nor rounds bfloat16, so there it gets float32."""
    wide = tensors[0].dtype == torch.bfloat16 and interpreted()
    given = [z.float() if wide else z for z in tensors]
    return [z if z.stride(-1) == 1 else z.contiguous() for z in given]


def _strides(*tensors: Tensor) -> list[int]:
    return [n for z in tensors for n in z.stride()[:3]]


def _sizes(q: Tensor, k: Tensor, v: Tensor, block: Sequence[int], shape: Sequence[int]) -> list[int]:
    """H, H / G, T, S, D, V, the counts of blocks, and how many lines of lists one batch row and one head are."""
    (_, H, T, D), (_, G, S, _), (batch, heads) = q.shape, k.shape, shape
    counts = -(-T // block[0]), -(-S // block[1])
    return [H, H // G, T, S, D, v.shape[3], *counts, heads if batch > 1 else 0, 1 if heads > 1 else 0]


def _lists(lists: Sequence[Tensor], which: slice, instead: Tensor) -> Sequence[Tensor]:
    """One direction's lists and the tiles; without lists any tensor, never read, keeps the place."""
    return [*lists[which], lists[8]] if lists else [instead] * 5


def _options(how: Launch, lists: Sequence[Tensor], block: Sequence[int]) -> dict[str, Any]:
    tiles = {"BQ": block[0], "BK": block[1], "BD": how.width[0], "BV": how.width[1], "DENSE": not lists}
    # Products of float32 keep float32 unless torch itself has been told otherwise.
    exact = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return {**tiles, "PRECISION": exact, "num_warps": how.warps, "num_stages": how.stages}

"""The C++ kernel for few queries a head: its one argument, packed from tensors."""

import struct

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.native import build

NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
"""What it computes with, and `half` of decode.cpp for each."""
_FIELDS = struct.Struct("10q" + 4 * "4q" + 2 * "4q" + "5q" + "d")
"""`Decode` of decode.cpp, field by field, packed at once: ctypes' own structs take as long as a small call."""
NOTHING: tuple[int, int, int, int] = (0, 0, 0, 0)


def decode(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    scale: float,
    *,
    causal: bool = False,
    bias: Float[Tensor, "#B #H #T #S"] | None = None,
    mask: Bool[Tensor, "#B #H #T #S"] | None = None,
) -> tuple[Float[Tensor, "B H T V"], bool]:
    """Outputs, and whether a query, a key or an output was NaN or infinite: then these are not to be used.

    Tensors on the CPU that fit, with widths of whole steps (`step`) and no gradients: nothing is checked here.
    """
    (_, _, T, _), S = q.shape, k.shape[2]
    added: tuple[int, ...] = NOTHING
    hidden: tuple[int, ...] = NOTHING
    if bias is not None:
        bias, added = _by_keys(bias, T, S)
    if mask is not None:
        mask, hidden = _by_keys(mask, T, S)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return launch(q, k, v, (*q.shape, *v.shape[1:]), (q.stride(), k.stride(), v.stride()), scale, causal, added, hidden)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    scale: float,
    causal: bool,
    added: tuple[int, ...] = NOTHING,
    hidden: tuple[int, ...] = NOTHING,
    joining: tuple[int, int, int, int] = NOTHING,
    lse: int = 0,
) -> tuple[Tensor, bool]:
    """The same by sizes (B, H, T, D, G, S, V) and strides, for who has asked for them already.

    Args:
        joining: addresses of a token's key and value, which are written to the last place of k and v, and of the (cos,
            sin) that turn the queries and the key; or zeros.
        lse: address of (B, H, T) floats in a row, where the log-sum-exp of each query's scores goes; or 0.
    """
    (B, H, T, D, G, S, V), ((qb, qh, qt, _), (kb, kh, kt, _), (vb, vh, vt, _)) = sizes, strides
    if V == D:
        out = torch.empty_like(q)  # the quickest, with memory in q's order
        ob, oh, ot, _ = out.stride()
    else:
        out = torch.empty((B, H, T, V), dtype=q.dtype, device="cpu")
        ob, oh, ot = H * T * V, T * V, V
    shape = (B, H, G, T, S, D, V, torch.get_num_threads(), NUMBERS[q.dtype], causal)
    views = (q.data_ptr(), qb, qh, qt, k.data_ptr(), kb, kh, kt, v.data_ptr(), vb, vh, vt, out.data_ptr(), ob, oh, ot)
    return out, bool(
        build.library().regard_decode(
            _FIELDS.pack(*shape, *views, *added, *hidden, *joining[:2], lse, *joining[2:], scale)
        )
    )


def step() -> int:
    """What widths are multiples of."""
    return int(build.library().regard_lanes())


def _by_keys(x: Tensor, T: int, S: int) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor with all keys in a row, where it lies, and how far apart batch rows, heads and queries are."""
    x = x.expand(-1, -1, T, S)
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, (x.data_ptr(), *(0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)))

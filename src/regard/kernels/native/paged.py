"""The C++ attention over pages, called on tensors."""

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.native import build
from regard.kernels.pages import Pages

LEAST = 1024
"""Keys of a row below which it isn't cut into parts for more threads."""


_FIELDS: list[tuple[str, Any]] = [
    *((n, ctypes.c_int64) for n in ("B", "H", "G", "S", "D", "V", "page", "threads", "parts")),
    *((n, ctypes.c_void_p) for n in ("q", "k", "v", "table", "start", "count", "mask")),
    *(("mask_b", ctypes.c_int64), ("mask_h", ctypes.c_int64), ("scale", ctypes.c_float)),
    *((n, ctypes.c_void_p) for n in ("out", "partial", "odd")),
]


class _Paged(ctypes.Structure):
    """`Paged` of paged.cpp, field by field."""

    _fields_ = _FIELDS


def attend(
    q: Float[Tensor, "B H 1 D"], pages: Pages, scale: float, allowed: Bool[Tensor, "#B #H 1 S"] | None
) -> tuple[Float[Tensor, "B H 1 V"], bool]:
    """Outputs, and whether a score or an output was NaN or infinite. A row that may see nothing gives 0."""
    (B, H, _, D), (_, G, page, V), S = q.shape, pages.v.shape, pages.length
    q, out, threads = q.contiguous(), q.new_empty(B, H, 1, V), torch.get_num_threads()
    parts = max(1, min(-(-4 * threads // (B * G)), S // LEAST))
    partial = torch.empty(B * H * parts * (V + 2), dtype=torch.float64, device="cpu")
    odd, whole = ctypes.c_int32(0), ctypes.c_int64 * B
    table = (ctypes.c_void_p * B)(*(t.data_ptr() for t in pages.table))
    start, count = whole(*pages.start), whole(*pages.count)
    p = _Paged(B=B, H=H, G=G, S=S, D=D, V=V, page=page, threads=threads, parts=parts, scale=scale)
    p.q, p.k, p.v, p.out, p.partial = (t.data_ptr() for t in (q, pages.k, pages.v, out, partial))
    p.table, p.start, p.count, p.odd = (ctypes.addressof(c) for c in (table, start, count, odd))
    if allowed is not None:
        allowed = allowed.contiguous()
        p.mask = allowed.data_ptr()
        p.mask_b, p.mask_h = (0 if n == 1 else s for n, s in zip(allowed.shape[:2], allowed.stride()[:2], strict=True))
    build.library().regard_paged(ctypes.byref(p))
    return out, bool(odd)

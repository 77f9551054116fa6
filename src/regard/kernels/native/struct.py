"""The C++ kernels' one argument, filled from tensors."""

import ctypes

import torch
from torch import Tensor

from regard.kernels.native import build
from regard.kernels.native.blocks import PANEL, Walk

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("b", ctypes.c_int64), ("h", ctypes.c_int64), ("t", ctypes.c_int64)]


def _view(x: Tensor | None) -> _View:
    return _View() if x is None else _View(x.data_ptr(), *x.stride()[-4:-1])


class _Attention(ctypes.Structure):
    """`Attention` of attention.h, field by field."""

    _fields_ = (
        [(n, ctypes.c_int64) for n in ("B", "H", "G", "T", "S", "D", "V", "threads")]
        + [(n, _View) for n in ("q", "k", "v", "out")]
        + [(n, ctypes.c_void_p) for n in ("lse", "kt", "odd")]
        + [("scale", ctypes.c_float), ("cap", ctypes.c_float)]
        + [(n, ctypes.c_int64) for n in ("bq", "bk", "Bm", "Hm")]
        + [(n, ctypes.c_void_p) for n in ("row_ptr", "cols", "tile", "tiles", "table")]
        + [("table_h", ctypes.c_int64), ("bias", ctypes.c_void_p)]
        + [(n, ctypes.c_int64) for n in ("bias_b", "bias_h", "bias_t", "bias_s")]
        + [(n, _View) for n in ("grad", "dq", "dk", "dv")]
        + [(n, ctypes.c_void_p) for n in ("vt", "delta", "dlse", "dtable", "col_ptr", "rows", "entry")]
        + [(n, ctypes.c_int64) for n in ("parts", "kind", "amx")]
    )


def call(
    name: str,
    scale: float,
    cap: float | None,
    walk: Walk,
    table: Tensor | None,
    bias: Tensor | None,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    odd: Tensor | None = None,
    dlse: Tensor | None = None,
    dtable: Tensor | None = None,
    parts: int = 1,
    packed: bool = False,
    amx: bool = False,
) -> None:
    """Run the C++ function of that name; what it writes must have its memory already.

    packed: keys and values are laid out in their own dtype, not in fp32.
    """
    lib = build.library()
    (B, H, T, D), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    keys = -(-S // PANEL) * PANEL
    kt, vt = (torch.empty(B * G, keys, n, dtype=q.dtype if packed else torch.float32, device="cpu") for n in (D, V))
    p = _Attention(B=B, H=H, G=G, T=T, S=S, D=D, V=V, threads=torch.get_num_threads())
    p.q, p.k, p.v, p.out, p.lse, p.kt = *map(_view, (q, k, v, out)), lse.data_ptr(), kt.data_ptr()
    p.scale, p.cap = scale, cap or 0.0
    (p.bq, p.bk), (p.Bm, p.Hm) = walk.block, walk.heads
    for field in ("row_ptr", "cols", "tile", "tiles", "col_ptr", "rows", "entry"):
        setattr(p, field, getattr(walk, field).data_ptr())
    if table is not None:
        p.table, p.table_h = table.data_ptr(), 0 if len(table) == 1 else table.stride(0)
    if bias is not None:
        if bias.shape[3] > 1 and bias.stride(3) > 1:  # keys are read by whole vectors; T5's bias is a view by heads
            bias = bias.contiguous()
        strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
        p.bias, p.bias_b, p.bias_h, p.bias_t, p.bias_s = bias.data_ptr(), *strides
    p.vt, p.kind, p.amx = vt.data_ptr(), KINDS[q.dtype], amx
    p.odd = None if odd is None else odd.data_ptr()
    if grad is not None:
        delta = torch.empty_like(lse)
        p.grad, p.dq, p.dk, p.dv, p.delta = *map(_view, (grad, dq, dk, dv)), delta.data_ptr()
        p.dlse = None if dlse is None else dlse.data_ptr()
        p.dtable, p.parts = None if dtable is None else dtable.data_ptr(), parts
    getattr(lib, name)(ctypes.byref(p))

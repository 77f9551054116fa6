"""The C++ attention to lists of single keys, called on tensors."""

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.kernels.native import build
from regard.kernels.native.blocks import PANEL
from regard.kernels.native.struct import _View, _view

FAR = 2**40
"""Farther than any two tokens stand apart."""


class Lists(NamedTuple):
    """Which keys each run of queries has, as listed.cpp reads it."""

    run: int
    """Queries that have one list."""
    heads: tuple[int, int]
    """Batch rows and heads that have lists of their own; 1 where all share."""
    cols: Int[Tensor, " N"]
    """Keys, in int32; what is negative, or there already, is none."""
    ptr: Int[Tensor, " P"] | None = None
    """Where each list starts, and the end; None where all are `most` long."""
    most: int = 0
    until: Int[Tensor, "b h S"] | None = None
    """The position from which on each key is seen no more, in int32."""
    back: int = FAR
    ahead: int = FAR
    """Of all that is seen: -ahead <= i - j <= back."""
    prefix: int = 0
    """First keys that are seen besides what is listed."""
    near: tuple[int, int] = (-1, 0)
    """A band that is: back and ahead."""
    keep: Bool[Tensor, "b S"] | None = None
    """Keys that are not hidden from everybody."""


_FIELDS: list[tuple[str, Any]] = [
    *((n, ctypes.c_int64) for n in ("B", "H", "G", "T", "S", "D", "V", "threads")),
    *((n, _View) for n in ("q", "k", "v", "out")),
    *(("lse", ctypes.c_void_p), ("run", ctypes.c_int64), ("Bm", ctypes.c_int64), ("Hm", ctypes.c_int64)),
    *(("most", ctypes.c_int64), ("ptr", ctypes.c_void_p), ("cols", ctypes.c_void_p), ("until", ctypes.c_void_p)),
    *((n, ctypes.c_int64) for n in ("Bu", "Hu", "back", "ahead", "prefix", "near_back", "near_ahead")),
    *(("keep", ctypes.c_void_p), ("Bk", ctypes.c_int64), ("bias", ctypes.c_void_p)),
    *((n, ctypes.c_int64) for n in ("bias_b", "bias_h", "bias_s")),
    ("scale", ctypes.c_double),
    *((n, _View) for n in ("grad", "dq", "dk", "dv")),
    *(("dbias", ctypes.c_void_p), ("parts", ctypes.c_int64)),
]


class _Listed(ctypes.Structure):
    """`Listed` of listed.cpp, field by field."""

    _fields_ = _FIELDS


def outputs(
    scale: float, lists: Lists, bias: Float[Tensor, "#B #H 1 #S"] | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T"]]:
    """In q's dtype, and the log-sum-exp of each row's scores in fp32: -inf where a row sees nothing."""
    x, y, z = map(_floats, (q, k, v))
    out, lse = torch.empty(*x.shape[:3], z.shape[3], device="cpu"), torch.empty(x.shape[:3], device="cpu")
    _call("regard_listed", scale, lists, bias, x, y, z, out, lse)
    return out[..., : v.shape[3]].to(q.dtype), lse


def gradients(
    scale: float, lists: Lists, bias: Float[Tensor, "#B #H 1 #S"] | None, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, grad: Tensor, wants_bias: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of the bias, where it wants one, and of q, k and v."""
    (B, H, T, D), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    x, y, z, out, grad = map(_floats, (q, k, v, out, grad))
    parts = max(1, min(-(-2 * torch.get_num_threads() // max(1, B * H)), -(-T // max(lists.run, 128))))
    dq = torch.zeros(x.shape, device="cpu")
    dk, dv = (torch.zeros(parts * B, H, S, t.shape[3], device="cpu") for t in (y, z))
    dbias = torch.zeros(parts, B, H, S, device="cpu") if wants_bias and bias is not None else None
    made: dict[str, Any] = {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
    _call("regard_listed_backward", scale, lists, bias, x, y, z, out, lse, made, dbias, parts)
    if dbias is not None and bias is not None:
        dbias = dbias.sum(0).unsqueeze(2).sum_to_size(bias.shape).to(bias.dtype)
    dk, dv = (t.view(parts, B, G, H // G, S, -1).sum((0, 3)) for t in (dk, dv))
    return dbias, dq[..., :D].to(q.dtype), dk[..., :D].to(k.dtype), dv[..., :V].to(v.dtype)


def lasting(delta: Float[Tensor, "*n S"], real: Bool[Tensor, "*n S"], most: int) -> Int[Tensor, "*n S"]:
    """The token with which each goes where of those so far the `most` greatest stay, of equals the latest; S if it
    stays, and 0 where it is hidden."""
    x, real = delta.detach().double().contiguous(), real.contiguous()
    until, S = torch.empty(x.shape, dtype=torch.int32, device="cpu"), x.shape[-1]
    sizes = (ctypes.c_int64(n) for n in (x.numel() // max(1, S), S, most))
    at = (ctypes.c_void_p(t.data_ptr()) for t in (x, real, until))
    build.library().regard_lasting(*at, *sizes, torch.get_num_threads())
    return until


def greatest(
    q: Float[Tensor, "*n r D"], keys: Float[Tensor, "N b D"], index: Int[Tensor, "*n c"]
) -> Float[Tensor, "*n c b"]:
    """The greatest of q . key over the r queries, for each key of these blocks of keys."""
    (r, D), c, b = q.shape[-2:], index.shape[-1], keys.shape[1]
    if not (ready(q) and ready(keys)):
        near = keys.index_select(0, index.flatten()).view(*index.shape[:-1], c * b, D)
        return (q @ near.mT).amax(-2).unflatten(-1, (c, b))
    out, q, keys, index = (
        torch.empty(*index.shape, b, device="cpu"),
        q.contiguous(),
        keys.contiguous(),
        index.contiguous(),
    )
    sizes = (ctypes.c_int64(n) for n in (index.numel() // max(1, c), r, c, b, D))
    at = (ctypes.c_void_p(t.data_ptr()) for t in (q, keys, index, out))
    build.library().regard_greatest(*at, *sizes, torch.get_num_threads())
    return out


class _Indexed(ctypes.Structure):
    """`Indexed` of indexed.cpp, field by field."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "H", "T", "S", "D", "k", "causal", "threads")),
        *((n, ctypes.c_void_p) for n in ("q", "w", "keys", "keep")),
        *(("Bk", ctypes.c_int64), ("turned", ctypes.c_void_p), ("out", ctypes.c_void_p)),
    ]


def indexed(
    q: Float[Tensor, "B h T D"],
    w: Float[Tensor, "B h T"],
    keys: Float[Tensor, "B S D"],
    k: int,
    *,
    causal: bool,
    keep: Bool[Tensor, "b S"] | None,
) -> Int[Tensor, "B T k"] | None:
    """The k keys of largest sum over h of w relu(q . key), of equals the last, -1 where there are fewer; the last
    query stands where the last key does. None where a score is NaN. Only for what is `ready`."""
    (B, H, T, D), S = q.shape, keys.shape[1]
    q, w, keys = q.contiguous(), w.contiguous(), keys.contiguous()
    out = torch.empty(B, T, k, dtype=torch.int32, device="cpu")
    turned = torch.empty(B, -(-S // PANEL) * PANEL, D, device="cpu")
    p = _Indexed(B=B, H=H, T=T, S=S, D=D, k=k, causal=causal, threads=torch.get_num_threads())
    p.q, p.w, p.keys, p.turned, p.out = (t.data_ptr() for t in (q, w, keys, turned, out))
    if keep is not None:
        keep = keep.contiguous()
        p.keep, p.Bk = keep.data_ptr(), len(keep)
    return None if build.library().regard_indexed(ctypes.byref(p)) else out


def ready(x: Tensor) -> bool:
    """Whether x can be handed over: fp32 in the CPU's memory, and no gradient wanted."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not build.readable(x) or x.numel() == 0:
        return False
    return not (torch.is_grad_enabled() and x.requires_grad) and not build.why_not()


def _call(
    name: str, scale: float, lists: Lists, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, made: dict[str, Tensor] | None = None, dbias: Tensor | None = None, parts: int = 1,
) -> None:  # fmt: skip
    (B, H, T, D), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    p = _Listed(B=B, H=H, G=G, T=T, S=S, D=D, V=V, threads=torch.get_num_threads(), scale=scale, parts=parts)
    for field, x in {"q": q, "k": k, "v": v, "out": out, **(made or {})}.items():
        setattr(p, field, _view(x))
    p.lse, p.run, (p.Bm, p.Hm), p.most = lse.data_ptr(), lists.run, lists.heads, lists.most
    p.cols, p.ptr = lists.cols.data_ptr(), None if lists.ptr is None else lists.ptr.data_ptr()
    if lists.until is not None:
        p.until, (p.Bu, p.Hu) = lists.until.data_ptr(), lists.until.shape[:2]
    p.back, p.ahead, p.prefix, (p.near_back, p.near_ahead) = lists.back, lists.ahead, lists.prefix, lists.near
    if lists.keep is not None:
        p.keep, p.Bk = lists.keep.data_ptr(), len(lists.keep)
    if bias is not None:
        bias = bias.detach().float()
        strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
        p.bias, p.bias_b, p.bias_h, _, p.bias_s = bias.data_ptr(), *strides
    p.dbias = None if dbias is None else dbias.data_ptr()
    getattr(build.library(), name)(ctypes.byref(p))


def _floats(x: Tensor) -> Tensor:
    """x in fp32 with a width of whole vectors and a contiguous last axis."""
    x, lanes = x.detach().float(), build.library().regard_lanes()
    x = F.pad(x, (0, -x.shape[3] % lanes)) if x.shape[3] % lanes else x
    return x if x.stride(3) == 1 else x.contiguous()

"""The C++ passes of the normalisers over rows of scores."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels.native import build


def ready(x: Tensor) -> bool:
    """Whether x can be handed over: fp32 in the CPU's memory, and not empty."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not build.readable(x):
        return False
    return x.numel() > 0 and not build.why_not()


def able(x: Tensor, alpha: float | Tensor) -> bool:
    """Whether `entmax` can run this: `ready`, and alpha = 1.5 or 2."""
    return isinstance(alpha, float) and alpha in (1.5, 2.0) and ready(x)


def entmax(z: Float[Tensor, "N S"], alpha: float) -> Float[Tensor, "N S"]:
    """alpha-entmax of each row; rows of only -inf give 0."""
    out = torch.empty_like(z)
    build.library().regard_entmax(_at(z), _at(out), *_sizes(z), int(2 * alpha), torch.get_num_threads())
    return out


def topk(z: Float[Tensor, "N S"], k: int) -> Float[Tensor, "N S"]:
    """Softmax over the k greatest numbers of each row and what equals the k-th; rows of only -inf give 0."""
    out, kept = torch.empty_like(z), ctypes.c_int64(min(k, z.shape[1]))
    build.library().regard_topk(_at(z), _at(out), *_sizes(z), kept, torch.get_num_threads())
    return out


def entmax_backward(dp: Float[Tensor, "N S"], p: Float[Tensor, "N S"], alpha: float) -> Float[Tensor, "N S"]:
    """Gradient on the weights -> gradient on the scores. alpha = 1 is softmax."""
    dp, out = dp.contiguous(), torch.empty_like(p)
    build.library().regard_entmax_backward(
        _at(p), _at(dp), _at(out), *_sizes(p), int(2 * alpha), torch.get_num_threads()
    )
    return out


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])

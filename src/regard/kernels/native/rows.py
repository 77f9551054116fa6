"""The C++ passes of the normalisers over rows of scores."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels.native import build


def able(x: Tensor, alpha: float | Tensor) -> bool:
    """Whether `entmax` can run this: fp32 rows on a CPU, not while compiling, alpha = 1.5 or 2."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return isinstance(alpha, float) and alpha in (1.5, 2.0) and x.numel() > 0 and not build.why_not()


def entmax(z: Float[Tensor, "N S"], alpha: float) -> Float[Tensor, "N S"]:
    """alpha-entmax of each row; rows of only -inf give 0."""
    out = torch.empty_like(z)
    build.library().regard_entmax(_at(z), _at(out), *_sizes(z), int(alpha == 1.5), torch.get_num_threads())
    return out


def entmax_backward(dp: Float[Tensor, "N S"], p: Float[Tensor, "N S"], alpha: float) -> Float[Tensor, "N S"]:
    """Gradient on the weights -> gradient on the scores."""
    dp, out = dp.contiguous(), torch.empty_like(p)
    build.library().regard_entmax_backward(_at(p), _at(dp), _at(out), *_sizes(p), int(alpha == 1.5), torch.get_num_threads())
    return out


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])

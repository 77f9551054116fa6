"""What several position schemes need: phases in full precision, and distances."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from regard.stages import Rows
from regard.tracing import readable


def work_dtype(z: Tensor) -> torch.dtype:
    """The dtype that biases and rotations of `z` are computed in: float32, or float64 for float64 inputs."""
    return torch.promote_types(z.dtype, torch.float32)


def frequencies(width: int, base: float, device: torch.device) -> Float[Tensor, " half"]:
    """w_a = base^(-2a / width) for a = 0 .. width/2 - 1, in the widest float that the device has.

    float64 because an angle is position * w_a: at position 10^6 float32 is off by some 0.06 rad.
    """
    if device.type == "cpu" and readable() and not _len_torch_dispatch_stack():
        return _kept(width, base)
    return _made(width, base, device)


def _made(width: int, base: float, device: torch.device) -> Float[Tensor, " half"]:
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return base ** (-torch.arange(0, width, 2, device=device, dtype=dtype) / width)


@lru_cache(maxsize=64)
def _kept(width: int, base: float) -> Float[Tensor, " half"]:
    with torch.inference_mode(False):
        return _made(width, base, torch.device("cpu"))


def angles(positions: Int[Tensor, "*b T"], w: Float[Tensor, " half"]) -> Float[Tensor, "*b T half"]:
    """position * w, one row a position. The integers are never stored in a type that rounds them."""
    return positions.to(w.dtype).unsqueeze(-1) * w


def distances(rows: Rows) -> Float[Tensor, "t s"]:
    """|i - j| as floats of the precision that biases are computed in."""
    return (rows.i.unsqueeze(-1) - rows.j).abs().to(work_dtype(rows.q))

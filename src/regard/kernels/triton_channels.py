"""The scan of channels by themselves as Triton kernels for GPUs, forward and backward.

It reads and writes every number once, in float32 or float64; backward keeps decays and outputs (the programs are in
`_triton_channels`).

Never run on a GPU yet: tested in Triton's interpreter only, and compiled for CUDA without a device.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels.flops import FORMULAS
from regard.kernels.triton_attention import installed, interpreted

BLOCK = 64
"""Channels a program: few, as they all go through T tokens one by one."""
LINES = 65535
"""The most programs along the grid's second axis."""


def why_not(x: Float[Tensor, "B T C"]) -> list[str]:
    """It is for GPUs (or for Triton's interpreter)."""
    reasons = []
    if not installed():
        reasons.append('triton is not installed: pip install "regard[triton]"')
    elif not x.is_cuda and not (x.is_cpu and interpreted()):
        reasons.append(f"tensors are on {x.device.type}: only CUDA devices, or TRITON_INTERPRET=1 in the environment")
    if x.shape[2] > LINES * BLOCK:
        reasons.append(f"there are {x.shape[2]} channels: at most {LINES * BLOCK}")
    return reasons


def triton_channels(
    x: Float[Tensor, "B T C"], g: Float[Tensor, "B T C"], state: Float[Tensor, "B C"]
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B C"]]:
    """All h_t and the last, for T > 0, in the dtype of all; for inputs that `channel_scan` has checked.

    Raises:
        ValueError: it can't run here (see `why_not`).
    """
    out = _forward(x, g, state)
    return out, out[:, -1]


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], -(-x.shape[2] // BLOCK)


@torch.library.custom_op("regard::triton_channels", mutates_args=())
def _forward(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    if reasons := why_not(x):
        raise ValueError(f'channel_scan: form "triton" cannot run: {"; ".join(reasons)}')
    from regard.kernels import _triton_channels as programs

    x, g, state = (z.contiguous() for z in (x, g, state))
    out = torch.empty_like(x)
    programs.run_channels[_grid(x)](x, g, state, out, x.shape[1], C=x.shape[2], BLOCK=BLOCK, num_warps=2)
    return out


@_forward.register_fake
def _(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("regard::triton_channels_backward", mutates_args=())
def _backward(g: Tensor, state: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from regard.kernels import _triton_channels as programs

    given = [z.contiguous() for z in (g, state, out, dout)]
    made = torch.empty_like(given[0]), torch.empty_like(given[0]), torch.empty_like(given[1])
    programs.run_channels_backward[_grid(g)](*given, *made, g.shape[1], C=g.shape[2], BLOCK=BLOCK, num_warps=2)
    return made


@_backward.register_fake
def _(g: Tensor, state: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return g.new_empty(g.shape), g.new_empty(g.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:], output)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(*ctx.saved_tensors, dout)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('channel_scan: form "triton" has no second derivatives; expected form="chunked" for them')


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
FORMULAS["regard.triton_channels"] = lambda given: 0.0
FORMULAS["regard.triton_channels_backward"] = lambda given: 0.0

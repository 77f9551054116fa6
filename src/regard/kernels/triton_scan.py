"""The causal linear scan with decay as Triton kernels for GPUs, forward and backward.

What `linear_scan` gives, chunk by chunk (the programs are in `_triton_scan`). Sums are in float32, also of
half-precision inputs, whose products are TF32: it holds every float16 and bfloat16. Backward keeps the inputs alone and
makes all states again.

Never run on a GPU yet: tested in Triton's interpreter only, and compiled for CUDA without a device.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.kernels.flops import FORMULAS, Given
from regard.kernels.triton_attention import installed, interpreted

LARGEST = 64
"""Tokens a chunk."""
WIDEST = 32
"""Key or value features a tile: with 64 float32 products run out of registers."""
SMALLEST = 16
"""The least that a GPU's matrix unit takes."""
LINES = 65535
"""The most programs along the grid's second and third axis."""

# Kinds of decay, as the programs tell them apart.
NONE, TIME, FEATURE = 0, 1, 2


def why_not(q: Tensor, v: Tensor) -> list[str]:
    """It is for GPUs (or for Triton's interpreter)."""
    reasons = []
    if not installed():
        reasons.append('triton is not installed: pip install "regard[triton]"')
    elif not q.is_cuda and not (q.is_cpu and interpreted()):
        reasons.append(f"tensors are on {q.device.type}: only CUDA devices, or TRITON_INTERPRET=1 in the environment")
    if max(q.shape[3], v.shape[3]) > LINES * SMALLEST:
        reasons.append(f"features are {max(q.shape[3], v.shape[3])} wide: at most {LINES * SMALLEST}")
    return reasons


def triton_scan(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    g: Float[Tensor, "b H t F"] | None,
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """Outputs in q's dtype, the final state in the state's; for inputs that `linear_scan` has checked.

    Args:
        g: logarithms of decays, in the state's dtype; b, t and F are 1 where all share one. None: nothing decays.
        state: in float32, or float64 where q is.

    Raises:
        ValueError: it can't run here (see `why_not`).
    """
    (B, H, T, _), g = q.shape, g if g is None else g.to(state.dtype)
    out, state = _forward(q, k, v, None if g is None else g.expand(B, H, T, -1), state)
    return out, state


# --- how the work is cut ------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """Tokens of a chunk, key features and value features of a tile; how many of each; programs of each kernel."""

    chunk: int
    key_tile: int
    value_tile: int
    chunks: int
    states: tuple[int, int, int]
    weights: tuple[int]
    outputs: tuple[int, int]
    gradients: tuple[int, int]


def cut(heads: int, T: int, K: int, V: int, *, narrow: bool) -> Cut:
    """For so many heads of all batch rows. `narrow`: products fill registers, so chunks are half as long."""
    most = (max(SMALLEST, LARGEST // 2) if narrow else LARGEST, WIDEST, WIDEST)
    chunk, key_tile, value_tile = (min(m, _power(n)) for n, m in zip((T, K, V), most, strict=True))
    chunks, keys, values = -(-T // chunk), -(-K // key_tile), -(-V // value_tile)
    programs = heads * chunks
    return Cut(
        chunk, key_tile, value_tile, chunks, (heads, keys, values), (programs,), (programs, values), (programs, keys)
    )


def _power(n: int) -> int:
    """The next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


class _Run:
    """The kernels, for inputs of these shapes and kinds."""

    def __init__(self, q: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> None:
        (B, H, self.T, K), V = q.shape, v.shape[3]
        wide, kind = q.dtype == state.dtype, NONE if g is None else TIME if g.shape[3] == 1 else FEATURE
        self.cut = cut(B * H, self.T, K, V, narrow=wide or kind == FEATURE)
        self.g, self.like, self.kind = q if g is None else g, state, kind  # without decays that pointer is not read
        exact = "tf32x3" if torch.version.hip is None else "ieee"  # AMD's matrix units have no TF32
        self.options = {
            "K": K, "V": V, "DECAY": kind, "PRECISION": "tf32" if exact == "tf32x3" and not wide else exact,
            "EXACT": exact, "C": self.cut.chunk, "LEVELS": self.cut.chunk.bit_length() - 1, "BK": self.cut.key_tile,
            "BV": self.cut.value_tile, "num_warps": 4, "num_stages": 2,
        }  # fmt: skip

    def states(self, x: Tensor, y: Tensor, first: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """Before (reversed: behind) every chunk, (B H, N, K, V), and the last one."""
        from regard.kernels import _triton_scan as programs

        states = first.new_empty(self.cut.states[0], self.cut.chunks, *first.shape[2:])
        last = torch.empty_like(first)
        programs.run_states[self.cut.states](x, y, self.g, first, states, last, self.T, REVERSE=reverse, **self.options)
        return states, last

    def outputs(
        self, q: Tensor, k: Tensor, x: Tensor, y: Tensor, states: Tensor, *, reverse: bool
    ) -> Float[Tensor, "B H T V"]:
        """From x = q and y = v; reversed dv, from x = k and y = do."""
        from regard.kernels import _triton_scan as programs

        weights, out = states.new_empty(*states.shape[:2], self.cut.chunk, self.cut.chunk), torch.empty_like(y)
        programs.run_weights[self.cut.weights](q, k, self.g, weights, self.T, **self.options)
        programs.run_outputs[self.cut.outputs](
            x, y, self.g, states, weights, out, self.T, REVERSE=reverse, **self.options
        )
        return out

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, states: Tensor, behind: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dg."""
        from regard.kernels import _triton_scan as programs

        parts = {NONE: (0,), TIME: (self.cut.gradients[1], *self.g.shape), FEATURE: (1, *self.g.shape)}[self.kind]
        dq, dk, dg = torch.empty_like(q), torch.empty_like(k), states.new_empty(parts)
        programs.run_gradients[self.cut.gradients](
            q, k, v, self.g, dout, states, behind, dq, dk, dg, self.T, **self.options
        )
        return dq, dk, dg if self.kind == NONE else dg.sum(0)


# --- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("regard::triton_scan", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    if reasons := why_not(q, v):
        raise ValueError(f'linear_scan: form "triton" cannot run: {"; ".join(reasons)}')
    dtype, (q, k, v, g, state) = q.dtype, _readable(q, k, v, g, state)
    run = _Run(q, v, g, state)
    states, last = run.states(k, v, state, reverse=False)
    return run.outputs(q, k, q, v, states, reverse=False).to(dtype), last


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("regard::triton_scan_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, dout: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, (q, k, v, g, state, dout, dlast) = q.dtype, _readable(q, k, v, g, state, dout, dlast)
    run = _Run(q, v, g, state)
    states, _ = run.states(k, v, state, reverse=False)
    behind, dstate = run.states(q, dout, dlast, reverse=True)
    dv = run.outputs(q, k, k, dout, behind, reverse=True)
    dq, dk, dg = run.gradients(q, k, v, dout, states, behind)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dg, dstate


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, dout: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = state.new_empty(0 if g is None else g.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, state.new_empty(state.shape)


def _readable(*tensors: Tensor | None) -> list[Any]:
    """One memory order for all. The interpreter doesn't round to bfloat16, so there it gets float32."""
    given = [z.float() if z is not None and z.dtype == torch.bfloat16 and interpreted() else z for z in tensors]
    return [None if z is None else z.contiguous() for z in given]


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, state = ctx.saved_tensors
    dq, dk, dv, dg, dstate = _backward(q, k, v, g, state, dout, dlast)
    return dq, dk, dv, None if g is None else dg, dstate


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('linear_scan: form "triton" has no second derivatives; expected form="chunked" for them')


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _flops(given: Given) -> tuple[int, int]:
    """Forward and backward of the chunked form on the same shapes."""
    from regard.kernels.linear_scan import linear_scan

    q, k, v, state = (torch.empty_like(given[n], device="meta").requires_grad_() for n in ("q", "k", "v", "state"))
    g = given["g"]
    decay = None if g is None else torch.empty_like(g, device="meta").requires_grad_()
    decay = decay if decay is None or decay.shape[3] > 1 else decay[..., 0]
    with FlopCounterMode(display=False) as counter:
        out, last = linear_scan(q, k, v, decay, state=state)
        forward = counter.get_total_flops()
        torch.autograd.backward([out, last], [torch.empty_like(out), torch.empty_like(last)])
    return forward, counter.get_total_flops() - forward


FORMULAS["regard.triton_scan"] = lambda given: _flops(given)[0]
FORMULAS["regard.triton_scan_backward"] = lambda given: _flops(given)[1]

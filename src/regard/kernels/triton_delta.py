"""The delta rule as Triton kernels for GPUs, forward and backward.

What each token adds, u = b (v - k S'), is all that the delta rule has beyond a linear scan: with u for values, outputs
and the final state are `triton_scan`'s. Here is the kernel for v - k S' (the programs are in `_triton_delta`); backward
solves the transposed system by the same kernel from the end. Everything is in float32, or in float64 for such inputs.

Never run on a GPU yet: tested in Triton's interpreter only, and compiled for CUDA without a device.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels import triton_scan as scan
from regard.kernels.flops import FORMULAS, Given

WIDEST = 256
"""Key features: a state's tile is as tall."""


def why_not(k: Tensor, v: Tensor) -> list[str]:
    """It is for GPUs (or for Triton's interpreter), and keys of 256 features."""
    reasons = scan.why_not(k, v)
    if k.shape[3] > WIDEST:
        reasons.append(f"keys are {k.shape[3]} wide: at most {WIDEST}")
    return reasons


def triton_delta(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    b: Float[Tensor, "B H T 1"],
    g: Float[Tensor, "b H t F"] | None,
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """Outputs and the final state; for inputs that `delta_scan` has checked, all in the state's dtype.

    Raises:
        ValueError: it can't run here (see `why_not`).
    """
    B, H, T, _ = q.shape
    g = None if g is None else g.expand(B, H, T, -1)
    missing = _missing(k, v, b, g, state)
    return scan.triton_scan(q, k, b * missing, g, state)


def _solve(
    k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor, *, reverse: bool
) -> Float[Tensor, "B H T V"]:
    from regard.kernels import _triton_delta as programs
    from regard.kernels import _triton_scan

    run, out = scan._Run(k, v, g, state), torch.empty_like(v)
    cut, options = run.cut, run.options
    heads, C = cut.states[0], cut.chunk
    weights = state.new_empty(heads, cut.chunks, C, C)
    inverse = torch.empty_like(weights)
    _triton_scan.run_weights[cut.weights](k, k, run.g, weights, run.T, **options)
    programs.run_inverse[cut.weights](weights, b, inverse, run.T, REVERSE=reverse, C=C, num_warps=4)
    names = ("K", "V", "DECAY", "EXACT", "C", "BV", "num_warps", "num_stages")
    given = {name: options[name] for name in names} | {"BK": scan._power(k.shape[3]), "REVERSE": reverse}
    programs.run_solve[(heads, cut.outputs[1])](k, v, b, run.g, state, inverse, out, run.T, **given)
    return out


# --- the operators ------------------------------------------------------------------------------------------------


@torch.library.custom_op("regard::triton_delta", mutates_args=())
def _missing(k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
    if reasons := why_not(k, v):
        raise ValueError(f'delta_scan: form "triton" cannot run: {"; ".join(reasons)}')
    return _solve(*scan._readable(k, v, b, g, state), reverse=False)


@_missing.register_fake
def _(k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("regard::triton_delta_backward", mutates_args=())
def _backward(
    k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor, missing: Tensor, dmissing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v, b, g, state, missing, dmissing = scan._readable(k, v, b, g, state, missing, dmissing)
    dv = _solve(k, dmissing, b, g, state, reverse=True)
    added = b * missing
    # What was read is a scan asked by the keys, without each token's own part: e = v - read, so that it is owed -dv.
    dq, dk, dadded, dg, dstate = scan._backward(k, k, added, g, state, -dv, torch.zeros_like(state))
    own = (dv * added).sum(-1, keepdim=True) * k
    dadded = dadded + k.square().sum(-1, keepdim=True) * dv
    return dq + dk + 2 * own, dv, (dadded * missing).sum(-1, keepdim=True), dg, dstate


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor, missing: Tensor, dmissing: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = state.new_empty(0 if g is None else g.shape)
    return k.new_empty(k.shape), v.new_empty(v.shape), b.new_empty(b.shape), dg, state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx: Any, dmissing: Tensor) -> tuple[Tensor | None, ...]:
    dk, dv, db, dg, dstate = _backward(*ctx.saved_tensors, dmissing)
    return dk, dv, db, None if ctx.saved_tensors[3] is None else dg, dstate


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('delta_scan: form "triton" has no second derivatives; expected form="chunked" for them')


_missing.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _flops(given: Given) -> int:
    """Of the products of one solve: keys with keys, with the states, and the inverse with what is missing."""
    (B, H, T, K), V = given["k"].shape, given["v"].shape[3]
    C = scan.cut(B * H, T, K, V, narrow=True).chunk
    return 2 * B * H * T * (C * K + 2 * K * V + C * V + C * C)


FORMULAS["regard.triton_delta"] = _flops
FORMULAS["regard.triton_delta_backward"] = (
    lambda given: _flops(given)
    + scan._flops({"q": given["k"], "k": given["k"], "v": given["v"], "g": given["g"], "state": given["state"]})[1]
)

"""A linear recurrence of each channel by itself, run chunk by chunk.

    h_t = exp(g_t) h_{t-1} + x_t

g_t <= 0 is the logarithm of what is kept. Three forms give the same outputs, final state and gradients: `chunked` goes
through all chunks at once, token by token, and then from chunk to chunk; with sqrt(T) tokens a chunk that is 2 sqrt(T)
steps. `parallel` joins groups of tokens, groups of groups and so on by products of matrices, in one graph for all
lengths, and runs under torch.compile; `step` goes token by token. No product divides by a decay: g = -inf, which
forgets everything, is fine.

Blelloch 1990, "Prefix Sums and Their Applications" (first-order recurrences are associative).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import choice, fits, refuse
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.linear_scan import GROUP
from regard.kernels.linear_scan import _recur as recur
from regard.tracing import as_it_is, autocasts, exporting

WHO = "channel_scan"
FORMS = ("chunked", "parallel", "step", "triton")


class Channels(NamedTuple):
    """What came out, and what the past leaves behind."""

    out: Float[Tensor, "B T C"]
    state: Float[Tensor, "B C"]


def channel_scan(
    x: Float[Tensor, "B T C"],
    decay: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    form: Literal["chunked", "parallel", "step", "triton"] = "chunked",
) -> Channels:
    """h_t from `state` (default zero) to the final state. Several numbers a channel are so many channels: flatten them.

    Sums are accumulated in float32 at least (float64 for float64); `out` has x's dtype, the state keeps the wide one.
    A hidden token passes the state on unchanged with x 0 and decay 0.

    Args:
        decay: logarithms, <= 0, of x's shape.
        starts: True at the first token of each packed document, as in `linear_scan`.
        form: "triton" runs the kernels of `triton_channels`, on CUDA or in Triton's interpreter; only if named.

    Raises:
        ValueError: shapes that don't fit together; a form that can't run here.
    """
    choice(WHO, FORMS, form=form)
    check_channels(WHO, x, decay, state, starts)
    if autocasts(x.device):
        with as_it_is(x.device):
            return channel_scan(x, decay, state=state, starts=starts, form=form)
    wide = torch.promote_types(x.dtype, torch.float32)
    B, T, C = x.shape
    y, g = x.to(wide), decay.to(wide)
    if starts is not None:
        g = torch.where(starts[..., None], -torch.inf, g)
    state = y.new_zeros(B, C) if state is None else state.to(wide)
    if T == 0:
        return Channels(x.clone(), state.clone())
    if form == "triton":
        from regard.kernels.triton_channels import triton_channels

        out, state = triton_channels(y, g, state)
        return Channels(out.to(x.dtype), state)
    if T == 1 or form == "step":
        outs = []
        for t in range(T):
            state = g[:, t].exp() * state + y[:, t]
            outs.append(state)
        return Channels(torch.stack(outs, 1).to(x.dtype), state)
    if form == "chunked" and not torch.compiler.is_compiling():
        out, state = _chunked(y, g, state)
        return Channels(out.to(x.dtype), state)
    # The state is one more token before the others.
    rows = torch.cat([state[:, None], y], 1)
    kept = torch.cat([torch.zeros_like(g[:, :1]), g], 1)
    if torch.compiler.is_compiling() and not exporting():
        # Never one group, nor two, of which all but one is one: torch would make a graph for these lengths alone.
        rows, kept = (F.pad(z, (0, 0, 0, 2 * GROUP)) for z in (rows, kept))
    out = recur(rows.mT[:, None, :, :, None], kept.mT[:, None])[:, 0, :, 1 : T + 1, 0].mT
    return Channels(out.to(x.dtype), out[:, -1])


def _chunked(y: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A last chunk that is filled up adds and forgets nothing."""
    T = y.shape[1]
    y, g = (in_blocks(z, math.isqrt(T), 1) for z in (y, g))
    keep, h, inner, before = g.exp(), torch.zeros_like(y[:, :, 0]), [], []
    for t in range(y.shape[2]):
        h = torch.addcmul(y[:, :, t], keep[:, :, t], h)
        inner.append(h)
    passed = g.cumsum(2).exp()
    for n in range(y.shape[1]):
        before.append(state)
        state = torch.addcmul(h[:, n], passed[:, n, -1], state)
    out = torch.addcmul(torch.stack(inner, 2), passed, torch.stack(before, 1)[:, :, None])
    return from_blocks(out, T, 1), state


def check_channels(who: str, x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None) -> None:
    """Refuse what no scan of channels can take."""
    if x.dim() != 3 or not x.dtype.is_floating_point:
        got = f"{x.dtype} {tuple(x.shape)}"
        refuse(who, "x", "has the wrong shape or dtype", got, "floats (batch, tokens, channels)")
    if decay.shape != x.shape or not decay.dtype.is_floating_point:
        got = f"{decay.dtype} {tuple(decay.shape)}"
        refuse(who, "decay", "does not fit x", got, f"floats of shape {tuple(x.shape)}")
    devices = {z.device for z in (x, decay, state, starts) if z is not None}
    if len(devices) > 1:
        refuse(who, "tensors", "are on different devices", ", ".join(sorted(map(str, devices))), "one; move them")
    B, T, C = x.shape
    if state is not None:
        fits(who, "B C", {"B": B, "C": C}, state=state)
    if starts is not None and (starts.dtype != torch.bool or tuple(starts.shape) not in ((1, T), (B, T))):
        got = f"{starts.dtype} {tuple(starts.shape)}"
        refuse(who, "starts", "does not fit x", got, f"bool {(B, T)} or {(1, T)}, True where a document starts")

"""The Triton programs behind `triton_channels`: one for each batch row and block of channels, token after token."""

import triton
import triton.language as tl


@triton.jit
def run_channels(x, decay, first, out, T, C: tl.constexpr, BLOCK: tl.constexpr):
    """h_t = exp(g_t) h_t-1 + x_t."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * T * C + c, c < C
    h = tl.load(first + row * C + c, mask=inside, other=0.0)
    for t in range(T):
        keep = tl.exp(tl.load(decay + at + t * C, mask=inside, other=0.0))
        h = keep * h + tl.load(x + at + t * C, mask=inside, other=0.0)
        tl.store(out + at + t * C, h, mask=inside)


@triton.jit
def run_channels_backward(decay, first, out, dout, dx, ddecay, dfirst, T, C: tl.constexpr, BLOCK: tl.constexpr):
    """dx_t = do_t + exp(g_t+1) dx_t+1 and dg_t = dx_t exp(g_t) h_t-1, from the end."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = row * T * C + c, c < C
    owed = tl.zeros((BLOCK,), dx.dtype.element_ty)
    start = tl.load(first + row * C + c, mask=inside, other=0.0)
    for m in range(T):
        t = T - 1 - m
        owed += tl.load(dout + at + t * C, mask=inside, other=0.0)
        tl.store(dx + at + t * C, owed, mask=inside)
        owed *= tl.exp(tl.load(decay + at + t * C, mask=inside, other=0.0))
        before = tl.load(out + at + (t - 1) * C, mask=inside & (t > 0), other=0.0)
        tl.store(ddecay + at + t * C, owed * tl.where(t > 0, before, start), mask=inside)
    tl.store(dfirst + row * C + c, owed, mask=inside)

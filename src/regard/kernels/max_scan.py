"""The running maximum of what fades, each channel by itself: by how much sums of exponentials are scaled.

    m_t = max(m_{t-1} + g_t, x_t)

g_t <= 0. Where numbers exp(x_j) are summed with decays exp(g), the largest is exp(m_t): sums of exp(x_j - m_t) neither
overflow nor vanish. The forms are those of `channel_scan`, with a maximum in place of its sum.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import choice
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.channel_scan import Channels, check_channels
from regard.kernels.linear_scan import GROUP
from regard.kernels.linear_scan import _between as between
from regard.tracing import exporting

WHO = "max_scan"
FORMS = ("chunked", "parallel", "step")
EMPTY = -1e38
"""The maximum of nothing: finite, so that no difference of two is NaN."""


def max_scan(
    x: Float[Tensor, "B T C"],
    decay: Float[Tensor, "B T C"],
    *,
    state: Float[Tensor, "B C"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    form: Literal["chunked", "parallel", "step"] = "chunked",
) -> Channels:
    """m_t from `state` (default EMPTY) to the last m, in at least float32, both.

    A hidden token passes the state on with x EMPTY and decay 0.

    Args:
        decay: numbers <= 0, of x's shape.
        starts: True at the first token of each packed document, which has no m before it.

    Raises:
        ValueError: shapes that don't fit together.
    """
    choice(WHO, FORMS, form=form)
    check_channels(WHO, x, decay, state, starts)
    wide = torch.promote_types(x.dtype, torch.float32)
    B, T, C = x.shape
    x, g = x.to(wide), decay.to(wide)
    if starts is not None:
        g = torch.where(starts[..., None], -torch.inf, g)
    state = x.new_full((B, C), EMPTY) if state is None else state.to(wide)
    if T == 0:
        return Channels(x.clone(), state.clone())
    if T == 1 or form == "step":
        outs = []
        for t in range(T):
            state = torch.maximum(state + g[:, t], x[:, t])
            outs.append(state)
        return Channels(torch.stack(outs, 1), state)
    if form == "chunked" and not torch.compiler.is_compiling():
        out = _chunked(x, g, state)
        return Channels(out, out[:, -1])
    # The state is one more token before the others, as in `channel_scan`.
    rows, kept = torch.cat([state[:, None], x], 1), torch.cat([torch.zeros_like(g[:, :1]), g], 1)
    if torch.compiler.is_compiling() and not exporting():
        rows, kept = (F.pad(z, (0, 0, 0, 2 * GROUP)) for z in (rows, kept))
    out = _grouped(rows.mT, kept.mT)[..., 1 : T + 1].mT
    return Channels(out, out[:, -1])


def _chunked(x: Tensor, g: Tensor, state: Tensor) -> Tensor:
    """Through all chunks at once, token by token, and then from chunk to chunk."""
    T = x.shape[1]
    x, g = (in_blocks(z, math.isqrt(T), 1) for z in (x, g))
    m, inner, before = x[:, :, 0], [x[:, :, 0]], []
    for t in range(1, x.shape[2]):
        m = torch.maximum(m + g[:, :, t], x[:, :, t])
        inner.append(m)
    passed = g.cumsum(2)
    for n in range(x.shape[1]):
        before.append(state)
        state = torch.maximum(m[:, n], passed[:, n, -1] + state)
    return from_blocks(torch.maximum(torch.stack(inner, 2), passed + torch.stack(before, 1)[:, :, None]), T, 1)


def _grouped(x: Float[Tensor, "*b n"], g: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """By groups, groups of groups and so on."""
    n = x.shape[-1]
    if exporting() or n <= GROUP:
        return (between(g) + x[..., None, :]).amax(-1)
    groups = -(-n // GROUP)
    x, g = (F.pad(z, (0, groups * GROUP - n)).unflatten(-1, (groups, GROUP)) for z in (x, g))
    local = (between(g) + x[..., None, :]).amax(-1)
    ends = _grouped(local[..., -1], g.sum(-1))
    earlier = F.pad(ends[..., :-1], (1, 0), value=EMPTY).unsqueeze(-1)
    return torch.maximum(local, g.cumsum(-1) + earlier).flatten(-2)[..., :n]

"""Linear attention whose memory fades value by value, run chunk by chunk.

    S_t = S_{t-1} diag(exp(g_t)) + k_t^T v_t          o_t = q_t S_t

g_t <= 0 is one number a head, time and value. In `linear_scan` rows fade, which queries sum over; here it is columns,
of which each has an output of its own: sum_{j<=t} (q_t . k_j) exp(g_{j+1} + .. + g_t) v_j. Exponents are sums of g over
a stretch of tokens there as here, and nothing is divided by a decay.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import choice, fits
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.linear_scan import CHUNK, Scan, by_segments, check_scan, forgetting
from regard.kernels.linear_scan import _prefix as prefix
from regard.kernels.linear_scan import _until_end as until_end
from regard.tracing import as_it_is, autocasts

WHO = "column_scan"
FORMS = ("chunked", "step")


def column_scan(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    decay: Float[Tensor, "B H T V"],
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    form: Literal["chunked", "step"] = "chunked",
    chunk: int = CHUNK,
) -> Scan:
    """o_t from `state` (default zero) to the final state, summed in float32 at least, as in `linear_scan`.

    Args:
        decay: logarithms, <= 0, of v's shape.
        starts: True at the first token of each packed document.
        chunk: tokens a chunk, in the chunked form.

    Raises:
        ValueError: shapes that don't fit together.
    """
    choice(WHO, FORMS, form=form)
    check_scan(WHO, q, k, v, None, state, starts, chunk)
    fits(WHO, "B H T V", dict(zip("BHTV", v.shape)), decay=decay)
    if autocasts(q.device):
        with as_it_is(q.device):
            return column_scan(q, k, v, decay, state=state, starts=starts, form=form, chunk=chunk)
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    (B, H, T, K), V = q.shape, v.shape[3]
    q, k, v, g = (z.to(wide) for z in (q, k, v, decay))
    if starts is not None:
        g = forgetting(g, starts)
    state = q.new_zeros(B, H, K, V) if state is None else state.to(wide)
    if T == 0:
        return Scan((q @ state).to(dtype), state.clone())
    if T > 1 and form == "chunked":
        out, state = by_segments(_chunked, (q, k, v), g, state, chunk)
        return Scan(out.to(dtype), state)
    outs = []
    for t in range(T):
        state = g[:, :, t, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return Scan(torch.cat(outs, 2).to(dtype), state)


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """A last chunk that is filled up adds nothing and keeps everything."""
    T = q.shape[2]
    C = chunk if torch.compiler.is_compiling() else min(chunk, T)
    q, k, v, g = (in_blocks(z, C, 2) for z in (q, k, v, g))
    added = k.mT @ (v * until_end(g).exp())
    states = prefix(torch.cat([state.unsqueeze(2), added], 2).mT, g.sum(3)).mT
    out = _inside(q @ k.mT, v, g) + g.cumsum(3).exp() * (q @ states[:, :, :-1])
    return from_blocks(out, T, 2), states[:, :, -1]


def _inside(
    scores: Float[Tensor, "*b n n"], v: Float[Tensor, "*b n V"], g: Float[Tensor, "*b n V"]
) -> Float[Tensor, "*b n V"]:
    """sum_{j<=i} scores_ij exp(g_{j+1} + .. + g_i) v_j.

    Between an earlier and a later half the decay has two factors that meet at the middle, each <= 1; the halves
    themselves are halved again.
    """
    n = v.shape[-2]
    if n == 1:
        return scores * v
    odd = n % 2
    scores = F.pad(scores, (0, odd, 0, odd)).unflatten(-1, (2, -1)).unflatten(-3, (2, -1))
    v, g = (F.pad(z, (0, 0, 0, odd)).unflatten(-2, (2, -1)) for z in (v, g))
    both = torch.stack([scores[..., half, :, half, :] for half in (0, 1)], -3)
    upper, lower = _inside(both, v, g).unbind(-3)
    (early, late), first = g.unbind(-3), v.select(-3, 0)
    cross = late.cumsum(-2).exp() * (scores[..., 1, :, 0, :] @ (first * until_end(early).exp()))
    return torch.cat([upper, lower + cross], -2)[..., :n, :]

"""The delta rule as a recurrence over one matrix per head, run chunk by chunk: what is written replaces what was there.

    S' = exp(g_t) S_{t-1}          S_t = S' + b_t k_t^T (v_t - k_t S')          o_t = q_t S_t

b_t, the rate of writing, is one number per head and time; g_t <= 0, the logarithm of what is kept, none (keep all), one
number per head and time, or one per head, time and key feature. With c the sums of g since the chunk began, and S the
state before it,

    A_ij = k_i exp(c_i - c_j) . k_j  (j < i)        R = (I + diag(b) A)^-1 diag(b)
    N = R (V - (K exp(c)) S)                        what each token adds
    O = (Q exp(c)) S + (q_i exp(c_i - c_j) . k_j, j <= i) N
    S_end = exp(c_n) S + (K exp(c_n - c))^T N

Three forms give the same outputs, final state and gradients: `chunked` is linear in T, `parallel` is one chunk of all
tokens, `step` goes token by token. As in `linear_scan`, no product ever divides by a decay, and g = -inf is fine.

Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", and Yang, Kautz,
Hatamizadeh 2024, "Gated Delta Networks", as quoted by others (the products of a chunk); Schlag et al. 2021 (the rule).
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import choice, refuse
from regard.kernels.blocks import from_blocks, in_blocks
from regard.kernels.linear_scan import (
    CHUNK,
    Scan,
    _between,
    _common,
    _per_feature,
    _until_end,
    by_segments,
    check_scan,
    forgetting,
)
from regard.tracing import as_it_is, autocasts, exporting

WHO = "delta_scan"
FORMS = ("chunked", "parallel", "step", "triton")


def delta_scan(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    decay: Float[Tensor, " H"] | Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    form: Literal["chunked", "parallel", "step", "triton"] = "chunked",
    chunk: int = CHUNK,
) -> Scan:
    """o_t = q_t S_t from `state` (default zero) to the final state. Nothing is scaled, and keys are taken as they come.

    Sums are accumulated in float32 at least (float64 for float64); `out` has q's dtype, the state keeps the wide one.
    A hidden token passes the state on unchanged with beta 0 and decay 0.

    Args:
        beta: between 0 and 2 for keys of length 1, where the state can't grow, as I - beta k^T k has an eigenvalue
            1 - beta.
        decay: logarithms, <= 0.
        starts: True at the first token of each packed document, as in `linear_scan`.
        form: "triton" runs the kernels of `triton_delta`, on a CUDA device or in Triton's interpreter; only if named.
        chunk: tokens a chunk, in the chunked form.

    Raises:
        ValueError: shapes that don't fit together; a form that can't run here.
    """
    choice(WHO, FORMS, form=form)
    check_scan(WHO, q, k, v, decay, state, starts, chunk)
    if beta.shape != q.shape[:3] or beta.device != q.device:
        got = f"{tuple(beta.shape)} on {beta.device}"
        refuse(WHO, "beta", "does not fit q", got, f"{tuple(q.shape[:3])} on {q.device}")
    if autocasts(q.device):
        with as_it_is(q.device):
            return delta_scan(q, k, v, beta, decay, state=state, starts=starts, form=form, chunk=chunk)
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, H, T, K), V = q.shape, v.shape[3]
    g = None if decay is None else decay.to(wide).reshape(_common(decay))
    if starts is not None:
        g = forgetting(q.new_zeros(1, 1, 1, 1, dtype=wide) if g is None else g, starts)
    state = q.new_zeros(B, H, K, V, dtype=wide) if state is None else state.to(wide)
    dtype, (q, k, v) = q.dtype, (z.to(wide) for z in (q, k, v))
    if T == 0:
        return Scan((q @ state).to(dtype), state.clone())
    b = beta.to(wide)[..., None]
    if form == "triton":
        from regard.kernels.triton_delta import triton_delta

        out, state = triton_delta(q, k, v, b, g, state)
    elif T == 1 or form == "step":
        out, state = _step(q, k, v, b, g, state)
    else:
        given = q, k, v, b
        if form == "parallel":
            out, state = _chunked(*given, g, state, T)
        else:
            out, state = by_segments(_chunked, given, g, state, chunk)
    return Scan(out.to(dtype), state)


def _step(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    keep = None if g is None else g.expand(-1, -1, q.shape[2], -1).exp()
    outs = []
    for t in range(q.shape[2]):
        kept, key = state if keep is None else keep[:, :, t, :, None] * state, k[:, :, t, None]
        state = kept + key.mT * (b[:, :, t, None] * (v[:, :, t, None] - key @ kept))
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, state: Tensor, C: int
) -> tuple[Tensor, Tensor]:
    """What needs no state at once, then chunk after chunk. A last one that is filled up adds and forgets nothing."""
    T = q.shape[2]
    C = C if torch.compiler.is_compiling() else min(C, T)  # one graph for all short lengths
    q, k, v, b = (in_blocks(z, C, 2) for z in (q, k, v, b))
    if g is None:
        alike, weights, since_start, asking, by_end, keep = (k @ k.mT), (q @ k.mT).tril(), k, q, k, None
    else:
        g = in_blocks(g.expand(-1, -1, T, -1), C, 2)
        if g.shape[4] > 1:
            alike, weights = _per_feature(torch.stack([k, q]), k, g).unbind(0)
        else:
            between = _between(g[..., 0]).exp()
            alike, weights = (k @ k.mT) * between, (q @ k.mT) * between
        passed = g.cumsum(3).exp()
        since_start, asking, by_end, keep = k * passed, q * passed, k * _until_end(g).exp(), passed[..., -1, :, None]
    both = torch.cat([b * v, b * since_start], -1)
    new, reads = _solved(b * alike.tril(-1), both).split((v.shape[-1], k.shape[-1]), -1)
    if exporting():
        before, state = all_states(new, reads, by_end, keep, state)
        added = new - reads @ before
        return from_blocks(asking @ before + weights @ added, T, 2), state
    outs = []
    for n in range(q.shape[2]):
        added = new[:, :, n] - reads[:, :, n] @ state
        outs.append(asking[:, :, n] @ state + weights[:, :, n] @ added)
        kept = state if keep is None else keep[:, :, n] * state
        state = kept + by_end[:, :, n].mT @ added
    return from_blocks(torch.stack(outs, 2), T, 2), state


def _solved(lower: Float[Tensor, "*b n n"], right: Float[Tensor, "*b n m"]) -> Float[Tensor, "*b n m"]:
    """(I + lower)^-1 right; what stands on and above the diagonal is not read."""
    work = torch.float32 if right.dtype.itemsize < 4 else right.dtype  # torch solves nothing narrower
    return torch.linalg.solve_triangular(lower.to(work), right.to(work), upper=False, unitriangular=True).to(
        right.dtype
    )


def all_states(
    new: Tensor, reads: Tensor, by_end: Tensor, keep: Tensor | None, state: Float[Tensor, "B H K V"]
) -> tuple[Float[Tensor, "B H N K V"], Float[Tensor, "B H K V"]]:
    """The states before each chunk, and the last one, in one graph for any number of chunks.

    S_{n+1} = M_n S_n + P_n for all n is one triangular system of N K rows: I on its diagonal, -M_n below.
    """
    N, K = reads.shape[2], reads.shape[4]
    kept = torch.eye(K, dtype=new.dtype, device=new.device) * (1.0 if keep is None else keep)
    passes, adds = kept - by_end.mT @ reads, by_end.mT @ new
    first = torch.cat([state.unsqueeze(2), torch.zeros_like(adds)], 2)[:, :, :-1]
    adds = adds + passes @ first
    at = torch.arange(N, device=new.device)
    below = (at[:, None] == at + 1)[:, None, :, None]
    lower = torch.where(below, -passes.unsqueeze(-2), 0.0).flatten(-2).flatten(2, 3)
    after = _solved(lower, adds.flatten(2, 3)).unflatten(2, (-1, K))
    return torch.cat([state.unsqueeze(2), after[:, :, :-1]], 2), after[:, :, -1]

"""Causal linear attention as a recurrence over one matrix per head, run chunk by chunk.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = q_t S_t

g_t <= 0 is the logarithm of what is kept: none (keep all), one number per head, one per head and time, or one per head,
time and key feature. Three forms give the same outputs, final state and gradients:

    parallel   O = (Q K^T * A) V,  A_ij = exp(g_{j+1} + .. + g_i) for j <= i         T x T, the reference
    step       the recurrence, token by token                                        for decoding
    chunked    the parallel form inside a chunk, the recurrence between chunks       linear in T, in training too

Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236, as quoted by others (the recurrence); Qin et al.
2024, https://arxiv.org/abs/2405.17381, abstract (products inside blocks, the state between them); Yang et al. 2023,
https://arxiv.org/abs/2312.06635, abstract (decays per feature). No product ever divides by a decay: all exponents are
sums of g over a stretch of tokens, so they are <= 0, and g = -inf (forget everything) is fine. A normaliser
sum_j w_ij is one more column of v, full of ones.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import choice, fits, refuse, whole
from regard.kernels.blocks import from_blocks, in_blocks
from regard.tracing import as_it_is, autocasts, exporting

CHUNK = 64
"""Tokens a chunk, by `python -m benchmarks.scan_chunks`: over 16 to 256, widths 16 to 128, all decays, with and without
backward, 64 took 1.06 times the best size's time on average (at most 1.44, at K = V = 128), 32 and 128 took 1.3."""
NUMBERS = 2**20
"""Of keys and values together that are worked on at once: longer sequences go on from segment to segment. With 8 heads
of 64 at T = 32k, whole sequences took 2.7 to 4 times as long as segments of 512 to 1024 tokens on an AMD EPYC."""
GROUP = 16
"""How many chunk states are joined by one matrix product."""

WHO = "linear_scan"
FORMS = ("chunked", "parallel", "step", "triton")


class Scan(NamedTuple):
    """What came out, and all that the past leaves behind."""

    out: Float[Tensor, "B H T V"]
    state: Float[Tensor, "B H K V"]


def linear_scan(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    decay: Float[Tensor, " H"] | Float[Tensor, "B H T"] | Float[Tensor, "B H T K"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    starts: Bool[Tensor, "#B T"] | None = None,
    form: Literal["chunked", "parallel", "step", "triton"] = "chunked",
    chunk: int = CHUNK,
) -> Scan:
    """out_t = q_t S_t with S_t = exp(decay_t) S_{t-1} + k_t^T v_t, from `state` (default zero) to the final state.

    Sums are accumulated in float32 at least (float64 for float64); `out` has q's dtype, the state keeps the wide one.

    Args:
        decay: logarithms, <= 0.
        starts: True at the first token of each packed document, as `masks.packed(...).places(T) == 0` says: what came
            before is forgotten there, `state` included where the first token starts one, and without gradient. The
            final state is that of the last document.
        form: "triton" runs the kernels of `triton_scan`, on a CUDA device or in Triton's interpreter; only if named.
        chunk: tokens a chunk, in the chunked form.

    Raises:
        ValueError: shapes that don't fit together; a form that can't run here.
    """
    choice(WHO, FORMS, form=form)
    check_scan(WHO, q, k, v, decay, state, starts, chunk)
    if autocasts(q.device):
        with as_it_is(q.device):
            return linear_scan(q, k, v, decay, state=state, starts=starts, form=form, chunk=chunk)
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, H, T, K), V = q.shape, v.shape[3]
    g = None if decay is None else decay.to(wide).reshape(_common(decay))
    if starts is not None:
        g = forgetting(q.new_zeros(1, 1, 1, 1, dtype=wide) if g is None else g, starts)
    state = q.new_zeros(B, H, K, V, dtype=wide) if state is None else state.to(wide)
    if form == "triton":
        from regard.kernels.triton_scan import triton_scan

        return Scan(*triton_scan(q, k, v, g, state))
    dtype, (q, k, v) = q.dtype, (z.to(wide) for z in (q, k, v))
    if T == 0:
        return Scan((q @ state).to(dtype), state.clone())
    if T == 1 or form == "step":
        out, state = _step(q, k, v, g, state)
    elif form == "parallel":
        out, state = _parallel(q, k, v, g, state)
    else:
        out, state = by_segments(_chunked, (q, k, v), g, state, chunk)
    return Scan(out.to(dtype), state)


def by_segments(
    scan: Callable[..., tuple[Tensor, Tensor]],
    given: Sequence[Float[Tensor, "B H T _"]],
    g: Float[Tensor, "b H t F"] | None,
    state: Float[Tensor, "B H K V"],
    chunk: int,
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """A scan by chunks, `scan(*given, g, state, chunk)`, over segments of whole chunks that fit into a cache."""
    T, numbers = given[0].shape[2], sum(z.shape[0] * z.shape[1] * z.shape[3] for z in given[1:])
    n = max(1, NUMBERS // max(1, numbers * chunk)) * chunk
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or n >= T:
        return scan(*given, g, state, chunk)
    outs = []
    decays = [g] * -(-T // n) if g is None or g.shape[2] == 1 else g.split(n, 2)
    for *parts, decay in zip(*(z.split(n, 2) for z in given), decays, strict=True):  # whose backward is one copy
        out, state = scan(*parts, decay, state, chunk)
        outs.append(out)
    return torch.cat(outs, 2), state


def _common(decay: Tensor) -> tuple[int, ...]:
    """Every form of decay as (1 or B, H, 1 or T, 1 or K)."""
    return (1, len(decay), 1, 1) if decay.dim() == 1 else (*decay.shape, 1)[:4]


def forgetting(g: Float[Tensor, "b H t F"], starts: Bool[Tensor, "#B T"]) -> Float[Tensor, "B H T F"]:
    """Logarithms of decays with -inf, nothing kept, where a document starts: all that any scan with decays needs."""
    return torch.where(starts[:, None, :, None], -torch.inf, g)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    keep = None if g is None else g.expand(-1, -1, q.shape[2], -1).exp()
    outs = []
    for t in range(q.shape[2]):
        kept = state if keep is None else keep[:, :, t, :, None] * state
        state = kept + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2), state


def _parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    if g is None:
        return (q @ k.mT).tril() @ v + q @ state, state + k.mT @ v
    g = g.expand(-1, -1, q.shape[2], -1)
    if g.shape[3] == 1:
        weights = (q @ k.mT) * _between(g[..., 0]).exp()
    else:
        weights = torch.einsum("bhik,bhjk,bhkij->bhij", q, k, _between(g.mT).exp())
    out = weights @ v + (q * g.cumsum(2).exp()) @ state
    return out, g.sum(2)[..., None].exp() * state + (k * _until_end(g).exp()).mT @ v


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    T = q.shape[2]
    C = chunk if torch.compiler.is_compiling() else min(chunk, T)  # one graph for all short lengths
    # A chunk that is filled up adds nothing and, where the decays were cut too, keeps everything.
    if g is not None and g.shape[2] == 1 and not exporting():
        g = g.expand(-1, -1, C, -1).unsqueeze(2)
    elif g is not None:
        g = in_blocks(g.expand(-1, -1, T, -1), C, 2)
    q, k, v = (in_blocks(z, C, 2) for z in (q, k, v))
    per_feature = g is not None and g.shape[4] > 1
    if g is None:
        weights = (q @ k.mT).tril()
        by_end, since_start = k, q
    else:
        weights = _per_feature(q, k, g) if per_feature else (q @ k.mT) * _between(g[..., 0]).exp()
        by_end, since_start = k * _until_end(g).exp(), q * g.cumsum(3).exp()
    added = by_end.mT @ v
    keeps = (q.new_zeros(1, 1, 1, 1) if g is None else g.sum(3)).expand(-1, -1, q.shape[2], -1)
    if exporting():  # all chunks are alike, and what stands after the last is the final state
        states = _prefix(torch.cat([state.unsqueeze(2), added], 2), keeps)
        return from_blocks(weights @ v + since_start @ states[:, :, :-1], T, 2), states[:, :, -1]
    before = _prefix(torch.cat([state.unsqueeze(2), added[:, :, :-1]], 2), keeps[:, :, :-1])
    out = from_blocks(weights @ v + since_start @ before, T, 2)
    rest = (T - 1) % C + 1  # tokens of the last chunk
    last, k, v = before[:, :, -1], k[:, :, -1, :rest], v[:, :, -1, :rest]
    if g is None:
        return out, last + k.mT @ v
    g = g[:, :, -1, :rest]
    return out, g.sum(2)[..., None].exp() * last + (k * _until_end(g).exp()).mT @ v


def _between(g: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n n"]:
    """Entry i, j is g_{j+1} + .. + g_i: what stands between a key and a later query; -inf for keys later than that.

    Summed, not subtracted from running totals: those would lose digits, and make -inf - -inf.
    """
    n = g.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=g.device).tril(-1)
    summed = torch.where(later, g.unsqueeze(-1), 0.0).cumsum(-2)
    return summed.masked_fill(later.mT, -torch.inf)


def _until_end(g: Float[Tensor, "*b n F"]) -> Float[Tensor, "*b n F"]:
    """g_{i+1} + .. + g_n."""
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _per_feature(
    q: Float[Tensor, "*b n K"], k: Float[Tensor, "*b n K"], g: Float[Tensor, "*b n K"]
) -> Float[Tensor, "*b n n"]:
    """sum_d q_id k_jd exp(g_{j+1,d} + .. + g_id) for j <= i, else 0.

    Between an earlier and a later half the decay has two factors that meet at the middle, each <= 1, so that it is one
    matrix product; the halves themselves are halved again. Work is n log n, where all pairs would be n^2 K.
    """
    n = q.shape[-2]
    if n == 1:
        return (q * k).sum(-1, keepdim=True)
    if n % 2:  # F.pad copies even where it adds nothing
        q, k, g = (F.pad(z, (0, 0, 0, 1)) for z in (q, k, g))
    q, k, g = (z.unflatten(-2, (2, -1)) for z in (q, k, g))
    inner = _per_feature(q, k, g)
    early, late = g.unbind(-3)
    cross = (q.select(-3, 1) * late.cumsum(-2).exp()) @ (k.select(-3, 0) * _until_end(early).exp()).mT
    upper, lower = inner.unbind(-3)
    whole = torch.cat([F.pad(upper, (0, upper.shape[-1])), torch.cat([cross, lower], -1)], -2)
    return whole[..., :n, :n]


def _prefix(x: Float[Tensor, "B H N K V"], g: Float[Tensor, "b h N_1 F"]) -> Float[Tensor, "B H N K V"]:
    """S_n = exp(g_{n-1}) S_{n-1} + x_n: the states between chunks, from the first one and what each chunk adds."""
    B, H, N, K, V = x.shape
    g = F.pad(g, (0, 0, 1, 0)).mT
    decays = g.shape[2]
    by_decay = x.reshape(B, H, N, decays, K // decays * V).transpose(2, 3)
    return _recur(by_decay, g).transpose(2, 3).reshape(B, H, N, K, V)


def _recur(x: Float[Tensor, "B H F n R"], g: Float[Tensor, "b h F n"]) -> Float[Tensor, "B H F n R"]:
    """y_n = exp(g_n) y_{n-1} + x_n, by groups, groups of groups and so on: a few products, whatever n is."""
    n = x.shape[3]
    if exporting() or n <= GROUP:  # groups would be counted, and their number held for good
        return _between(g).exp() @ x
    groups = -(-n // GROUP)
    short = groups * GROUP - n
    x = F.pad(x, (0, 0, 0, short)).unflatten(3, (groups, GROUP))
    g = F.pad(g, (0, short)).unflatten(3, (groups, GROUP))
    local = _between(g).exp() @ x
    ends = _recur(local[..., -1, :], g.sum(-1))
    earlier = F.pad(ends[..., :-1, :], (0, 0, 1, 0)).unsqueeze(-2)
    return (local + g.cumsum(-1).exp().unsqueeze(-1) * earlier).flatten(3, 4)[..., :n, :]


def check_scan(
    who: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    chunk: int,
) -> None:
    """Refuse what no scan can take."""
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        got = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        wanted = "(batch, heads, tokens, K) twice and (batch, heads, tokens, V); repeat grouped keys and values first"
        refuse(who, "q, k and v", "have the wrong shapes", got, wanted)
    if not q.dtype.is_floating_point or {k.dtype, v.dtype} != {q.dtype}:
        got = f"{q.dtype}, {k.dtype} and {v.dtype}"
        refuse(who, "q, k and v", "have the wrong dtypes", got, "one floating point dtype; cast them", error=TypeError)
    devices = {z.device for z in (q, k, v, decay, state, starts) if z is not None}
    if len(devices) > 1:
        refuse(who, "tensors", "are on different devices", ", ".join(sorted(map(str, devices))), "one; move them")
    B, H, T, K = q.shape
    shapes = ((H,), (B, H, T), (B, H, T, K))
    if decay is not None and tuple(decay.shape) not in shapes:
        refuse(who, "decay", "has the wrong shape", tuple(decay.shape), f"one of {shapes}")
    if state is not None:
        fits(who, "B H K V", {"B": B, "H": H, "K": K, "V": v.shape[3]}, state=state)
    if starts is not None and (starts.dtype != torch.bool or tuple(starts.shape) not in ((1, T), (B, T))):
        got = f"{starts.dtype} {tuple(starts.shape)}"
        refuse(who, "starts", "does not fit q", got, f"bool {(B, T)} or {(1, T)}, True where a document starts")
    whole(who, chunk=chunk)

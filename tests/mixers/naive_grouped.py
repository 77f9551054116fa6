"""Grouped attention, one number at a time, by somebody who saw the equations only; strided and local attention."""

import math

import torch

from naive import linear, may, softmax


def pe(p, M):
    """Sinusoids of one position, sin at even and cos at odd features (equation 6)."""
    return torch.tensor(
        [f(p / 10000.0 ** (2 * i / M)) for i in range(M // 2) for f in (math.sin, math.cos)], dtype=torch.float64
    )


def position(D, r, g, causal):
    """Frame position of part r of the group difference D = i - j (equation 6)."""
    if causal:
        return g * D + g - 1 - r
    if g % 2:
        return g * D + (g - 1) // 2 - r
    p = g * D + g // 2 - 1 - r
    # "When that is >= 0" is read as a rule on p, not on D: position 0 stands twice in the table.
    return p if p >= 0 else g * D + g // 2 - r


def grouped(x, Wq, bq, Wk, bk, Wv, bv, Wo, bo, *, heads, group=3, allowed=None, causal=False, rel=None, context=None):
    """x (B, T, M) -> (B, T, M). allowed (T, S) or (B, T, S), True = frame may see frame; only [::g, ::g] of it counts.
    causal: also group j <= i, and the causal alignment of positions. rel = (u (M), w (M), Wp (M, M), bp (M)) or None.
    context (B, S, M) for cross attention (without rel). A group that may see nothing gives 0."""
    B, T, M = x.shape
    g, c = group, x if context is None else context
    S = c.shape[1]
    N, L, d = -(-T // g), -(-S // g), g * M // heads
    zero = x.new_zeros(M)
    out = []
    for b in range(B):
        q = [linear(x[b, t], Wq, bq) if t < T else zero for t in range(N * g)]
        k = [linear(c[b, t], Wk, bk) if t < S else zero for t in range(L * g)]
        v = [linear(c[b, t], Wv, bv) if t < S else zero for t in range(L * g)]
        frames = []
        for i in range(N):
            qi = torch.cat(q[i * g : i * g + g])
            seen = [j for j in range(L) if may(allowed, b, i * g, j * g) and not (causal and j > i)]
            parts = []
            for h in range(heads):
                s = slice(h * d, (h + 1) * d)
                if not seen:
                    parts.append(x.new_zeros(d))
                    continue
                z = []
                for j in seen:
                    kj = torch.cat(k[j * g : j * g + g])
                    if rel is None:
                        a = (qi[s] * kj[s]).sum()
                    else:
                        u, w, Wp, bp = rel
                        e = torch.cat([linear(pe(position(i - j, r, g, causal), M), Wp, bp) for r in range(g)])
                        a = ((qi + u.repeat(g))[s] * kj[s]).sum() + ((qi + w.repeat(g))[s] * e[s]).sum()
                    z.append(a / d**0.5)
                p = softmax(z)
                parts.append(sum(p[n] * torch.cat(v[j * g : j * g + g])[s] for n, j in enumerate(seen)))
            o = torch.cat(parts)
            frames += [o[r * M : (r + 1) * M] for r in range(g)]
        out.append(torch.stack([linear(frames[t], Wo, bo) for t in range(T)]))
    return torch.stack(out)


def strided(x, Wq, bq, Wk, bk, Wv, bv, Wo, bo, *, heads, stride, allowed=None):
    """Queries at frames 0, s, 2s, ..; keys at all frames; allowed at frame rate, rows taken at ::s. No positions
    (the relative form is left out)."""
    rows = range(0, x.shape[1], stride)
    a = None if allowed is None else torch.as_tensor(allowed)[..., ::stride, :]
    return grouped(x[:, list(rows)], Wq, bq, Wk, bk, Wv, bv, Wo, bo, heads=heads, group=1, allowed=a, context=x)


def local(T, K):
    """(T, T) bool: windows of K frames that do not overlap."""
    return torch.tensor([[i // K == j // K for j in range(T)] for i in range(T)])

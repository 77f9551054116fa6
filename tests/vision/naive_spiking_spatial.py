"""Advance spatial attention for spiking networks and its neurons, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import torch
import torch.nn.functional as F


# --- ASA
def scores(x, alpha, beta, f):
    """Eq. 1-2. alpha, beta scalars (or (1,)); f: F (T,T), or (F1 (T//red,T), F2 (T,T//red)) -> s (B,T,C).

    Only indices of the largest s are used: no gradient reaches alpha, beta, F."""
    B, T, C, Y, X = x.shape
    alpha, beta = float(alpha), float(beta)
    s = torch.empty(B, T, C, dtype=x.dtype)
    for b in range(B):
        for t in range(T):
            for c in range(C):
                a = x[b, t, c].sum() / (Y * X)
                m = x[b, t, c].max()
                s[b, t, c] = (a + m) / 2 + alpha * a + beta * m
    out = torch.empty_like(s)
    for b in range(B):
        for c in range(C):
            u = s[b, :, c]
            if isinstance(f, (tuple, list)):
                f1, f2 = f
                u = [torch.relu(sum(f1[n, t] * u[t] for t in range(T))) for n in range(f1.shape[0])]
                out[b, :, c] = torch.stack([sum(f2[t, n] * u[n] for n in range(len(u))) for t in range(T)])
            else:
                out[b, :, c] = torch.stack([sum(f[t, r] * u[r] for r in range(T)) for t in range(T)])
    return out.detach()


def largest(values, k):
    """Indices of the k largest numbers of a list. (Ties: the earlier index first; torch.topk promises no order.)"""
    return set(sorted(range(len(values)), key=lambda n: -values[n])[:k])


def important_from_scores(s, *, ratio=0.5, per_sample=True, selection="both"):
    """Eq. 3-4. s (B,T,C) -> bool (B,T,C).

    cm: the int(C ratio) best channels at each (b,t); tm: the int(T ratio) best steps at each (b,c).
    per_sample=False: the code's mixing, the channel set of step t (and the step set of channel c) is the UNION over
    the batch.
    selection "both": in cm and tm; "exactly_one": in just one of them (what the code does)."""
    B, T, C = s.shape
    kc, kt = int(C * ratio), int(T * ratio)
    cm = [[largest(s[b, t].tolist(), kc) for t in range(T)] for b in range(B)]
    tm = [[largest(s[b, :, c].tolist(), kt) for c in range(C)] for b in range(B)]
    if not per_sample:
        cm = [[set().union(*(cm[n][t] for n in range(B))) for t in range(T)] for _ in range(B)]
        tm = [[set().union(*(tm[n][c] for n in range(B))) for c in range(C)] for _ in range(B)]
    p = torch.zeros(B, T, C, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            for c in range(C):
                i, j = c in cm[b][t], t in tm[b][c]
                p[b, t, c] = (i and j) if selection == "both" else (i != j)
    return p


def important(x, alpha, beta, f, *, ratio=0.5, per_sample=True, selection="both"):
    return important_from_scores(scores(x, alpha, beta, f), ratio=ratio, per_sample=per_sample, selection=selection)


def gate_map(group, kernel, share):
    """Eq. 6. group (T,C,Y,X) with zeros at the entries of the other group; kernel (1,2,3,3); share = ratio or 1 -
    ratio -> (Y,X).

    Mean (over ALL T C entries, divided by share) first, max (zeros included) second."""
    T, C, Y, X = group.shape
    flat = group.reshape(T * C, Y, X)
    mean = sum(flat[n] for n in range(T * C)) / (T * C) / share
    top = flat.max(0).values
    return torch.sigmoid(F.conv2d(torch.stack([mean, top])[None], kernel, padding=1)[0, 0])


def asa(x, alpha, beta, f, k_important, k_rest, *, ratio=0.5, per_sample=True, selection="both"):
    """Eq. 1-7. k_important (K_i), k_rest (K_s): (1,2,3,3), no bias -> (B,T,C,Y,X)."""
    p = important(x, alpha, beta, f, ratio=ratio, per_sample=per_sample, selection=selection)
    out = []
    for b in range(x.shape[0]):
        m = p[b][:, :, None, None].to(x.dtype)
        xi, xs = m * x[b], (1 - m) * x[b]
        out.append(gate_map(xi, k_important, ratio) * xi + gate_map(xs, k_rest, 1 - ratio) * xs)
    return torch.stack(out)


# --- LIF
class Spike(torch.autograd.Function):
    """[u >= theta], gradient 1/(2 w) for |u - theta| < w, else 0."""

    @staticmethod
    def forward(ctx, u, threshold, width):
        ctx.save_for_backward(u)
        ctx.threshold, ctx.width = threshold, width
        return (u >= threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        near = ((u - ctx.threshold).abs() < ctx.width).to(u.dtype)
        return g * near / (2 * ctx.width), None, None


def lif_step(v, y, *, threshold=0.3, decay=0.3, reset=0.0, bias=0.0, width=0.25):
    """One step: v (B,*) old potential, y (B,*) input -> (spike, new v). The reset passes gradients through the spike
    (as in the code)."""
    u = v + y
    o = Spike.apply(u, threshold, width)
    return o, decay * (o * reset + (1 - o) * u) + bias


def lif(y, *, v=None, **options):
    """y (B,T,*) -> spikes of the same shape; v starts at 0."""
    v = torch.zeros_like(y[:, 0]) if v is None else v
    out = []
    for t in range(y.shape[1]):
        o, v = lif_step(v, y[:, t], **options)
        out.append(o)
    return torch.stack(out, 1)


# --- host
def conv_layer(x, w, b, bn, attention, *, pool=1, training=True, eps=1e-5, **lif_options):
    """conv 3x3 -> batch norm -> average pool -> ASA -> LIF, no dropout. x (B,T,Cin,Y,X), w (C,Cin,3,3), b (C,) or None,
    bn = (weight, bias[, running_mean, running_var]), attention: function (B,T,C,Y,X) -> same (or None) -> (spikes,
    firing rate).

    Statistics of the norm: over batch, time and space (batch and time are one axis)."""
    B, T = x.shape[:2]
    z = F.conv2d(x.flatten(0, 1), w, b, padding=1)
    if training:
        n = z.numel() // z.shape[1]
        mean = z.sum((0, 2, 3)) / n
        var = ((z - mean[None, :, None, None]) ** 2).sum((0, 2, 3)) / n
    else:
        mean, var = bn[2], bn[3]
    z = (z - mean[None, :, None, None]) / torch.sqrt(var + eps)[None, :, None, None] * bn[0][None, :, None, None] + bn[
        1
    ][None, :, None, None]
    if pool > 1:
        z = F.avg_pool2d(z, pool)
    z = z.reshape(B, T, *z.shape[1:])
    if attention is not None:
        z = attention(z)
    o = lif(z, **lif_options)
    return o, o.mean()


def small_host(x, convs, linears, **lif_options):
    """convs: list of (w, b, bn, attention, pool); linears: list of (w, b), each followed by LIF -> (mean over T
    (B,classes), rates)."""
    rates = []
    for w, b, bn, attention, pool in convs:
        x, r = conv_layer(x, w, b, bn, attention, pool=pool, **lif_options)
        rates.append(r)
    x = x.flatten(2)
    for w, b in linears:
        x = lif(F.linear(x, w, b), **lif_options)
        rates.append(x.mean())
    return x.mean(1), rates

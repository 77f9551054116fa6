"""Class semantics-based attention, as reconstructed, in loops.

Its author saw only an account of the equations, neither code nor tests of the library.
"""

import torch


def dense(v, w, b=None):
    """v (n,), w (m,n), b (m,) or None -> (m,)."""
    out = torch.stack([sum(w[i, j] * v[j] for j in range(v.shape[0])) for i in range(w.shape[0])])
    return out if b is None else out + b


def valid_steps(mask, b, T):
    return [t for t in range(T) if mask is None or bool(mask[b, t])]


def channel_gate(R, w1, b1, w2, b2, *, mask=None):
    """Eq. 1 [I]. a = sigmoid(W2 ReLU(W1 r + b1) + b2), r = mean of R over valid steps. w1 (C//red, Cr), w2 (C,
    C//red) -> (B,C)."""
    B, _Cr, T = R.shape
    out = []
    for b in range(B):
        steps = valid_steps(mask, b, T)
        r = sum(R[b, :, t] for t in steps) / len(steps)
        out.append(torch.sigmoid(dense(torch.relu(dense(r, w1, b1)), w2, b2)))
    return torch.stack(out)


def time_gate(R, conv_w, conv_b, w2, b2, *, mask=None, hide_input=True):
    """Eq. 2 [I]. b_t = sigmoid(w2 . ReLU(conv_k(R))_t + b2); conv_w (C//red, Cr, k) with zero padding k//2, conv_b
    (C//red,), w2 (C//red,)
    (or (1, C//red, 1)), b2 a number -> (B,T). Padded steps get b = 0.

    hide_input: R of padded steps counts as zero in the convolution. The account says "padded steps do not change
    valid ones": then
    it must be True (with False a padded neighbour within k//2 would). OPEN: the account's Mask line doesn't name this
    step."""
    B, _Cr, T = R.shape
    k = conv_w.shape[2]
    assert k % 2 == 1
    w2, b2 = w2.reshape(-1), b2.reshape(())
    out = []
    for b in range(B):
        steps = valid_steps(mask, b, T)
        row = []
        for t in range(T):
            if t not in steps:
                row.append(torch.zeros((), dtype=R.dtype))
                continue
            h = conv_b
            for n in range(k):
                j = t + n - k // 2
                if 0 <= j < T and (not hide_input or j in steps):
                    h = h + dense(R[b, :, j], conv_w[:, :, n])
            row.append(torch.sigmoid((w2 * torch.relu(h)).sum() + b2))
        out.append(torch.stack(row))
    return torch.stack(out)


def time_gate_dense(R, w1, b1, w2, b2, *, mask=None):
    """Eq. 2, the option length=T [I]: SE with the axes exchanged. w1 (T//red, T), w2 (T, T//red) on the mean of R
    over channels -> (B,T).

    OPEN: with a mask the padded entries of the mean are set to 0 (so that they don't change valid steps), and their
    gate too."""
    B, Cr, T = R.shape
    out = []
    for b in range(B):
        steps = valid_steps(mask, b, T)
        zero = torch.zeros((), dtype=R.dtype)
        r = torch.stack([sum(R[b, c, t] for c in range(Cr)) / Cr if t in steps else zero for t in range(T)])
        g = torch.sigmoid(dense(torch.relu(dense(r, w1, b1)), w2, b2))
        out.append(torch.stack([g[t] if t in steps else zero for t in range(T)]))
    return torch.stack(out)


def apply_gates(F, a=None, b=None, *, axis="both", fuse="sum", w_fuse=None, b_fuse=None, mask=None):
    """Eq. 3 [I]. a (B,C), b (B,T). axis "channel": F_c alone; "time": F_t alone; "both": fused.

    fuse "sum": F_c + F_t; "mean": half of it; "concat": 1x1 convolution of [F_c ; F_t], w_fuse (C,2C), b_fuse (C,) or
    None.
    OPEN: with axis "channel" or "time" there's one copy and nothing to fuse: it is returned as it is. Order in
    "concat": F_c first.
    Padded steps of the output are 0."""
    B, _C, T = F.shape
    out = torch.zeros_like(F)
    for n in range(B):
        for t in valid_steps(mask, n, T):
            fc = None if a is None else F[n, :, t] * a[n]
            ft = None if b is None else F[n, :, t] * b[n, t]
            if axis == "channel":
                out[n, :, t] = fc
            elif axis == "time":
                out[n, :, t] = ft
            elif fuse == "sum":
                out[n, :, t] = fc + ft
            elif fuse == "mean":
                out[n, :, t] = (fc + ft) / 2
            else:
                assert fuse == "concat"
                out[n, :, t] = dense(torch.cat([fc, ft]), w_fuse, b_fuse)
    return out


def class_semantics_gate(
    F, R, channel=None, time=None, *, axis="both", length=None, fuse="sum", w_fuse=None, b_fuse=None, mask=None
):
    """The whole gate. channel = (w1, b1, w2, b2) of channel_gate; time = (conv_w, conv_b, w2, b2), or with length=T
    (w1, b1, w2, b2)."""
    a = channel_gate(R, *channel, mask=mask) if axis in ("both", "channel") else None
    b = None
    if axis in ("both", "time"):
        if length is not None:
            assert length == F.shape[2]
        b = (time_gate if length is None else time_gate_dense)(R, *time, mask=mask)
    return apply_gates(F, a, b, axis=axis, fuse=fuse, w_fuse=w_fuse, b_fuse=b_fuse, mask=mask)


def with_se(F, R, se, *args, mask=None, **kw):
    """Eq. 4 [I]: SE's gate (channel_gate's form, from F itself, w1 (C//red, C)) is multiplied onto F first."""
    return class_semantics_gate(F * channel_gate(F, *se, mask=mask)[:, :, None], R, *args, mask=mask, **kw)

"""Naive complex attention, in loops; its author saw the formulas only, neither code nor tests from here."""

import math

import torch

from naive import linear, may, softmax


def frequencies(D, theta=10000.0):
    return [theta ** (-2 * c / D) for c in range(D // 2)]


def _indices(D, c, pairing):
    return (2 * c, 2 * c + 1) if pairing == "interleaved" else (c, c + D // 2)


def euler_vector(z, pairing="interleaved"):
    """eq. 1 for one (D,) vector: lists of magnitudes and angles (None, None when both parts are exactly 0)."""
    D = z.shape[0]
    rho, phi = [], []
    for c in range(D // 2):
        r, p = (z[n] for n in _indices(D, c, pairing))
        if float(r.detach()) == 0.0 and float(p.detach()) == 0.0:
            rho.append(None)
            phi.append(None)
        else:
            rho.append(torch.sqrt(r * r + p * p))
            phi.append(torch.atan2(p, r))
    return rho, phi


def euler_transform(z, pairing="interleaved"):
    """z (B,H,T,D) -> magnitude, angle (B,H,T,D/2); zero pairs give 0, 0."""
    zero = z.new_zeros(())

    def at(b, h, t, which):
        return torch.stack([zero if v is None else v for v in euler_vector(z[b, h, t], pairing)[which]])

    def build(which):
        return torch.stack(
            [
                torch.stack([torch.stack([at(b, h, t, which) for t in range(z.shape[2])]) for h in range(z.shape[1])])
                for b in range(z.shape[0])
            ]
        )

    return build(0), build(1)


def _own(value, h, c):
    return value[h] if value.dim() == 1 else value[h, c]


def score(q, k, m, n, h, delta, b=None, theta=10000.0, pairing="interleaved"):
    """eqs. 2, 3 for one pair of head vectors at positions m, n."""
    D = q.shape[0]
    rq, pq = euler_vector(q, pairing)
    rk, pk = euler_vector(k, pairing)
    total = q.new_zeros(())
    for c, omega in enumerate(frequencies(D, theta)):
        if rq[c] is None or rk[c] is None:
            continue
        angle = _own(delta, h, c) * (pq[c] - pk[c]) + (m - n) * omega
        if b is not None:
            angle = angle + _own(b, h, c)
        total = total + rq[c] * rk[c] * torch.cos(angle)
    return total / math.sqrt(D)


def rotate(z, position, h, delta, b=None, theta=10000.0, pairing="interleaved"):
    """The factor form of eq. 3 for one vector; give b for queries, None for keys."""
    D = z.shape[0]
    rho, phi = euler_vector(z, pairing)
    out = [None] * D
    for c, omega in enumerate(frequencies(D, theta)):
        first, second = _indices(D, c, pairing)
        if rho[c] is None:
            out[first] = out[second] = z.new_zeros(())
            continue
        angle = _own(delta, h, c) * phi[c] + position * omega
        if b is not None:
            angle = angle + _own(b, h, c)
        out[first], out[second] = rho[c] * torch.cos(angle), rho[c] * torch.sin(angle)
    return torch.stack(out)


def rotary(z, position, theta=10000.0, pairing="interleaved"):
    """Plain rotary of one vector, for the identity delta = 1, b = 0."""
    D = z.shape[0]
    out = [None] * D
    for c, omega in enumerate(frequencies(D, theta)):
        i, j = _indices(D, c, pairing)
        cos, sin = math.cos(position * omega), math.sin(position * omega)
        out[i], out[j] = z[i] * cos - z[j] * sin, z[i] * sin + z[j] * cos
    return torch.stack(out)


def attention(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    delta,
    b=None,
    *,
    num_heads,
    context=None,
    allowed=None,
    theta=10000.0,
    pairing="interleaved",
    positions=None,
    context_positions=None,
    bq=None,
    bk=None,
    bv=None,
    bo=None,
):
    """eqs. 1-4 (B,T,M) -> (B,T,M)."""
    own = context is None
    ctx = x if own else context
    H = num_heads
    D, V = Wq.shape[0] // H, Wv.shape[0] // H

    def where(table, n, t):
        if table is None:
            return t
        table = torch.as_tensor(table)
        return float(table[n, t] if table.dim() == 2 else table[t])

    keys_at = positions if own else context_positions
    batch = []
    for n in range(x.shape[0]):
        k = [linear(ctx[n, j], Wk, bk) for j in range(ctx.shape[1])]
        v = [linear(ctx[n, j], Wv, bv) for j in range(ctx.shape[1])]
        rows = []
        for i in range(x.shape[1]):
            q = linear(x[n, i], Wq, bq)
            heads = []
            for h in range(H):
                js = [j for j in range(ctx.shape[1]) if may(allowed, n, i, j)]
                y = x.new_zeros(V)
                if js:
                    p = softmax(
                        [
                            score(
                                q[h * D : (h + 1) * D],
                                k[j][h * D : (h + 1) * D],
                                where(positions, n, i),
                                where(keys_at, n, j),
                                h,
                                delta,
                                b,
                                theta,
                                pairing,
                            )
                            for j in js
                        ]
                    )
                    for w, j in zip(p, js):
                        y = y + w * v[j][h * V : (h + 1) * V]
                heads.append(y)
            rows.append(linear(torch.cat(heads), Wo, bo))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def phase_contrast(phi, phi_copy, w, temperature=1.0, weight=1.0, eps=0.0):
    """eq. 6.  phi, phi_copy (B,H,T,D/2), w (D/2,)."""
    B, H, T, C = phi.shape
    losses = []
    for n in range(B):
        for h in range(H):
            for m in range(T):
                logits = []
                for j in range(T):
                    z = phi.new_zeros(())
                    for c in range(C):
                        z = z + w[c] * torch.cos(phi[n, h, m, c] - phi_copy[n, h, j, c])
                    logits.append(z / temperature)
                top = max(float(z.detach()) for z in logits) if eps == 0 else 0.0
                e = [torch.exp(z - top) for z in logits]
                losses.append(-torch.log(e[m] / (sum(e[1:], e[0]) + eps)))
    return weight * sum(losses[1:], losses[0]) / len(losses)

"""Probabilistic attention in loops, from the equations alone, by somebody who has read neither code nor test."""

import torch

from naive import may, softmax


def sq(x):
    return (x * x).sum()


def at(p, b, h, j):
    """Scalar (number or 0-d tensor) or (B, H, S)."""
    return p[b, h, j] if isinstance(p, torch.Tensor) and p.dim() == 3 else p


def weights_of(q, k, v, b, h, alpha, beta, log_prior, v0, allowed, rq, rk, rv):
    """Lists w[i][j] for lists k[j], v[j] ; a row without an allowed key is zero."""
    rows = []
    for i in range(q.shape[2]):
        logits, seen = [], [j for j in range(len(k)) if may(allowed, b, i, j)]
        for j in seen:
            a, be = at(alpha, b, h, j), at(beta, b, h, j)
            s = -(a / 2) * sq(q[b, h, i] - k[j])
            if v0 is not None:
                s = s - (be / 2) * sq(v0[b, h, i] - v[j])
            if rq is not None:
                s = s - (a / 2) * sq(q[b, h, i] - rq[i, j])
            if rk is not None:  # key first
                s = s - (a / 2) * sq(k[j] - rk[j, i])
            if isinstance(log_prior, str):  # "magnitude"
                s = s + (a / 2) * sq(k[j]) + (be / 2) * sq(v[j] if rv is None else v[j] + rv[i, j])
                if rq is not None:
                    s = s + (a / 2) * sq(rq[i, j])
                if rk is not None:
                    s = s + (a / 2) * (sq(k[j]) + sq(rk[j, i]))
            elif log_prior is not None:
                s = s + log_prior.expand(q.shape[0], q.shape[1], q.shape[2], len(k))[b, h, i, j]
            logits.append(s)
        w = [torch.zeros((), dtype=q.dtype)] * len(k)
        for j, p in zip(seen, softmax(logits) if seen else [], strict=True):
            w[j] = p
        rows.append(w)
    return rows


def probabilistic_attention(
    q,
    k,
    v,
    alpha=None,
    beta=0.0,
    log_prior="magnitude",
    key_steps=0,
    key_prior=None,
    value_steps=0,
    known=None,
    flag=None,
    value_prior=None,
    v0=None,
    allowed=None,
    rq=None,
    rk=None,
    rv=None,
):
    """q (B,H,T,D), k (B,H,S,D), v (B,H,S,V) -> output (B,H,T,V), weights (B,H,T,S).

    log_prior: "magnitude", None (uniform) or log pi (..,T,S). known (B,H,T,V) (or 2V with rv), flag (B,H,T);
    rq, rk, rv: position tables (first index, second index, D or V): output (B,H,T,2V), interleaved.
    """
    n, heads, t, d = q.shape
    s, c = k.shape[2], v.shape[3]
    alpha = d**-0.5 if alpha is None else alpha
    outs, ws = [], []
    for b in range(n):
        for h in range(heads):
            keys, mus = [k[b, h, j] for j in range(s)], [v[b, h, j] for j in range(s)]
            extra = [torch.zeros(c, dtype=q.dtype) for _ in range(t)]

            def renew(keys, mus, b=b, h=h):
                return weights_of(q, keys, mus, b, h, alpha, beta, log_prior, v0, allowed, rq, rk, rv)

            w = renew(keys, mus)
            for _ in range(key_steps):
                new = []
                for j in range(s):
                    mass = sum(w[i][j] for i in range(t))
                    pull = sum(w[i][j] * q[b, h, i] for i in range(t))
                    if key_prior is None:
                        new.append(pull / mass)
                    else:
                        th = (
                            key_prior[b, h, j] if isinstance(key_prior, torch.Tensor) and key_prior.dim() else key_prior
                        )
                        new.append((th * keys[j] + alpha * pull) / (th + alpha * mass))
                keys = new
                w = renew(keys, mus)
            for _ in range(value_steps if flag is not None and bool((flag != 0).any()) else 0):
                new = []
                for j in range(s):
                    mass = sum(w[i][j] * flag[b, h, i] for i in range(t)) + 1e-20
                    pull = sum(w[i][j] * known[b, h, i, :c] for i in range(t))
                    if value_prior is None:
                        new.append(pull / mass)
                    else:
                        ph = (
                            value_prior[b, h, j]
                            if isinstance(value_prior, torch.Tensor) and value_prior.dim()
                            else value_prior
                        )
                        new.append((ph * mus[j] + beta * pull) / (ph + beta * mass))
                if rv is not None:  # w before it is renewed
                    extra = [extra[i] + sum(w[i][j] * known[b, h, j, c:] for j in range(s)) for i in range(t)]
                mus = new
                w = renew(keys, mus)
            for i in range(t):
                y = sum(w[i][j] * mus[j] for j in range(s))
                if rv is not None:
                    pos = sum(w[i][j] * rv[i, j] for j in range(s)) + extra[i]
                    y = torch.stack([part[x] for x in range(c) for part in (y, pos)])
                outs.append(y)
                ws.append(torch.stack(w[i]))
    return torch.stack(outs).reshape(n, heads, t, -1), torch.stack(ws).reshape(n, heads, t, s)

"""Co4's triadic modulation, by loops.

Their author has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def cooperate(r, c, law):
    """Elementwise. law: m2 | m3 | m4 | cooperation | cooperation6 (clipped to [0, 6])."""
    if law == "m2":
        return r + r * c
    if law == "m3":
        return r * (1 + torch.tanh(r * c))
    if law == "m4":
        return r * torch.exp(r * c * math.log(2))
    y = r**2 + 2 * r + c * (1 + r.abs())
    return torch.clamp(y, 0, 6) if law == "cooperation6" else y


def largest(rows, keep, real):
    """rows: list of N vectors (M,) -> keep vectors, the j-th largest feature by feature, and their tokens [j][d]."""
    values, places = [], []
    order = [sorted(real, key=lambda n, d=d: -float(rows[n][d].detach())) for d in range(len(rows[0]))]
    for j in range(keep):
        places.append([order[d][j] for d in range(len(order))])
        values.append(torch.stack([rows[places[j][d]][d] for d in range(len(order))]))
    return values, places


def triadic_attention(q, k, v, keep=12, real=None):
    """q, k, v (B,T,M), token 0 the latent -> out (B,T,M), indices (B,keep,M), A (B,keep+1,keep+1).

    real (B,T): padded tokens get no place among the largest and 0 in out (inferred: the authors' code has no mask).
    """
    batch, length, dim = q.shape
    outs, indices, mats = [], [], []
    for b in range(batch):
        q0, k0, v0 = q[b, 0], k[b, 0], v[b, 0]
        qm = [q[b, n] + q0 * k[b, n] for n in range(1, length)]
        km = [k[b, n] + k0 * q[b, n] for n in range(1, length)]
        vm = [v[b, n] ** 2 + 2 * v[b, n] + q0 * k0 * (1 + v0.abs()) for n in range(1, length)]
        there = [n for n in range(length - 1) if real is None or bool(real[b, n + 1])]
        if len(there) < keep:
            raise ValueError("fewer than `keep` tokens")
        qs = [q0, *largest(qm, keep, there)[0]]
        ks = [k0, *largest(km, keep, there)[0]]
        top, places = largest(vm, keep, there)
        vs = [v0, *top]
        o, mat = [], []
        for i in range(keep + 1):
            a = softmax([(qs[i] * ks[j]).sum() / math.sqrt(dim) for j in range(keep + 1)])
            o.append(sum(w * val for w, val in zip(a, vs, strict=True)))
            mat.append(torch.stack(a))
        rows = [o[0]]
        for n in range(length - 1):
            row = []
            for d in range(dim):
                y = vm[n][d] if n in there else q.new_zeros(())
                for j in range(keep):
                    if places[j][d] == n:
                        y = y + o[j + 1][d]
                row.append(y)
            rows.append(torch.stack(row))
        outs.append(torch.stack(rows))
        indices.append(places)
        mats.append(torch.stack(mat))
    return torch.stack(outs), torch.tensor(indices), torch.stack(mats)


def mixer(x, weight, bias, keep=12, real=None):
    """x (B,T,M), weight (3M,M) rows q, k, v -> out (B,T,M), indices."""
    rows = [torch.stack([linear(x[b, t], weight, bias) for t in range(x.shape[1])]) for b in range(x.shape[0])]
    q, k, v = torch.stack(rows).split(x.shape[2], dim=2)
    y, indices, _ = triadic_attention(q, k, v, keep, real)
    return y, indices


# Doubts: at ties the earlier token comes first here (sorted is stable); a padded latent has no meaning.

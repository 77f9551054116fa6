"""Native sparse attention in loops, by somebody who had a summary of the equations and read neither code nor test.

One line was changed since: a compressed block counts for each selection block by how many of its tokens are in there
(the paper's double sum), where the summary said no more than "sum of the overlapping".
"""

import math

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def softmax(logits):
    z = torch.stack(logits)
    e = torch.exp(z - z.detach().max())
    return e / e.sum()


def rotary(z, position, base=10000.0):
    """Half-split rotary, applied to q and k before any pooling."""
    half = len(z) // 2
    angle = [position * base ** (-i / half) for i in range(half)]
    first = [z[i] * math.cos(a) - z[i + half] * math.sin(a) for i, a in enumerate(angle)]
    second = [z[i + half] * math.cos(a) + z[i] * math.sin(a) for i, a in enumerate(angle)]
    return torch.stack(first + second)


def mean_blocks(z, block):
    """Eq. 1. z (T,D) -> list of (first token, last token if complete, mean); the last block averages what is there."""
    out = []
    for start in range(0, len(z), block):
        rows = [z[j] for j in range(start, min(start + block, len(z)))]
        out.append((start, start + block - 1, sum(rows) / len(rows)))
    return out


def mlp_blocks(z, length, stride, positions, w1, b1, w2, b2):
    """Eq. 6 (recalled). positions (length,D) are added in the block; one hidden layer with ReLU on the flat block."""
    out = []
    for start in range(0, len(z) - length + 1, stride):
        flat = torch.cat([z[start + j] + positions[j] for j in range(length)])
        out.append((start, start + length - 1, linear(torch.relu(linear(flat, w1, b1)), w2, b2)))
    return out


def attend(q, keys, values):
    """One query, lists of keys and values -> output, probabilities. No key: 0."""
    if not keys:
        return q.new_zeros(values_width(values)), []
    p = softmax([(q * k).sum() / math.sqrt(len(q)) for k in keys])
    return sum(w * v for w, v in zip(p, values, strict=True)), list(p)


def values_width(values):
    return values if isinstance(values, int) else len(values[0])


def select(importance, t, block, count, n):
    """Eq. 2-3. importance: list of n numbers -> sorted block numbers. Forced: first, own, the one before own."""
    own = t // block
    forced = {0, own, max(own - 1, 0)}
    visible = {c for c in range(n) if (c + 1) * block - 1 <= t}
    order = sorted(forced | visible, key=lambda c: (c not in forced, -importance[c], c))
    return sorted(order[:count])


def nsa(q, k, v, gates, *, block, count, window, compress=None, reduce="mean"):
    """q (B,T,H,D), k, v (B,T,G,.), gates: three of (B,T,H) (compressed, selected, window).

    compress: None (block means) or a pair of functions (T,D) -> list of (first, last, vector) for k and v (eq. 6).
    reduce "mean" or "sum" over the heads of a group. -> out (B,T,H,V), selected: dict (b,t,g) -> block numbers.
    """
    batch, length, heads, _ = q.shape
    groups, v_dim = v.shape[2], v.shape[3]
    share, n = heads // groups, math.ceil(length / block)
    outs, selected = {}, {}
    for b in range(batch):
        for g in range(groups):
            key_c = mean_blocks(k[b, :, g], block) if compress is None else compress[0](k[b, :, g])
            val_c = mean_blocks(v[b, :, g], block) if compress is None else compress[1](v[b, :, g])
            for t in range(length):
                seen = [c for c, (_, last, _) in enumerate(key_c) if last <= t]  # eq. 1: complete by t
                o_cmp, importance = [], [0.0] * n
                for h in range(g * share, (g + 1) * share):
                    o, p = attend(q[b, t, h], [key_c[c][2] for c in seen], [val_c[c][2] for c in seen] or v_dim)
                    o_cmp.append(o)
                    for c, w in zip(seen, p, strict=True):  # eq. 2, and eq. 6: every block that c overlaps
                        for j in range(key_c[c][0], key_c[c][1] + 1):
                            importance[j // block] += float(w.detach()) / (share if reduce == "mean" else 1)
                chosen = select(importance, t, block, count, n)
                selected[b, t, g] = chosen
                in_sel = [j for j in range(t + 1) if j // block in chosen]  # eq. 3
                in_win = [j for j in range(t + 1) if j > t - window]  # eq. 4
                for r, h in enumerate(range(g * share, (g + 1) * share)):
                    o_slc, _ = attend(q[b, t, h], [k[b, j, g] for j in in_sel], [v[b, j, g] for j in in_sel])
                    o_swa, _ = attend(q[b, t, h], [k[b, j, g] for j in in_win], [v[b, j, g] for j in in_win])
                    parts = (o_cmp[r], o_slc, o_swa)
                    outs[b, t, h] = sum(gate[b, t, h] * o for gate, o in zip(gates, parts, strict=True))  # eq. 5
    rows = [outs[b, t, h] for b in range(batch) for t in range(length) for h in range(heads)]
    return torch.stack(rows).reshape(batch, length, heads, v_dim), selected


def layer(x, wq, wk, wv, wo, w_gates, *, num_heads, num_kv_heads, base=10000.0, **options):
    """Eq. 5. x (B,T,M); w_gates: three (H,M) (compressed, selected, window); base None: no rotary -> y (B,T,M)."""
    batch, length, _ = x.shape
    rows = [(b, t) for b in range(batch) for t in range(length)]

    def heads(w, count, turn):
        z = [linear(x[b, t], w).reshape(count, -1) for b, t in rows]
        if turn and base is not None:
            z = [torch.stack([rotary(r, t, base) for r in one]) for one, (_, t) in zip(z, rows, strict=True)]
        return torch.stack(z).reshape(batch, length, count, -1)

    q, k, v = heads(wq, num_heads, True), heads(wk, num_kv_heads, True), heads(wv, num_kv_heads, False)
    gates = [torch.sigmoid(heads(w, num_heads, False)[..., 0]) for w in w_gates]
    o, _ = nsa(q, k, v, gates, **options)
    return torch.stack([linear(o[b, t].reshape(-1), wo) for b, t in rows]).reshape(x.shape)

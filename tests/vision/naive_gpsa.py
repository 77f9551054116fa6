"""ConViT's gated attention in loops: written from the equations by somebody who saw neither the code nor the tests."""

import math

import torch

from naive import linear, softmax


def position_weights(pos_weight, pos_bias, side):
    """P (H,N,N) from W_pos (H,3), b_pos (H): feature [dx, dy, dx^2 + dy^2], key minus query, dx the column offset."""
    n, heads = side * side, pos_weight.shape[0]
    out = []
    for h in range(heads):
        for i in range(n):
            logits = []
            for j in range(n):
                dx, dy = j % side - i % side, j // side - i // side
                w = pos_weight[h]
                logits.append(w[0] * dx + w[1] * dy + w[2] * (dx * dx + dy * dy) + pos_bias[h])
            out.append(torch.stack(softmax(logits)))
    return torch.stack(out).reshape(heads, n, n)


def gpsa(x, qk_weight, v_weight, o_weight, o_bias, pos_weight, pos_bias, gate, qk_bias=None, v_bias=None):
    """x (B,N,M), N = side * side -> out (B,N,M), A (B,H,N,N)."""
    batch, n, m = x.shape
    heads, d = gate.shape[0], m // gate.shape[0]
    place = position_weights(pos_weight, pos_bias, math.isqrt(n))
    outs, ws = [], []
    for b in range(batch):
        qk = [linear(x[b, i], qk_weight, qk_bias) for i in range(n)]
        v = [linear(x[b, i], v_weight, v_bias) for i in range(n)]
        rows = []
        for i in range(n):
            heads_out = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                content = softmax([(qk[i][:m][cut] * qk[j][m:][cut]).sum() * d**-0.5 for j in range(n)])
                g = torch.sigmoid(gate[h])
                a = [(1 - g) * content[j] + g * place[h, i, j] for j in range(n)]
                total = sum(a)
                a = [w / total for w in a]
                heads_out.append(sum(w * v[j][cut] for j, w in enumerate(a)))
                ws.append(torch.stack(a))
            rows.append(linear(torch.cat(heads_out), o_weight, o_bias))
        outs.append(torch.stack(rows))
    return torch.stack(outs), torch.stack(ws).reshape(batch, n, heads, n).transpose(1, 2)


def local_init(heads, alpha=1.0):
    """W_pos rows of the first k*k heads."""
    k = math.isqrt(heads)
    c = (k - 1) / 2
    rows = [None] * (k * k)
    for h1 in range(k):
        for h2 in range(k):
            rows[h1 + k * h2] = [2 * alpha * (h2 - c), 2 * alpha * (h1 - c), -alpha]
    return torch.tensor(rows, dtype=torch.float64)

"""GATv2 one target node, one head and one edge at a time."""

import torch


def with_loops(edges, N, features=None):
    """Loops deleted, then one per node appended; a loop's feature is the mean of those of the node's other edges."""
    kept = [e for e, (j, i) in enumerate(edges) if j != i]
    out = [edges[e] for e in kept] + [(i, i) for i in range(N)]
    if features is None:
        return out, None
    rows = [features[e] for e in kept]
    for i in range(N):
        into = [features[e] for e in kept if edges[e][1] == i]
        rows.append(sum(into) / len(into) if into else torch.zeros_like(features[0]))
    return out, torch.stack(rows)


def naive_gatv2(
    x_src, x_dst, edges, W_src, b_src, W_dst, b_dst, a, bias, slope=0.2, W_edge=None, features=None, mean=False
):
    """x_src (S, Mj), x_dst (T, Mi), edges [(j, i)], W (H D, M), a (H, D), bias (H D) or (D), features (E, De).

    s_e = a . LeakyReLU(W_dst x_i + W_src x_j [+ W_edge f_e]);  alpha = softmax over the edges into i;
    y_i = sum alpha_e (W_src x_j + b_src);  heads side by side, or their mean;  + bias.
    """
    H, D = a.shape
    out = []
    for i in range(len(x_dst)):
        into = [e for e, (_, target) in enumerate(edges) if target == i]
        R = (W_dst @ x_dst[i] + b_dst).reshape(H, D)
        heads = []
        for h in range(H):
            scores, values = [], []
            for e in into:
                L = (W_src @ x_src[edges[e][0]] + b_src).reshape(H, D)
                z = R[h] + L[h]
                if W_edge is not None:
                    z = z + (W_edge @ features[e]).reshape(H, D)[h]
                leaky = torch.stack([one if one >= 0 else slope * one for one in z])
                scores.append((a[h] * leaky).sum())
                values.append(L[h])
            top = max((float(s.detach()) for s in scores), default=0.0)
            p = [torch.exp(s - top) for s in scores]
            y = torch.zeros(D, dtype=x_src.dtype)
            for one, value in zip(p, values):
                y = y + one / sum(p) * value
            heads.append(y)
        out.append((sum(heads) / H if mean else torch.cat(heads)) + bias)
    return torch.stack(out)

"""Point Transformer's vector attention one point, one neighbour and one channel at a time."""

import torch


def mlp(x, W1, b1, W2, b2):
    return W2 @ torch.relu(W1 @ x + b1) + b2


def naive_point(x_src, x_dst, pos_src, pos_dst, edges, W_q, W_k, W_v, theta, gamma):
    """x_src (S, M), x_dst (T, M'), pos (., 3), edges [(j, i)], W (C, M), theta and gamma (W1, b1, W2, b2) -> (T, C).

    delta = theta(p_i - p_j);  r = gamma(q_i - k_j + delta);  gamma gives C, or C / s numbers of which channel c uses
    number c mod (C / s);  a = softmax of r over the neighbours, for each number;  y_i[c] = sum_j a (v_j + delta)[c].
    """
    C = W_q.shape[0]
    out = []
    for i in range(len(x_dst)):
        r, v = [], []
        for j, target in edges:
            if target != i:
                continue
            delta = mlp(pos_dst[i] - pos_src[j], *theta)
            r.append(mlp(W_q @ x_dst[i] - W_k @ x_src[j] + delta, *gamma))
            v.append(W_v @ x_src[j] + delta)
        channels = []
        for c in range(C):
            logits = [one[c % len(one)] for one in r]
            top = max((float(one.detach()) for one in logits), default=0.0)
            e = [torch.exp(one - top) for one in logits]
            y = torch.zeros((), dtype=x_src.dtype)
            for one, value in zip(e, v):
                y = y + one / sum(e) * value[c]
            channels.append(y)
        out.append(torch.stack(channels))
    return torch.stack(out)

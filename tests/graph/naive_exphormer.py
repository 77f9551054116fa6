"""Exphormer's attention over a list of edges, one node, one head and one edge at a time."""

import math

import torch


def naive_exphormer(h, edges, features, Q, K, V, E, H):
    """h (rows, M) = nodes and then virtual nodes, edges [(j, i)], features (E, De); Q, K, V, E: (weight, bias).

    s = sum_d q_i k_j eps / sqrt(D);  p = exp(clamp(s, -5, 5));  y_i = sum p v_j / (sum p + 1e-6).
    """

    def project(x, weight, bias):
        return (weight @ x + bias).reshape(H, -1)

    out = []
    for i in range(len(h)):
        q = project(h[i], *Q)
        D = q.shape[1]
        heads = []
        for head in range(H):
            top, bottom = torch.zeros(D, dtype=h.dtype), torch.zeros((), dtype=h.dtype)
            for (j, target), feature in zip(edges, features):
                if target != i:
                    continue
                s = (q[head] * project(h[j], *K)[head] * project(feature, *E)[head]).sum() / math.sqrt(D)
                p = torch.exp(torch.clamp(s, -5, 5))
                top = top + p * project(h[j], *V)[head]
                bottom = bottom + p
            heads.append(top / (bottom + 1e-6))
        out.append(torch.cat(heads))
    return torch.stack(out)


def naive_edges(N, R, batch, real, expander):
    """The union of edges [(j, i)] and the kind of each: real, expander, then per virtual r: to it, from it."""
    graphs = max(batch) + 1
    edges = list(real) + list(expander)
    kinds = ["real"] * len(real) + ["expander"] * len(expander)
    for r in range(R):
        edges += [(n, N + r * graphs + batch[n]) for n in range(N)]
        kinds += [f"to{r}"] * N
    for r in range(R):
        edges += [(N + r * graphs + batch[n], n) for n in range(N)]
        kinds += [f"from{r}"] * N
    return edges, kinds

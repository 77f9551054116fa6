"""B080, delta correction of sparse causal attention: steps 1-5, "delta", "recompute" and "sparse".

Written from the formulas alone, by someone who has read neither code nor test of the library.
"""

import torch

from naive import softmax


def attend(q, k, v, see, scale):
    """One query over the keys of the list `see`."""
    p = softmax([(q * k[j]).sum() * scale for j in see])
    return sum(p[n] * v[j] for n, j in enumerate(see))


def window_sink(q, k, v, window, sink, scale=None):
    """A* (B, H, T, V): j <= i and (j > i - window or j < sink)."""
    return rows(q, k, v, lambda i, j: j > i - window or j < sink, scale)


def rows(q, k, v, see, scale=None):
    """q (B, H, T, D), k, v (B, G, T, .), causal attention over the j <= i with see(i, j);
    head h reads key head h G // H."""
    B, H, T, D = q.shape
    G = k.shape[1]
    scale = D**-0.5 if scale is None else scale
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            attend(
                                q[b, h, i],
                                k[b, h * G // H],
                                v[b, h * G // H],
                                [j for j in range(i + 1) if see(i, j)],
                                scale,
                            )
                            for i in range(T)
                        ]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def cut_rows(T, gamma, least=128):
    """Number of rows of the dense tail in the official code (`least` 128 there)."""
    return T % gamma + max(least, gamma)


def delta_attention(q, k, v, sparse, gamma, *, tail=0, mode="delta", scale=None):
    """sparse = A* (B, H, T, V). tail: number of last rows that are dense and uncorrected (T or more: all). Groups of
    gamma rows from 0; the last group before the tail may be short (the official code demands whole groups)."""
    B, H, T, _ = q.shape
    full = rows(q, k, v, lambda i, j: True, scale)
    Tp = max(T - tail, 0)
    out = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                a = i // gamma * gamma
                if i >= Tp:
                    o = full[b, h, i]
                elif mode == "delta":
                    o = sparse[b, h, i] + (full[b, h, a] - sparse[b, h, a])
                elif mode == "recompute":
                    o = full[b, h, i] if i == a else sparse[b, h, i]
                else:
                    # "sparse": no correction (the formulas leave open whether its tail is dense; here it is)
                    o = sparse[b, h, i]
                out.append(o)
    return torch.stack(out).view(B, H, T, -1)

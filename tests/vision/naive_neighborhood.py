"""Neighborhood attention (arXiv 2204.07143, 2209.15001, 2504.16922), written out query by query and key by key.

Windows are shifted inward at the borders. 1 to 3 token axes; window size, stride, dilation and causality per axis.
"""

import itertools
import math

import torch
from torch import Tensor


def naive_window(i: int, L: int, k: int, s: int = 1, d: int = 1, causal: bool = False) -> list[int]:
    """The places on one axis of length L that query i sees: window k, stride s, dilation d."""
    g, p = i % d, i // d
    n = math.ceil((L - g) / d)
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        seen = range(max(leader - k + 1, 0), p + 1)
    else:
        leader = min(p // s * s + s // 2, n - 1)
        start = min(max(leader - k // 2, 0), n - k)
        seen = range(start, start + k)
    return [u * d + g for u in seen]


def naive_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[bool, ...],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """q (B, *N, H, D), k (B, *N, G, D), v (B, *N, G, V) -> (B, *N, H, V), heads last; *N is one to three axes.

    bias (H, 2 k_1 - 1, ...) is added to the scaled scores at the pair's distance in units of the dilation (stride 1 and
    no causal axis only).
    """
    B, *sizes, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    out = q.new_zeros(B, *sizes, H, v.shape[-1])
    for b in range(B):
        for i in itertools.product(*map(range, sizes)):
            axes = [naive_window(i[a], sizes[a], window[a], stride[a], dilation[a], causal[a]) for a in range(len(i))]
            for h in range(H):
                group = h * k.shape[-2] // H
                logits, values = [], []
                for j in itertools.product(*axes):
                    z = scale * torch.einsum("d,d->", q[(b, *i, h)], k[(b, *j, group)])
                    if bias is not None:
                        steps = [j[a] // dilation[a] - i[a] // dilation[a] + window[a] - 1 for a in range(len(i))]
                        z = z + bias[(h, *steps)]
                    logits.append(z)
                    values.append(v[(b, *j, group)])
                largest = max(one.item() for one in logits)
                e = [torch.exp(z - largest) for z in logits]
                out[(b, *i, h)] = sum(one / sum(e) * value for one, value in zip(e, values, strict=True))
    return out

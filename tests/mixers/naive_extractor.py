"""Extractors SHE, HE, WE and ME: causal sums over offsets with learned weights.

Written from the equations alone, which are partly inferred; its author has read neither code nor test of the library.
"""

import torch

from naive import linear


def weight_of(weights, t, s, index):
    """index "offset": weights[t - s]; "pair": weights[t, s]."""
    return weights[t - s] if index == "offset" else weights[t, s]


def extract(x, weights, index="offset", keep=None):
    """Eq. 1 without bias. x (B,T,M) -> sum over s <= t of W x_s.

    weights: by offset (L,...) or by pair (L,L,...), the rest being (M,M) (SHE), (M,) (HE) or () (WE, ME).
    keep (B,T) true = real: padded tokens contribute 0.
    """
    rank = weights.dim() - (1 if index == "offset" else 2)
    outs = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = torch.zeros_like(x[b, t])
            for s in range(t + 1):
                if keep is not None and not bool(keep[b, s]):
                    continue
                w = weight_of(weights, t, s, index)
                total = total + (linear(x[b, s], w) if rank == 2 else w * x[b, s])
            outs.append(total)
    return torch.stack(outs).reshape(x.shape)


def extractor(x, weights, *, level, wv=None, bv=None, bias=None, wa=None, ba=None, wo=None, bo=None, index="offset",
              keep=None):  # fmt: skip
    """Eq. 1-3. x (B,T,M), T <= L. level "she" (weights (M,M) per place), "he" ((M,)), "we" (number), "me" (number).

    wv: shared projection of HE and WE; wa, ba: adjustment of SHE, HE, WE (None: left out); wo: output map (None: none).
    """
    batch, length, _ = x.shape
    if length > weights.shape[0]:
        raise ValueError("no weights beyond max_len")
    z = x
    if level in ("he", "we") and wv is not None:
        z = torch.stack([torch.stack([linear(token, wv, bv) for token in sample]) for sample in x])
    e = extract(z, weights, index, keep)
    if bias is not None:
        e = e + bias
    rows = []
    for b in range(batch):
        for t in range(length):
            y = e[b, t]
            if level != "me" and wa is not None:
                y = y * linear(x[b, t], wa, ba)  # eq. 2
            rows.append(y if wo is None else linear(y, wo, bo))  # eq. 3
    return torch.stack(rows).reshape(batch, length, -1)


def multiplications(level, length, dim):
    """Multiply count per token at T = length, leading terms."""
    return {
        "she": length * dim**2,
        "attention": 4 * dim**2 + 2 * length * dim,
        "he": 2 * dim**2 + length * dim,
        "we": 2 * dim**2 + length * dim,
        "me": length * dim,
    }[level]


# Doubts: all level definitions. Outputs of padded rows are left as they come. T M^2 > 4 M^2 + 2 T M needs
# (T - 4) M > 2 T, true from T = M = 8 on.

"""Feed-forward nets in place of attention (ALR, ALSR, ALRR, ELR), row by row.

Written from the equations alone; its author has read neither code nor test of the library.
A net is a tuple (norm1 weight, bias, W1, b1, norm2 weight, bias, W2, b2).
"""

import torch

from naive import linear


def layer_norm(z, weight, bias, eps=1e-5):
    d = z - z.mean()
    return d / torch.sqrt((d**2).mean() + eps) * weight + bias


def flatten(x, length, keep=None):
    """Eq. 1. x (T,M) -> L*M numbers, token after token; padded tokens and the places after T are 0."""
    parts = []
    for t in range(length):
        real = t < len(x) and (keep is None or bool(keep[t]))
        parts.append(x[t] if real else x.new_zeros(x.shape[1]))
    return torch.cat(parts)


def net(f, params):
    """Eq. 2: both norms go over the whole flat vector."""
    g1, c1, w1, b1, g2, c2, w2, b2 = params
    h = linear(layer_norm(f, g1, c1), w1, b1)
    h = torch.stack([z if float(z.detach()) > 0 else 0.01 * z for z in h])
    return linear(layer_norm(h, g2, c2), w2, b2)


def hidden_width(size, width, heads_form=False):
    """Eq. 2 (width W), eq. 4 with heads_form, eq. 6 with width = 2W."""
    if heads_form:
        return width // {"XS": 32, "S": 16, "M": 8, "L": 4, "XL": 4}[size]
    return 2 * width if size == "XL" else width // {"XS": 256, "S": 128, "M": 8, "L": 2}[size]


def rows_or_zero(rows, keep, length):
    """Eq. 3: padded outputs 0, cut to T."""
    zero = torch.zeros_like(rows[0])
    return torch.stack([rows[t] if keep is None or bool(keep[t]) else zero for t in range(length)])


def flat(x, params, max_len, keep=None):
    """Eq. 1-3: ALR, ALRR, ELR in the encoder. x (B,T,M), keep (B,T) true = real -> (B,T,M), before any output map."""
    outs = []
    for b in range(len(x)):
        on = None if keep is None else keep[b]
        rows = net(flatten(x[b], max_len, on), params).reshape(max_len, -1)
        outs.append(rows_or_zero(rows, on, x.shape[1]))
    return torch.stack(outs)


def flat_per_head(x, nets, max_len, keep=None):
    """Eq. 4: ALSR. One net per head, output L*D each -> (B,T,H*D)."""
    return torch.cat([flat(x, params, max_len, keep) for params in nets], dim=-1)


def flat_causal(x, params, max_len, keep=None):
    """Eq. 5: decoder self-attention. Row t is the net (output M) on f with all tokens after t set to 0."""
    outs = []
    for b in range(len(x)):
        on = None if keep is None else keep[b]
        rows = [net(flatten(x[b, : t + 1], max_len, on), params) for t in range(x.shape[1])]
        outs.append(rows_or_zero(rows, on, x.shape[1]))
    return torch.stack(outs)


def flat_cross(q, context, params, max_len, keep=None, query_keep=None):
    """Eq. 6. f = [flat(context) ; flat(queries)], one call for all queries; keep masks the context input only."""
    outs = []
    for b in range(len(q)):
        on = None if query_keep is None else query_keep[b]
        f = [flatten(context[b], max_len, None if keep is None else keep[b]), flatten(q[b], max_len, on)]
        rows = net(torch.cat(f), params).reshape(max_len, -1)
        outs.append(rows_or_zero(rows, on, q.shape[1]))
    return torch.stack(outs)


def split_heads(y, heads):
    """(B,T,H*D) -> (B,H,T,D)."""
    batch, _, dim = y.shape
    d = dim // heads
    return torch.stack([torch.stack([y[b, :, h * d : (h + 1) * d] for h in range(heads)]) for b in range(batch)])


def output_map(y, wo, bo=None):
    """Eq. 3: the teacher's own output projection."""
    return torch.stack([torch.stack([linear(token, wo, bo) for token in sample]) for sample in y])


def distillation_loss(student, teacher, keep):
    """Mean square over the real entries: MSE over all entries, divided by the share of real ones."""
    total, count = 0.0, 0
    for b in range(keep.shape[0]):
        for t in range(keep.shape[1]):
            if bool(keep[b, t]):
                total = total + ((student[b, t] - teacher[b, t]) ** 2).sum()
                count += student.shape[2]
    return total / count


# Doubts: eq. 5 for a padded query in the middle: its row is 0, the rest as usual. ALRR, ELR: `flat` on other data.

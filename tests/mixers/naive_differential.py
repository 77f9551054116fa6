"""Differential attention, number by number, written from its equations before the module."""

import math

import torch


def turned(row, angles):
    """Pairs (a, a + D / 2) of one vector, each by its own angle."""
    half = len(row) // 2
    out = list(row)
    for a in range(half):
        c, s = math.cos(float(angles[a])), math.sin(float(angles[a]))
        out[a], out[a + half] = row[a] * c - row[a + half] * s, row[a] * s + row[a + half] * c
    return torch.stack(out)


def softmax(scores):
    top = max((z.item() for z in scores.values()), default=0.0)
    grown = {s: torch.exp(z - top) for s, z in scores.items()}
    total = sum(grown.values())
    return {s: z / total for s, z in grown.items()}


def naive_differential(
    x, p, *, heads, groups, lambda_init, pairing, angles, angles_of_keys=None, context=None, allowed=None, eps=1e-5
):
    """x (B, T, M), context (B, S, M) -> (B, T, M). `p` holds tensors by name, a norm's weight among them or not.

    split: pair p is heads p and p + H / 2, and value heads w and w + G / 2 make one of width 2 D. adjacent: pair p is
    heads 2 p and 2 p + 1, and so are value heads. angles (B, T, D / 2), those of keys likewise, or None.
    """
    context = x if context is None else context
    angles_of_keys = angles if angles_of_keys is None else angles_of_keys
    width = len(p["lambda_q1"])
    pairs, each = heads // 2, heads // groups

    def head(name, row, h):
        bias = p.get(f"{name}.bias")
        full = p[f"{name}.weight"] @ row + (0 if bias is None else bias)
        return full[h * width : (h + 1) * width]

    one = sum(a * b for a, b in zip(p["lambda_q1"], p["lambda_k1"], strict=True))
    two = sum(a * b for a, b in zip(p["lambda_q2"], p["lambda_k2"], strict=True))
    lam = torch.exp(one) - torch.exp(two) + lambda_init
    out = []
    for b in range(len(x)):
        rows = []
        for t in range(x.shape[1]):
            seen = [s for s in range(context.shape[1]) if allowed is None or allowed[b, t, s]]

            def weights(h, b=b, t=t, seen=seen):
                q = head("q_proj", x[b, t], h)
                q = q if angles is None else turned(q, angles[b, t])
                scores = {}
                for s in seen:
                    k = head("k_proj", context[b, s], h // each)
                    k = k if angles is None else turned(k, angles_of_keys[b, s])
                    scores[s] = torch.dot(q, k) / math.sqrt(width)
                return softmax(scores)

            mixed = []
            for pair in range(pairs):
                if pairing == "split":
                    first, second = pair, pair + pairs
                    w = (first // each) % (groups // 2)
                    values = (w, w + groups // 2)
                else:
                    first, second = 2 * pair, 2 * pair + 1
                    w = pair // each
                    values = (2 * w, 2 * w + 1)
                plus, minus = weights(first), weights(second)
                o = torch.zeros(2 * width, dtype=x.dtype)
                for s in seen:
                    wide = torch.cat([head("v_proj", context[b, s], v) for v in values])
                    o = o + (plus[s] - lam * minus[s]) * wide
                rms = torch.sqrt(sum(z * z for z in o) / (2 * width) + eps)
                weight = p.get("norm_weight")
                mixed.append((1 - lambda_init) * o / rms * (1 if weight is None else weight))
            bias = p.get("o_proj.bias")
            rows.append(p["o_proj.weight"] @ torch.cat(mixed) + (0 if bias is None else bias))
        out.append(torch.stack(rows))
    return torch.stack(out)

"""The causal generative function, token by token. Its author has read neither code nor test."""

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def pair_previous(x, op="min", keep=None):
    """x (B,T,M), keep (B,T) true = real -> (B,T,M). Before a row's first real token there is none: p = x.

    The previous token of a real token is the last real one before it. Padded rows come out as 0.
    """
    outs = []
    for b in range(x.shape[0]):
        previous = None
        for t in range(x.shape[1]):
            if keep is not None and not bool(keep[b, t]):
                outs.append(torch.zeros_like(x[b, t]))
                continue
            now = x[b, t]
            if previous is None:
                outs.append(now)
            elif op == "min":
                outs.append(torch.minimum(now, previous))
            elif op == "max":
                outs.append(torch.maximum(now, previous))
            else:
                outs.append((now + previous) / 2)
            previous = now
    return torch.stack(outs).reshape(x.shape)


def running_mean(x, keep=None):
    """Mean of the real tokens up to and with t. Padded rows come out as 0."""
    outs = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            seen = [x[b, s] for s in range(t + 1) if keep is None or bool(keep[b, s])]
            real = keep is None or bool(keep[b, t])
            outs.append(sum(seen) / len(seen) if real else torch.zeros_like(x[b, t]))
    return torch.stack(outs).reshape(x.shape)


def running_min(x, keep=None):
    """Minimum of the real tokens up to and with t. Padded rows come out as 0."""
    outs = []
    for b in range(x.shape[0]):
        lowest = None
        for t in range(x.shape[1]):
            if keep is not None and not bool(keep[b, t]):
                outs.append(torch.zeros_like(x[b, t]))
                continue
            lowest = x[b, t] if lowest is None else torch.minimum(lowest, x[b, t])
            outs.append(lowest)
    return torch.stack(outs).reshape(x.shape)


def causal_generative(x, pair="min", context="none", out=None, keep=None):
    """context "none": p; "mean": p + running mean; "min": min(p, running minimum). out: (weight, bias)."""
    y = pair_previous(x, pair, keep)
    if context == "mean":
        y = y + running_mean(x, keep)
    elif context == "min":
        y = torch.minimum(y, running_min(x, keep))
    if out is not None:
        y = torch.stack([torch.stack([linear(y[b, t], *out) for t in range(x.shape[1])]) for b in range(x.shape[0])])
        if keep is not None:
            y = y * keep[..., None].to(y.dtype)
    return y

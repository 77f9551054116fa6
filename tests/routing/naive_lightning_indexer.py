"""The lightning indexer in loops, by somebody who had a summary of the equations and has read neither code nor test."""

import math

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def softmax(logits):
    z = torch.stack(logits)
    e = torch.exp(z - z.detach().max())
    return e / e.sum()


def layer_norm(z, weight, bias, eps=1e-6):
    d = z - z.mean()
    return d / torch.sqrt((d**2).mean() + eps) * weight + bias


def rotary_first(z, cos, sin):
    """Eq. 2. Half-split rotary on the FIRST R features. cos, sin (R,): entries i and i + R/2 share an angle."""
    rot = len(cos)
    half = rot // 2
    out = []
    for i in range(len(z)):
        if i < half:
            out.append(z[i] * cos[i] - z[i + half] * sin[i])
        elif i < rot:
            out.append(z[i] * cos[i] + z[i - half] * sin[i])
        else:
            out.append(z[i])
    return torch.stack(out)


def indexer_scores(x, latent, wq, wk, norm_weight, norm_bias, ww, cos, sin):
    """Eq. 1-3 for every pair. x (B,T,M), latent (B,T,.) (x where there is none), wq (HI*DI,.), wk (DI,M), ww (HI,M),
    cos, sin (B,T,R) -> scores (B,T,T), not yet masked."""
    batch, length, _ = x.shape
    heads, d = ww.shape[0], wk.shape[0]
    out = []
    for b in range(batch):
        keys = [
            rotary_first(layer_norm(linear(x[b, s], wk), norm_weight, norm_bias), cos[b, s], sin[b, s])
            for s in range(length)
        ]
        for t in range(length):
            q = linear(latent[b, t], wq).reshape(heads, d)
            w = linear(x[b, t], ww) / math.sqrt(heads)
            turned = [rotary_first(q[h], cos[b, t], sin[b, t]) for h in range(heads)]
            for s in range(length):
                dots = [torch.relu((turned[h] * keys[s]).sum() / math.sqrt(d)) for h in range(heads)]
                out.append(sum(w[h] * dots[h] for h in range(heads)))
    return torch.stack(out).reshape(batch, length, length)


def top_keys(scores, allow, k):
    """Eq. 4. scores, allow (B,T,S) -> kept (B,T,S) bool: the k best visible keys (all, where fewer are visible).

    Equal scores (the relu makes exact zeros): the most recent key first, as in the golden numbers.
    """
    kept = []
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            seen = [s for s in range(scores.shape[2]) if bool(allow[b, t, s])]
            best = sorted(seen, key=lambda s: (-float(scores[b, t, s].detach()), -s))[:k]
            kept.append(torch.tensor([s in best for s in range(scores.shape[2])]))
    return torch.stack(kept).reshape(scores.shape)


def attend(q, k, v, kept, scale=None):
    """Eq. 4. q (B,T,H,D), k (B,S,G,D), v (B,S,G,V), kept (B,T,S) the same for all heads -> out, weights (B,H,T,S).

    A query without any key gives 0.
    """
    batch, length, heads, d = q.shape
    keys, groups, v_dim = v.shape[1], v.shape[2], v.shape[3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    outs, weights = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(length):
                on = [s for s in range(keys) if bool(kept[b, t, s])]
                p = softmax([scale * (q[b, t, h] * k[b, s, g]).sum() for s in on]) if on else []
                row = dict(zip(on, p, strict=True))
                weights.append(torch.stack([row.get(s, q.new_zeros(())) for s in range(keys)]))
                outs.append(sum((w * v[b, s, g] for s, w in row.items()), v.new_zeros(v_dim)))
    out = torch.stack(outs).reshape(batch, heads, length, v_dim).transpose(1, 2)
    return out, torch.stack(weights).reshape(batch, heads, length, keys)


def indexer_kl(scores, weights, kept):
    """Eq. 5 (recalled). Mean over queries of KL(target, softmax of the scores over the kept keys).

    Target: weights (B,H,T,S) summed over heads, divided by its sum, no gradient. Dense warm-up: kept = allow.
    """
    terms = []
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            on = [s for s in range(scores.shape[2]) if bool(kept[b, t, s])]
            if not on:
                continue
            mass = [weights[b, :, t, s].detach().sum() for s in on]
            guess = softmax([scores[b, t, s] for s in on])
            target = [m / sum(mass) for m in mass]
            terms.append(sum(p * (torch.log(p) - torch.log(g)) for p, g in zip(target, guess, strict=True) if p > 0))
    return torch.stack(terms).mean()

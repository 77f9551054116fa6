"""Mixture-of-head gates and their loss, token by token, written from the equations before the part."""

import torch


def softmax(row):
    top = max(z.item() for z in row)
    grown = [torch.exp(z - top) for z in row]
    return [z / sum(grown) for z in grown]


def times(weight, row):
    return [sum(w * z for w, z in zip(line, row, strict=True)) for line in weight]


def naive_gates(x, p, *, heads, shared, active, form):
    """x (B, T, M) -> gates (B, T, H). `p` has router, kind and shared weights (or not), one row a head or kind."""
    zero = torch.zeros((), dtype=x.dtype)
    out = []
    for sentence in x:
        rows = []
        for token in sentence:
            always, routed = [], [zero] * (heads - shared)
            if shared:
                odds = softmax(times(p["shared.weight"], token)) if shared > 1 else [zero + 1]
                always = [o * shared if form == "code" else o for o in odds]
            if active:
                logits = times(p["router.weight"], token)
                odds = softmax(logits)
                best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:active]
                total = sum(odds[e] for e in best)
                for e in best:
                    routed[e] = odds[e] / total * active if form == "code" else odds[e]
            if shared and active:
                one, two = softmax(times(p["kind.weight"], token))
                factor = 2 if form == "code" else 1
                always = [factor * one * g for g in always]
                routed = [factor * two * g for g in routed]
            rows.append(torch.stack([*always, *routed]))
        out.append(torch.stack(rows))
    return torch.stack(out)


def naive_balance(x, weight, *, active, form):
    """Sum over routed heads of their mean probability times how often they are chosen; times their number as coded."""
    count = len(weight)
    means, chosen, n = [0.0] * count, [0] * count, 0
    for sentence in x:
        for token in sentence:
            logits = times(weight, token)
            for e, odds in enumerate(softmax(logits)):
                means[e] = means[e] + odds
            for e in sorted(range(count), key=lambda e: -logits[e].item())[:active]:
                chosen[e] += 1
            n += 1
    total = sum(mean / n * often / n for mean, often in zip(means, chosen, strict=True))
    return count * total if form == "code" else total

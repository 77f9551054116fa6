"""Dynamic mask attention in loops, by somebody who had a summary of the equations and read neither code nor test."""

import math

import torch


def linear(z, w, b=None):
    y = torch.stack([(row * z).sum() for row in w])
    return y if b is None else y + b


def softplus(z):
    return torch.clamp(z, min=0) + torch.log1p(torch.exp(-z.abs()))


def rms_norm(z, weight, eps=1e-6):
    return z / torch.sqrt((z**2).mean() + eps) * weight


def rotary(z, position, base=10000.0):
    """Half-split rotary: feature i turns with feature i + D/2."""
    half = len(z) // 2
    first, second = [], []
    for i in range(half):
        a = position * base ** (-i / half)
        first.append(z[i] * math.cos(a) - z[i + half] * math.sin(a))
        second.append(z[i + half] * math.cos(a) + z[i] * math.sin(a))
    return torch.stack(first + second)


def block_smooth(chosen, length, block):
    """Option of eq. 5: a run of `block` keys stays whole iff more than half of it was chosen (tail: its own length)."""
    out = set()
    for start in range(0, length, block):
        run = range(start, min(start + block, length))
        if 2 * len(chosen & set(run)) > len(run):
            out |= set(run)
    return out


def dynamic_mask(v, a, wdt, bdt, window, allowed, form="exp", block=1, select="topk"):
    """v (B,S,G,V), a (G,), wdt (G,G*V), allowed (B,T,S) bool -> delta (B,G,1,S), kept (B,G,T,S) bool."""
    batch, keys, groups, _ = v.shape
    deltas, kept = [], []
    for b in range(batch):
        dt = [linear(v[b, s].reshape(-1), wdt, bdt) for s in range(keys)]  # eq. 2: all value heads of the token
        for g in range(groups):
            if form == "exp":
                delta = [torch.exp(a[g] * softplus(dt[s][g])) for s in range(keys)]  # eq. 3
            else:
                delta = [a[g] * softplus(dt[s][g]) for s in range(keys)]  # eq. 3, later code
            deltas.append(torch.stack(delta))
            for t in range(allowed.shape[1]):  # eq. 4
                seen = [s for s in range(keys) if bool(allowed[b, t, s])]
                chosen = set(seen)
                if select == "relu":
                    chosen = {s for s in seen if float(delta[s].detach()) > 0}
                elif keys > window:  # the largest first; among equals the most recent first
                    chosen = set(sorted(seen, key=lambda s: (-float(delta[s].detach()), -s))[:window])
                if block > 1:
                    chosen = block_smooth(chosen, keys, block) & set(seen)
                kept.append(torch.tensor([s in chosen for s in range(keys)]))
    delta = torch.stack(deltas).reshape(batch, groups, 1, keys)
    return delta, torch.stack(kept).reshape(batch, groups, allowed.shape[1], keys)


def attend(q, k, v, delta, kept):
    """Eq. 5. q (B,T,H,D), k (B,S,G,D), v (B,S,G,V) -> out (B,T,H,V), weights (B,H,T,S). Nothing kept: 0."""
    (batch, length, heads, d), (_, keys, groups, v_dim) = q.shape, v.shape
    outs, weights = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for t in range(length):
                on = [s for s in range(keys) if bool(kept[b, g, t, s])]
                logits = {s: (q[b, t, h] * k[b, s, g]).sum() / math.sqrt(d) + delta[b, g, 0, s] for s in on}
                top = max((float(z.detach()) for z in logits.values()), default=0.0)
                e = {s: torch.exp(z - top) for s, z in logits.items()}
                total = sum(e.values())
                w = [e[s] / total if s in e else q.new_zeros(()) for s in range(keys)]
                weights.append(torch.stack(w))
                outs.append(sum((w[s] * v[b, s, g] for s in on), v.new_zeros(v_dim)))
    out = torch.stack(outs).reshape(batch, heads, length, v_dim).transpose(1, 2)
    return out, torch.stack(weights).reshape(batch, heads, length, keys)


def dynamic_mask_attention(x, p, *, num_heads, num_kv_heads, window=2048, form="exp", keep=None, base=10000.0):
    """Eq. 1-5. x (B,T,M), keep (B,T) true = real. p: wq, wk, wv, wo, wdt, a; or absent: bq, bk, bv, bo, bdt,
    q_norm, k_norm (D,) (absent: no norm). base None: no rotary. -> out (B,T,M)."""
    batch, length, _ = x.shape
    rows = [(b, t) for b in range(batch) for t in range(length)]

    def heads(name, count, norm=None):
        out = []
        for b, t in rows:
            z = linear(x[b, t], p["w" + name], p.get("b" + name)).reshape(count, -1)
            if norm is not None and p.get(norm) is not None:
                z = torch.stack([rms_norm(z[h], p[norm]) for h in range(count)])
            if norm is not None and base is not None:
                z = torch.stack([rotary(z[h], t, base) for h in range(count)])
            out.append(z)
        return torch.stack(out).reshape(batch, length, count, -1)

    q, k, v = heads("q", num_heads, "q_norm"), heads("k", num_kv_heads, "k_norm"), heads("v", num_kv_heads)
    allowed = torch.tensor(
        [[[s <= t and (keep is None or bool(keep[b, s])) for s in range(length)] for t in range(length)]
         for b in range(batch)]
    )  # fmt: skip
    delta, kept = dynamic_mask(v, p["a"], p["wdt"], p.get("bdt"), window, allowed, form)
    o, _ = attend(q, k, v, delta, kept)
    return torch.stack([linear(o[b, t].reshape(-1), p["wo"], p.get("bo")) for b, t in rows]).reshape(x.shape)

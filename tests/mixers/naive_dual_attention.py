"""Naive dual attention, in loops; its author saw the formulas only, neither code nor tests of this library."""

import math

import torch

from naive import linear, may, softmax


def _act(z, name):
    if name == "identity":
        return z
    if name == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    if name == "tanh":
        return torch.tanh(z)
    if name == "silu":
        return z / (1 + torch.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    raise ValueError(name)


def _weights(q, k, H, G, b, i, allowed, rotate):
    """q: (H*D,) of token i; k: list of (G*D,) -> (js, p[h])."""
    D = q.shape[0] // H
    js = [j for j in range(len(k)) if may(allowed, b, i, j)]
    per_head = []
    for h in range(H):
        g = h // (H // G)
        q_h = q[h * D : (h + 1) * D]
        q_h = rotate(q_h, i) if rotate else q_h
        logits = []
        for j in js:
            k_h = k[j][g * D : (g + 1) * D]
            k_h = rotate(k_h, j) if rotate else k_h
            logits.append((q_h * k_h).sum() / math.sqrt(D))
        per_head.append(softmax(logits) if js else [])
    return js, per_head


def sensory_attention(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    *,
    num_heads,
    num_kv_heads=None,
    context=None,
    allowed=None,
    rotate=None,
    bk=None,
    bv=None,
    bo=None,
):
    """eq. 1: (B,T,Hs*D)."""
    c = x if context is None else context
    H, G = num_heads, num_kv_heads or num_heads
    batch = []
    for b in range(x.shape[0]):
        k = [linear(c[b, j], Wk, bk) for j in range(c.shape[1])]
        v = [linear(c[b, j], Wv, bv) for j in range(c.shape[1])]
        D = Wv.shape[0] // G
        rows = []
        for i in range(x.shape[1]):
            js, p = _weights(linear(x[b, i], Wq), k, H, G, b, i, allowed, rotate)
            heads = []
            for h in range(H):
                g = h // (H // G)
                y = x.new_zeros(D)
                for w, j in zip(p[h], js):
                    y = y + w * v[j][g * D : (g + 1) * D]
                heads.append(y)
            rows.append(linear(torch.cat(heads), Wo, bo))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def relation(x_i, x_j, P, Q, num_relations, activation="identity"):
    """eq. 3: (R,)."""
    Q = P if Q is None else Q
    p, q = linear(x_i, P), linear(x_j, Q)
    Dr = P.shape[0] // num_relations
    out = []
    for l in range(num_relations):
        z = (p[l * Dr : (l + 1) * Dr] * q[l * Dr : (l + 1) * Dr]).sum() / math.sqrt(Dr)
        out.append(_act(z, activation))
    return torch.stack(out)


def relational_attention(
    x,
    symbols,
    Wq,
    Wk,
    P,
    Q,
    Wr,
    Ws,
    Wo,
    *,
    num_heads,
    num_relations,
    num_kv_heads=None,
    activation="identity",
    relative=False,
    context=None,
    allowed=None,
    rotate=None,
    bk=None,
    bs=None,
    bo=None,
):
    """eqs. 2, 3, 5, 6.  Wr (Hr, D, R), Ws (G*D, M), symbols (B,S,M) or, relative, (T,S,M) -> (B,T,Hr*D)."""
    c = x if context is None else context
    H, G = num_heads, num_kv_heads or num_heads
    D = Ws.shape[0] // G
    batch = []
    for b in range(x.shape[0]):
        k = [linear(c[b, j], Wk, bk) for j in range(c.shape[1])]
        rows = []
        for i in range(x.shape[1]):
            js, p = _weights(linear(x[b, i], Wq), k, H, G, b, i, allowed, rotate)
            r = {j: relation(x[b, i], c[b, j], P, Q, num_relations, activation) for j in js}
            s = {j: linear(symbols[i, j] if relative else symbols[b, j], Ws, bs) for j in js}
            heads = []
            for h in range(H):
                g = h // (H // G)
                y = x.new_zeros(D)
                for w, j in zip(p[h], js):
                    y = y + w * (linear(r[j], Wr[h]) + s[j][g * D : (g + 1) * D])
                heads.append(y)
            rows.append(linear(torch.cat(heads), Wo, bo))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def dual_attention(
    x, symbols, *, sensory=None, relational=None, relative=False, allowed=None, rotate=None, context=None
):
    """eq. 6.  sensory / relational: dicts of the arguments of the two functions (names as there), or None."""
    parts = []
    if sensory is not None:
        s = dict(sensory)
        parts.append(
            sensory_attention(
                x,
                s.pop("Wq"),
                s.pop("Wk"),
                s.pop("Wv"),
                s.pop("Wo"),
                context=context,
                allowed=allowed,
                rotate=rotate,
                **s,
            )
        )
    if relational is not None:
        r = dict(relational)
        names = ("Wq", "Wk", "P", "Q", "Wr", "Ws", "Wo")
        parts.append(
            relational_attention(
                x,
                symbols,
                *[r.pop(n) for n in names],
                relative=relative,
                context=context,
                allowed=allowed,
                rotate=rotate,
                **r,
            )
        )
    return torch.cat(parts, dim=-1)


def symbolic_attention(x, W, b, F, L, *, num_heads):
    """eq. 4: (B,T,M) -> s (B,T,M)."""
    width = W.shape[0] // num_heads
    batch = []
    for n in range(x.shape[0]):
        rows = []
        for t in range(x.shape[1]):
            q = linear(x[n, t], W, b)
            heads = []
            for h in range(num_heads):
                cut = slice(h * width, (h + 1) * width)
                p = softmax([(q[cut] * F[s, cut]).sum() / math.sqrt(width) for s in range(F.shape[0])])
                y = x.new_zeros(width)
                for s, w in enumerate(p):
                    y = y + w * L[s, cut]
                heads.append(y)
            rows.append(torch.cat(heads))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def positional_symbols(E, batch, length):
    """s_j = E[j]: (B,S,M)."""
    return torch.stack([torch.stack([E[j] for j in range(length)]) for _ in range(batch)])


def relative_symbols(E, length, keys=None):
    """s_ij = E[clip(j - i, -m, m) + m], E (2m+1, M): (T,S,M)."""
    m = (E.shape[0] - 1) // 2
    keys = length if keys is None else keys
    return torch.stack([torch.stack([E[max(-m, min(m, j - i)) + m] for j in range(keys)]) for i in range(length)])

"""NAtS in plain loops: types, mask, gradients, the cache that drops.

Its author saw only the paper's account and a kernel of the authors', neither this code nor its tests. Shapes: B batch,
H query heads, G key heads, D head width; types (B, G, T, 3): global, local, sliding; W the window.
"""

import math

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def softmax(scores):
    """list of scalars -> list of scalars that sum to 1."""
    top = max(num(s) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = sum(e[1:], e[0])
    return [x / total for x in e]


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def token_types(x, Wt, num_kv_heads, noise=None, tau=1.0, first_global=True, last_global=False):
    """x (B,T,M), Wt (3G,M) rows ordered key head by key head, each [global, local, sliding] -> types (B,G,T,3).

    noise None: inference, argmax (ties to the first type). noise (B,G,T,3) Gumbel numbers: training, hard one-hot of
    softmax((z + noise)/tau) with the straight-through gradient of that softmax.
    first_global: the first token is global (training, and prefill in inference); last_global: the last too (training;
    not in streaming). Forced tokens carry no gradient. Fine-tuning hands in x.detach() (caller's business).
    """
    B, T, _M = x.shape
    G = num_kv_heads
    out = []
    for n in range(B):
        for g in range(G):
            for t in range(T):
                z = [dot(Wt[3 * g + c], x[n, t]) for c in range(3)]
                if noise is not None:
                    z = [(z[c] + noise[n, g, t, c]) / tau for c in range(3)]
                best = max(range(3), key=lambda c: (num(z[c]), -c))
                forced = (first_global and t == 0) or (last_global and t == T - 1)
                if forced:
                    best = 0
                hard = [x.new_tensor(1.0 if c == best else 0.0) for c in range(3)]
                if noise is not None and not forced:
                    soft = softmax(z)
                    hard = [hard[c] + soft[c] - soft[c].detach() for c in range(3)]
                out.append(torch.stack(hard))
    return torch.stack(out).reshape(B, G, T, 3)


def kind(t):
    """types entry (3,) -> 0 global, 1 local, 2 sliding."""
    return max(range(3), key=lambda c: num(t[c]))


def ends(globals_, strictly_after=False):
    """e(j) = smallest index >= j (strictly_after: > j) whose token is global; the last position if none.
    list of bool -> list of int."""
    T = len(globals_)
    out = []
    for j in range(T):
        e = T - 1
        for i in range(T - 1, j - 1 + int(strictly_after), -1):
            if globals_[i]:
                e = i
        out.append(e)
    return out


def nats_mask(types, window):
    """types (B,G,T,3) -> bool (B,G,T,T): M_ij for j <= i.
    global j: 1; local j: 1 iff i <= e(j) (the next global itself still sees it); sliding j: 1 iff i <= j+W."""
    B, G, T, _ = types.shape
    M = torch.zeros(B, G, T, T, dtype=torch.bool)
    for n in range(B):
        for g in range(G):
            kinds = [kind(types[n, g, j]) for j in range(T)]
            e = ends([c == 0 for c in kinds])
            for i in range(T):
                for j in range(i + 1):
                    M[n, g, i, j] = (
                        kinds[j] == 0 or (kinds[j] == 1 and i <= e[j]) or (kinds[j] == 2 and i <= j + window)
                    )
    return M


def nats_attention(q, k, v, types, window, scale=None):
    """q (B,H,T,D), k, v (B,G,T,D), types (B,G,T,3) -> y (B,H,T,D): softmax(q k^T / sqrt(D) over M = 1) v. Hard mask;
    no gradient to the types."""
    B, H, T, D = q.shape
    G = k.shape[1]
    M = nats_mask(types, window)
    s = 1 / math.sqrt(D) if scale is None else scale
    out = []
    for n in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                seen = [j for j in range(i + 1) if bool(M[n, g, i, j])]
                p = softmax([dot(q[n, h, i], k[n, g, j]) * s for j in seen])
                out.append(sum(w * v[n, g, j] for w, j in zip(p, seen)))
    return torch.stack(out).reshape(B, H, T, -1)


def nats_attention_soft(q, k, v, types, window, scale=None, local_end="own"):
    """Same value as nats_attention for one-hot types, differentiable in them ("let autograd differentiate a soft
    version with e(j) fixed"):
      M_ij = g_j + l_j [i <= e(j)] + s_j [i <= j + W];  y_i = sum_j M_ij exp(s_ij) v_j / sum_j M_ij exp(s_ij).
    local_end "own": e(j) as in item 3 (= j for a global token); "next": for a global token the end it would have as a
    local one, the next global strictly after it.
    # OPEN: which of the two; the code's kernel treats queries up to the next global as neutral for a global token,
    #   which is what "next" says; "own" is the account's formula read literally (default).
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    s = 1 / math.sqrt(D) if scale is None else scale
    out = []
    for n in range(B):
        for h in range(H):
            g = h // (H // G)
            glob = [kind(types[n, g, j]) == 0 for j in range(T)]
            e = ends(glob, local_end == "next")
            for i in range(T):
                scores = [dot(q[n, h, i], k[n, g, j]) * s for j in range(i + 1)]
                top = max(num(a) for a in scores)
                upper, lower = 0, 0
                for j in range(i + 1):
                    m = types[n, g, j, 0]
                    if i <= e[j]:
                        m = m + types[n, g, j, 1]
                    if i <= j + window:
                        m = m + types[n, g, j, 2]
                    w = m * torch.exp(scores[j] - top)
                    upper, lower = upper + w * v[n, g, j], lower + w
                out.append(upper / lower)
    return torch.stack(out).reshape(B, H, T, -1)


def mask_gradient(q, k, v, types, window, dO, scale=None, normaliser="causal"):
    """Item 5: dM_ij = P'_ij (dO_i . v_j - D_i), D_i = dO_i . O_i (masked output), for ALL j <= i, kept or not.
    normaliser "causal" (the code): P' = softmax over all causal keys; "masked" (the exact derivative of the masked
    softmax): exp(s_ij) / sum over kept keys.  dO (B,H,T,D) -> dM (B,H,T,T)."""
    B, H, T, D = q.shape
    G = k.shape[1]
    s = 1 / math.sqrt(D) if scale is None else scale
    O = nats_attention(q, k, v, types, window, scale)
    M = nats_mask(types, window)
    out = torch.zeros(B, H, T, T, dtype=q.dtype)
    for n in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                e = [math.exp(num(dot(q[n, h, i], k[n, g, j])) * s) for j in range(i + 1)]
                total = sum(e[j] for j in range(i + 1) if normaliser == "causal" or bool(M[n, g, i, j]))
                delta = num(dot(dO[n, h, i], O[n, h, i]))
                for j in range(i + 1):
                    out[n, h, i, j] = e[j] / total * (num(dot(dO[n, h, i], v[n, g, j])) - delta)
    return out


def type_gradient(dM, types, window, sparsity=0.0, collected=False):
    """Items 5 and 6: dM (B,H,T,T) -> gradient of the types (B,G,T,3), query heads of a group added up.
      d_global_j = sum over i > e(j) of dM_ij; for a global j without the queries up to the next global
      d_local_j  = sum over j <= i <= e(j);   d_sliding_j = sum over j <= i <= j + W
      sparsity: a global j gets + lambda (T - e(j))/T on its global entry (e(j) = j), a local j + lambda (e(j) - j)/T on
      its local entry, once per QUERY head (the kernel adds it before the heads of a group are summed).
      collected: a global token also ends earlier ones: d_global_{a} -= sum over j, with a = e(j+1), of
      sum over a <= i < next global after a of dM_ij (kernel's scatter; last position where there is none).
    # OPEN: the kernel's convolution band at the diagonal is not reproduced, nor its block rounding of d_local; with
    #   collected the exact end of the sum follows a reading of the kernel, not a run.
    """
    B, H, T, _ = dM.shape
    G = types.shape[1]
    out = torch.zeros(B, G, T, 3, dtype=dM.dtype)
    for n in range(B):
        for h in range(H):
            g = h // (H // G)
            kinds = [kind(types[n, g, j]) for j in range(T)]
            e = ends([c == 0 for c in kinds])
            for j in range(T):
                following = e[j + 1] if j + 1 < T else T - 1
                for i in range(j, T):
                    d = dM[n, h, i, j]
                    if i > e[j] and not (e[j] == j and i <= following):
                        out[n, g, j, 0] += d
                    if i <= e[j]:
                        out[n, g, j, 1] += d
                    if i <= j + window:
                        out[n, g, j, 2] += d
                    if collected:
                        after = e[following + 1] if following + 1 < T else T - 1
                        if following <= i < after:
                            out[n, g, following, 0] -= d
                if e[j] == j:
                    out[n, g, j, 0] += sparsity * (T - e[j]) / T
                if kinds[j] == 1:
                    out[n, g, j, 1] += sparsity * (e[j] - j) / T
    return out


class Cache:
    """Item 7, one sample and one key head: what is alive, by position. step() returns the positions the new token's
    query attends, in order, then drops what expired."""

    def __init__(self, window):
        self.window, self.now = window, -1
        self.live = []  # (position, kind)

    def step(self, kind_of_token):
        self.now += 1
        i = self.now
        self.live.append((i, kind_of_token))
        # sliding tokens older than i - W are gone
        self.live = [(j, c) for j, c in self.live if c != 2 or j >= i - self.window]
        seen = [j for j, _ in self.live]
        # a global token has been used: locals before it are dropped
        if kind_of_token == 0:
            self.live = [(j, c) for j, c in self.live if c != 1]
        return seen

    def size(self):
        return len(self.live)


def nats_stream(q, k, v, types, window, scale=None):
    """Token by token with drops: equals nats_attention. -> y (B,H,T,D), live (B,G,T) entries kept after each step."""
    B, H, T, D = q.shape
    G = k.shape[1]
    s = 1 / math.sqrt(D) if scale is None else scale
    y = [[[None] * T for _ in range(H)] for _ in range(B)]
    live = torch.zeros(B, G, T, dtype=torch.long)
    for n in range(B):
        for g in range(G):
            cache = Cache(window)
            for i in range(T):
                seen = cache.step(kind(types[n, g, i]))
                live[n, g, i] = cache.size()
                for h in range(g * (H // G), (g + 1) * (H // G)):
                    p = softmax([dot(q[n, h, i], k[n, g, j]) * s for j in seen])
                    y[n][h][i] = sum(w * v[n, g, j] for w, j in zip(p, seen))
    return torch.stack([torch.stack([torch.stack(r) for r in b]) for b in y]), live


def chunk_types(x, Wt, num_kv_heads, chunk, noise=None, **options):
    """Item 8: one type per chunk of `chunk` tokens from mean-pooled features -> (B,G,ceil(T/chunk),3).
    # OPEN: a short last chunk is averaged over the tokens it has."""
    B, T, _M = x.shape
    pooled = []
    for n in range(B):
        rows = []
        for a in range(0, T, chunk):
            part = [x[n, t] for t in range(a, min(a + chunk, T))]
            rows.append(sum(part[1:], part[0]) / len(part))
        pooled.append(torch.stack(rows))
    return token_types(torch.stack(pooled), Wt, num_kv_heads, noise, **options)


def chunk_mask(types, chunk, window, T):
    """types (B,G,C,3) -> bool (B,G,T,T): global chunk: always; local chunk: to the end of the next global chunk;
    sliding chunk: W tokens after the chunk's end; own chunk always (causal inside)."""
    B, G, C, _ = types.shape
    M = torch.zeros(B, G, T, T, dtype=torch.bool)
    for n in range(B):
        for g in range(G):
            kinds = [kind(types[n, g, c]) for c in range(C)]
            e = ends([c == 0 for c in kinds])
            for i in range(T):
                for j in range(i + 1):
                    c = j // chunk
                    last = (c + 1) * chunk - 1  # last token of j's chunk
                    M[n, g, i, j] = (
                        kinds[c] == 0
                        or (kinds[c] == 1 and i <= (e[c] + 1) * chunk - 1)
                        or (kinds[c] == 2 and i <= last + window)
                    )
    return M

"""Smoothed routing of experts in loops, by somebody who had an account of the paper and has read neither code nor test.

B batch, T tokens, M width, E experts, k kept experts, H heads, F hidden width of an expert.
"""

import torch


def num(x):
    """the bare number in a scalar tensor."""
    return x.detach().item() if torch.is_tensor(x) else float(x)


def softmax(scores):
    """list of scalars -> list of scalars that sum to 1."""
    top = max(num(s) for s in scores)
    e = [torch.exp(s - top) for s in scores]
    total = e[0]
    for x in e[1:]:
        total = total + x
    return [x / total for x in e]


def dot(a, b):
    s = a[0] * b[0]
    for m in range(1, len(a)):
        s = s + a[m] * b[m]
    return s


def router_logits(u, W, b=None):
    """u (B,T,M), W (E,M), b (E,)|None -> nested list z[b][t][e] = W_e . u_bt + b_e."""
    B, T, _ = u.shape
    E = W.shape[0]
    return [
        [[dot(u[n, t], W[e]) + (b[e] if b is not None else 0.0) for e in range(E)] for t in range(T)] for n in range(B)
    ]


def token_similarity(u, tau, Ws=None, causal=False, keep=None):
    """S_ij = softmax_j( u_i^T Ws u_j / tau ), over the tokens j of the same sequence (itself included).

    u (B,T,M); tau scalar; Ws (M,M)|None (identity); causal: only j <= i; keep (B,T) bool|None, True = real token,
    a token with False never votes. -> S (B,T,T).
    """
    B, T, M = u.shape
    out = []
    for n in range(B):
        rows = []
        for i in range(T):
            if Ws is None:
                left = [u[n, i, m] for m in range(M)]
            else:
                left = [dot(u[n, i], Ws[:, m]) for m in range(M)]  # u_i^T Ws
            seen = [j for j in range(T) if (not causal or j <= i) and (keep is None or bool(keep[n, j]))]
            row = [u.new_zeros(()) for _ in range(T)]
            if seen:
                for j, p in zip(seen, softmax([dot(left, u[n, j]) / tau for j in seen]), strict=True):
                    row[j] = p
            rows.append(torch.stack(row))
        out.append(torch.stack(rows))
    return torch.stack(out)


def attention_similarity(attention, head_weight=None, keep=None):
    """S_ij = mean over heads of A^h_ij (inferred; head_weight (H,)|None gives sum_h w_h A^h_ij instead).

    attention (B,H,T,T) rows softmax; keep (B,T) bool|None: False tokens do not vote, the row is divided by what is
    left (# OPEN: only matters when the attention itself did not mask them). -> S (B,T,T).
    """
    B, H, T, _ = attention.shape
    out = []
    for n in range(B):
        rows = []
        for i in range(T):
            row = []
            for j in range(T):
                s = attention.new_zeros(())
                if keep is None or bool(keep[n, j]):
                    for h in range(H):
                        w = 1.0 / H if head_weight is None else head_weight[h]
                        s = s + w * attention[n, h, i, j]
                row.append(s)
            if keep is not None:
                total = sum(row[1:], row[0])
                if num(total) > 0:
                    row = [s / total for s in row]
            rows.append(torch.stack(row))
        out.append(torch.stack(rows))
    return torch.stack(out)


def smooth(S, r):
    """r'_ie = sum_j S_ij r_je.   S (B,T,T), r nested list [B][T][E] -> nested list [B][T][E]."""
    B, T, _ = S.shape
    E = len(r[0][0])
    out = []
    for n in range(B):
        rows = []
        for i in range(T):
            row = []
            for e in range(E):
                s = S[n, i, 0] * r[n][0][e]
                for j in range(1, T):
                    s = s + S[n, i, j] * r[n][j][e]
                row.append(s)
            rows.append(row)
        out.append(rows)
    return out


def keep_largest(p, k):
    """numbers of the k largest entries of the list p, largest first, ties to the smaller number."""
    left = list(range(len(p)))
    chosen = []
    for _ in range(k):
        best = left[0]
        for e in left:
            if num(p[e]) > num(p[best]):
                best = e
        chosen.append(best)
        left.remove(best)
    return chosen


def route(
    u,
    W,
    b=None,
    top_k=2,
    similarity="none",
    temperature=1.0,
    Ws=None,
    attention=None,
    causal=False,
    keep=None,
    space="probs",
    renormalise=True,
    weight_from="smoothed",
    head_weight=None,
):
    """The router: u (B,T,M), W (E,M), b (E,)|None, attention (B,H,T,T)|None
    -> index (B,T,k) long, weight (B,T,k), probs (B,T,E) (the smoothed distribution r').

    similarity "none": r_i = softmax(W u_i + b).
    "tokens":    r'_i = sum_j S_ij r_j, S = token_similarity(u, temperature, Ws).
    "attention": r'_i = sum_j A_ij r_j, A = mean over heads of the block's attention matrix.
    space "logits": S mixes the logits and the softmax comes after.
    """
    B, T, _ = u.shape
    E = W.shape[0]
    z = router_logits(u, W, b)
    r = [[softmax(z[n][t]) for t in range(T)] for n in range(B)]
    if similarity == "none":
        S = None
    elif similarity == "tokens":
        S = token_similarity(u, temperature, Ws, causal, keep)
    elif similarity == "attention":
        S = attention_similarity(attention, head_weight, keep)
    else:
        raise ValueError(similarity)
    if S is None:
        smoothed = r
    elif space == "probs":
        smoothed = smooth(S, r)
    else:
        mixed = smooth(S, z)
        smoothed = [[softmax(mixed[n][t]) for t in range(T)] for n in range(B)]
    index, weight, probs = [], [], []
    for n in range(B):
        for t in range(T):
            p = smoothed[n][t]
            chosen = keep_largest(p, top_k)
            source = p if weight_from == "smoothed" else r[n][t]
            w = [source[e] for e in chosen]
            if renormalise:
                total = sum(w[1:], w[0])
                w = [x / total for x in w]
            index.append(chosen)
            weight.append(torch.stack(w))
            probs.append(torch.stack(p))
    return (
        torch.tensor(index).reshape(B, T, top_k),
        torch.stack(weight).reshape(B, T, top_k),
        torch.stack(probs).reshape(B, T, E),
    )


def moe(u, index, weight, experts):
    """y_i = sum over kept e of weight_ie f_e(u_i): the expert sees u_i itself, unsmoothed.

    u (B,T,M), index (B,T,k), weight (B,T,k), experts: list of E callables (M,) -> (M,). -> (B,T,M)."""
    B, T, M = u.shape
    out = []
    for n in range(B):
        for t in range(T):
            y = u.new_zeros(M)
            for s in range(index.shape[2]):
                y = y + weight[n, t, s] * experts[int(index[n, t, s])](u[n, t])
            out.append(y)
    return torch.stack(out).reshape(B, T, M)


def feed_forward(W1, b1, W2, b2, activation=torch.relu):
    """one expert f(u) = W2 act(W1 u + b1) + b2;  W1 (F,M), b1 (F,), W2 (M,F), b2 (M,).
    # OPEN: form and activation of the expert are the host's; not in the account."""

    def f(u):
        hidden = [activation(dot(W1[a], u) + b1[a]) for a in range(W1.shape[0])]
        return torch.stack([dot(W2[m], hidden) + b2[m] for m in range(W2.shape[0])])

    return f


def attention_layer(x, Wq, Wk, Wv, Wo, num_heads, causal=False, keep=None):
    """ordinary softmax attention, no biases: x (B,T,M), W* (M,M) -> y (B,T,M), weights A (B,H,T,T)."""
    B, T, M = x.shape
    D = M // num_heads
    ys, As = [], []
    for n in range(B):
        q = [[dot(Wq[m], x[n, t]) for m in range(M)] for t in range(T)]
        k = [[dot(Wk[m], x[n, t]) for m in range(M)] for t in range(T)]
        v = [[dot(Wv[m], x[n, t]) for m in range(M)] for t in range(T)]
        merged = [[None] * M for _ in range(T)]
        A = [[[x.new_zeros(()) for _ in range(T)] for _ in range(T)] for _ in range(num_heads)]
        for h in range(num_heads):
            c = range(h * D, (h + 1) * D)
            for i in range(T):
                seen = [j for j in range(T) if (not causal or j <= i) and (keep is None or bool(keep[n, j]))]
                p = softmax([sum(q[i][m] * k[j][m] for m in c) / D**0.5 for j in seen])
                for j, w in zip(seen, p, strict=True):
                    A[h][i][j] = w
                for m in c:
                    merged[i][m] = sum(w * v[j][m] for j, w in zip(seen, p, strict=True))
        ys.append(torch.stack([torch.stack([dot(Wo[m], merged[t]) for m in range(M)]) for t in range(T)]))
        As.append(torch.stack([torch.stack([torch.stack(row) for row in head]) for head in A]))
    return torch.stack(ys), torch.stack(As)


def layer_norm(x, g, b, eps=1e-5):
    """x (...,M), g, b (M,): each row (x - mean) / sqrt(var + eps) * g + b."""
    M = x.shape[-1]
    rows = []
    for row in x.reshape(-1, M):
        mean = sum(row[m] for m in range(M)) / M
        var = sum((row[m] - mean) ** 2 for m in range(M)) / M
        rows.append(torch.stack([(row[m] - mean) / torch.sqrt(var + eps) * g[m] + b[m] for m in range(M)]))
    return torch.stack(rows).reshape(x.shape)


def block(x, attn, norm1, norm2, W, b, experts, num_heads, causal=False, keep=None, **router):
    """Host: h = x + Attention(norm1 x);  u = norm2 h;  y = h + MoE(u), the router gets that attention's weights.

    attn = (Wq, Wk, Wv, Wo); norm1, norm2 = callables (B,T,M) -> (B,T,M) (identity for none); router = keywords of
    route(). -> y (B,T,M), index, weight, probs.
    # OPEN: pre-norm order inferred ("MoE input after attention, residual, norm").
    """
    a, A = attention_layer(norm1(x), *attn, num_heads, causal, keep)
    h = x + a
    u = norm2(h)
    index, weight, probs = route(u, W, b, attention=A, causal=causal, keep=keep, **router)
    return h + moe(u, index, weight, experts), index, weight, probs


def balance_loss(probs, index):
    """Load balance of the host (recalled, Switch form): E sum_e f_e P_e, f_e = share of the choices that fell on e,
    P_e = mean of probs_e.  probs (B,T,E), index (B,T,k).
    # OPEN: which form, and whether P is taken from r or r' (here: whatever is handed in)."""
    B, T, E = probs.shape
    k = index.shape[2]
    loss = probs.new_zeros(())
    for e in range(E):
        f, P = 0.0, probs.new_zeros(())
        for n in range(B):
            for t in range(T):
                P = P + probs[n, t, e] / (B * T)
                for s in range(k):
                    f += (int(index[n, t, s]) == e) / (B * T * k)
        loss = loss + E * f * P
    return loss

"""Comateformer, combined attention (signed weights), written with loops (B075).

Its author saw a description of the equations only, neither our code nor its tests.

Equations: 1 (similarity E), 2 (negative L1 distance N), 3 (M = tanh(E) g(N), gates plain,
double, centered), 4 (out = M V), 5 (pair form).

Ambiguous in the description, and the reading taken here:
- scale of N: the transformer form divides the L1 sum by sqrt(D) ("( / sqrt(D) )" in the description, and
  the claim in small uses it): `scale_n=True` is the default there; the pair form does not divide
  (`scale=False`), open in the description.
- centered: the mean runs over the whole (T,S) matrix of one head and sample, masked entries left
  out (`centre="matrix"`); `centre="row"` takes it over the visible entries of each row (the only
  causal choice, inferred); a causal mask with "matrix" leaks the future.
- mask: M_ij = 0 for entries that may not be seen, whatever E and N are.
- gradient of |q - k| at equality is 0 (as torch).
- the pair form projects with F_E, F_N (linear maps here: W (out,in) with y = W a + bias, or the
  identity when None); the same F for both sequences ("F_E(a_i)^T F_E(b_j)").
- pair form masks: a pair (i,j) may be seen when both tokens are real; in M^T the same matrix.
- dropout is left out.

Shapes: q (B,H,T,D), k (B,G,S,D), v (B,G,S,V); allowed nested booleans or bool tensor (T,S), (B,T,S).
"""

import math

import torch


def _may(allowed, b, i, j):
    if allowed is None:
        return True
    allowed = torch.as_tensor(allowed)
    return bool(allowed[i, j] if allowed.dim() == 2 else allowed[b, i, j])


def causal(T, S=None):
    S = T if S is None else S
    return [[j <= i + (S - T) for j in range(S)] for i in range(T)]


def _absolute(z):
    """|z| with gradient 0 at 0."""
    return torch.abs(z)


def similarity(q, k, alpha=1.0, scale=True):
    """eq. 1: E (B,H,T,S)."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    root = math.sqrt(D) if scale else 1.0
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    alpha * sum(q[b, h, i, d] * k[b, h // (H // G), j, d] for d in range(D)) / root
                                    for j in range(S)
                                ]
                            )
                            for i in range(T)
                        ]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def dissimilarity(q, k, beta=1.0, scale=True):
    """eq. 2: N (B,H,T,S) <= 0."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    root = math.sqrt(D) if scale else 1.0
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    -beta
                                    * sum(_absolute(q[b, h, i, d] - k[b, h // (H // G), j, d]) for d in range(D))
                                    / root
                                    for j in range(S)
                                ]
                            )
                            for i in range(T)
                        ]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def gate(N, form="double", allowed=None, centre="matrix"):
    """g(N) of eq. 3, (B,H,T,S)."""
    if form == "plain":
        return torch.sigmoid(N)
    if form == "double":
        return 2 * torch.sigmoid(N)
    B, H, T, S = N.shape
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            seen = [(i, j) for i in range(T) for j in range(S) if _may(allowed, b, i, j)]
            rows = []
            for i in range(T):
                own = seen if centre == "matrix" else [(r, j) for r, j in seen if r == i]
                mean = sum(N[b, h, r, j] for r, j in own) / len(own) if own else N.new_zeros(())
                rows.append(torch.stack([torch.sigmoid(N[b, h, i, j] - mean) for j in range(S)]))
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def combine(E, N, form="double", allowed=None, centre="matrix"):
    """eq. 3: M (B,H,T,S), zero where not allowed."""
    B, H, T, S = E.shape
    g = gate(N, form, allowed, centre)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    torch.tanh(E[b, h, i, j]) * g[b, h, i, j]
                                    if _may(allowed, b, i, j)
                                    else E.new_zeros(())
                                    for j in range(S)
                                ]
                            )
                            for i in range(T)
                        ]
                    )
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def values(M, v):
    """eq. 4."""
    B, H, T, S = M.shape
    G = v.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([sum(M[b, h, i, j] * v[b, h // (H // G), j] for j in range(S)) for i in range(T)])
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def combined_attention(q, k, v, form="double", alpha=1.0, beta=1.0, allowed=None, centre="matrix", scale_n=True):
    """eq. 1 to 4 with form "double", "plain" or "centered"."""
    E, N = similarity(q, k, alpha), dissimilarity(q, k, beta, scale_n)
    return values(combine(E, N, form, allowed, centre), v)


def combined_attention_double(q, k, v, **more):
    return combined_attention(q, k, v, "double", **more)


def combined_attention_plain(q, k, v, **more):
    return combined_attention(q, k, v, "plain", **more)


def combined_attention_centered(q, k, v, **more):
    return combined_attention(q, k, v, "centered", **more)


def _map(x, W, bias):
    """(B,T,M) through y = W x + bias, as one head: (B,1,T,out)."""
    rows = [
        [
            x[b, t]
            if W is None
            else torch.stack([sum(W[o, m] * x[b, t, m] for m in range(W.shape[1])) for o in range(W.shape[0])])
            for t in range(x.shape[1])
        ]
        for b in range(x.shape[0])
    ]
    rows = [[c if bias is None else c + bias for c in row] for row in rows]
    return torch.stack([torch.stack([torch.stack(row)]) for row in rows])


def compositional_pair(
    a,
    b,
    W_e=None,
    b_e=None,
    W_n=None,
    b_n=None,
    form="double",
    alpha=1.0,
    beta=1.0,
    scale=False,
    allowed=None,
    centre="matrix",
):
    """eq. 5: a (B,T,M), b (B,S,M) -> (A' = M b (B,T,M), B' = M^T a (B,S,M), M (B,T,S))."""
    E = similarity(_map(a, W_e, b_e), _map(b, W_e, b_e), alpha, scale)
    N = dissimilarity(_map(a, W_n, b_n), _map(b, W_n, b_n), beta, scale)
    M = combine(E, N, form, allowed, centre)
    B, T, S = a.shape[0], a.shape[1], b.shape[1]
    new_a = torch.stack(
        [torch.stack([sum(M[n, 0, i, j] * b[n, j] for j in range(S)) for i in range(T)]) for n in range(B)]
    )
    new_b = torch.stack(
        [torch.stack([sum(M[n, 0, i, j] * a[n, i] for i in range(T)) for j in range(S)]) for n in range(B)]
    )
    return new_a, new_b, torch.stack([M[n, 0] for n in range(B)])

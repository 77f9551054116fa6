"""Hrrformer, self-attention by holographic reduced representations, written with loops (B176).

Its author saw a description of the equations only, neither our code nor its tests.

The equations (projections, binding, superposition, approximate inverse, unbinding, response,
softmax over positions, output; mask, biases, inferred causal form).  No FFT: circular sums.

Ambiguous in the description, and the reading taken here:
- mask: `keep` (B,T) booleans.  `mask_form="code"` adds -1e9 to the response of a dropped token (a
  sequence with nothing kept then still gets weights summing to 1); `mask_form="exact"` leaves
  dropped tokens out of the softmax (weight exactly 0; nothing kept: all 0).  The two agree to
  rounding where something is kept.  Dropped tokens still enter beta as in the code;
  `keep_in_beta=True` leaves them out of beta too (a variant, not the code).
- zero v or vh: 0/0 in the code.  `guard=True` gives response 0 there; default is the bare formula.
- causal form (inferred, no code, the description names only "prefix beta and a prefix softmax"):
  beta_t = sum_{s<=t} k_s # v_s, response a_t from beta_t, w_t = e^{a_t} / sum_{s<=t} e^{a_s}, every
  a_s keeping its own beta_s (`causal_response="own"`); `"current"` recomputes a_s with beta_t.
- cosine over D of one head (not of the merged vector); softmax over positions.

Shapes: q, k, v (B,H,T,D); x (B,T,M), W (M,M) torch-style (out,in): q = x W^T; heads contiguous.
"""

import torch


def bind(k, v):
    """(k # v)_i = sum_j k_j v_{(i-j) mod D}, two vectors of D."""
    D = k.shape[0]
    return torch.stack([sum(k[j] * v[(i - j) % D] for j in range(D)) for i in range(D)])


def inverse(q):
    """q^+_i = q_{(-i) mod D}."""
    D = q.shape[0]
    return torch.stack([q[(-i) % D] for i in range(D)])


def unbind(beta, q):
    """beta # q^+ ; equal to sum_j q_j beta_{(i+j) mod D}."""
    return bind(beta, inverse(q))


def correlate(beta, q):
    D = q.shape[0]
    return torch.stack([sum(q[j] * beta[(i + j) % D] for j in range(D)) for i in range(D)])


def cosine(a, b, guard=False):
    D = a.shape[0]
    dot = sum(a[d] * b[d] for d in range(D))
    na, nb = sum(a[d] * a[d] for d in range(D)), sum(b[d] * b[d] for d in range(D))
    if guard and (float(na.detach()) == 0 or float(nb.detach()) == 0):
        return dot * 0
    return dot / (torch.sqrt(na) * torch.sqrt(nb))


def project_unit(vector):
    """Unit-modulus spectrum (offered by the library, NOT used in the model), by explicit DFT."""
    D = vector.shape[0]
    angle = torch.tensor([[2 * torch.pi * ((i * f) % D) / D for f in range(D)] for i in range(D)], dtype=vector.dtype)
    real = [sum(vector[i] * torch.cos(angle[i, f]) for i in range(D)) for f in range(D)]
    imag = [-sum(vector[i] * torch.sin(angle[i, f]) for i in range(D)) for f in range(D)]
    size = [torch.sqrt(real[f] ** 2 + imag[f] ** 2) for f in range(D)]
    return torch.stack(
        [
            sum((real[f] * torch.cos(angle[i, f]) - imag[f] * torch.sin(angle[i, f])) / size[f] for f in range(D)) / D
            for i in range(D)
        ]
    )


def _keep(keep, b, t):
    return True if keep is None else bool(torch.as_tensor(keep)[b, t])


def superposition(k, v, keep=None):
    """beta (B,H,D)."""
    B, H, T, D = k.shape
    return torch.stack(
        [
            torch.stack(
                [
                    sum([bind(k[b, h, s], v[b, h, s]) for s in range(T) if _keep(keep, b, s)], k.new_zeros(D))
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def unbound(q, beta):
    """vh (B,H,T,D)."""
    B, H, T, _ = q.shape
    return torch.stack(
        [
            torch.stack([torch.stack([unbind(beta[b, h], q[b, h, t]) for t in range(T)]) for h in range(H)])
            for b in range(B)
        ]
    )


def responses(q, k, v, keep=None, keep_in_beta=False, guard=False):
    """a (B,H,T)."""
    B, H, T, _ = q.shape
    vh = unbound(q, superposition(k, v, keep if keep_in_beta else None))
    return torch.stack(
        [
            torch.stack([torch.stack([cosine(v[b, h, t], vh[b, h, t], guard) for t in range(T)]) for h in range(H)])
            for b in range(B)
        ]
    )


def weights(a, keep=None, mask_form="code"):
    """softmax over positions, (B,H,T)."""
    B, H, T = a.shape
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            kept = [_keep(keep, b, t) for t in range(T)]
            if mask_form == "code":
                z = [a[b, h, t] + (0.0 if kept[t] else -1e9) for t in range(T)]
                seen = list(range(T))
            else:
                z = [a[b, h, t] for t in range(T)]
                seen = [t for t in range(T) if kept[t]]
            if not seen:
                heads.append(torch.stack([a.new_zeros(())] * T))
                continue
            top = max(float(z[t].detach()) for t in seen)
            total = sum(torch.exp(z[t] - top) for t in seen)
            heads.append(
                torch.stack([torch.exp(z[t] - top) / total if t in seen else a.new_zeros(()) for t in range(T)])
            )
        out.append(torch.stack(heads))
    return torch.stack(out)


def core(q, k, v, keep=None, mask_form="code", keep_in_beta=False, guard=False):
    """out_t = w_t v_t, (B,H,T,D)."""
    B, H, T, _ = q.shape
    w = weights(responses(q, k, v, keep, keep_in_beta, guard), keep, mask_form)
    return torch.stack(
        [torch.stack([torch.stack([w[b, h, t] * v[b, h, t] for t in range(T)]) for h in range(H)]) for b in range(B)]
    )


def core_causal(q, k, v, causal_response="own", guard=False):
    """Inferred causal form."""
    B, H, T, D = q.shape
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            beta, prefix = k.new_zeros(D), []
            for t in range(T):
                beta = beta + bind(k[b, h, t], v[b, h, t])
                prefix.append(beta)
            rows = []
            for t in range(T):
                a = [
                    cosine(v[b, h, s], unbind(prefix[s] if causal_response == "own" else prefix[t], q[b, h, s]), guard)
                    for s in range(t + 1)
                ]
                total = sum(torch.exp(c) for c in a)
                rows.append(torch.exp(a[t]) / total * v[b, h, t])
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def _linear(vector, W, bias=None):
    out = torch.stack([sum(W[o, m] * vector[m] for m in range(W.shape[1])) for o in range(W.shape[0])])
    return out if bias is None else out + bias


def split(x, W, H, bias=None):
    B, T, _ = x.shape
    D = W.shape[0] // H
    full = [[_linear(x[b, t], W, bias) for t in range(T)] for b in range(B)]
    return torch.stack(
        [
            torch.stack([torch.stack([full[b][t][h * D : (h + 1) * D] for t in range(T)]) for h in range(H)])
            for b in range(B)
        ]
    )


def hrrformer(x, W_q, W_k, W_v, W_o, H, keep=None, b_q=None, b_k=None, b_v=None, b_o=None, causal=False, **more):
    """The whole layer (biases: malware variant)."""
    B, T, _ = x.shape
    q, k, v = split(x, W_q, H, b_q), split(x, W_k, H, b_k), split(x, W_v, H, b_v)
    out = core_causal(q, k, v, **more) if causal else core(q, k, v, keep, **more)
    return torch.stack(
        [
            torch.stack([_linear(torch.cat([out[b, h, t] for h in range(H)]), W_o, b_o) for t in range(T)])
            for b in range(B)
        ]
    )

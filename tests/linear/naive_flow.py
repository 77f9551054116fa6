"""Flow-Attention (Wu et al. 2022, arXiv 2202.06258), by loops over sources and sinks."""

import torch
from torch import Tensor


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def naive_flow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    clamp: float | None = 1.0,
    eps: float = 1e-6,
    keep: Tensor | None = None,
) -> Tensor:
    """q (B,H,T,D), k (B,H,S,D), v (B,H,S,V) -> (B,H,T,V), float64. q and k come BEFORE the sigmoid.

    keep (B,S) bool, True = a real token. Not causal: sources that are not real take no part at all; where there is
    self-attention (T == S) the sinks of the same places take no part in sums over sinks either (the sink's own output
    is computed all the same), and T and S are the counts of real tokens.
    Causal (T == S): as if the tokens that are not real were not there; outputs at their places are 0.
    """
    q, k, v = q.double().sigmoid(), k.double().sigmoid(), v.double()
    (B, H, T, _), S, V = q.shape, k.shape[2], v.shape[3]
    rows = []
    for b in range(B):
        sources = [j for j in range(S) if keep is None or bool(keep[b, j])]
        sinks = [i for i in range(T) if keep is None or S != T or bool(keep[b, i])]
        for h in range(H):
            if causal:
                rows.append(_causal(q[b, h], k[b, h], v[b, h], sources, clamp, eps))
            else:
                rows.append(_normal(q[b, h], k[b, h], v[b, h], sources, sinks, clamp, eps))
    return torch.stack(rows).reshape(B, H, T, V) if rows else torch.zeros(B, H, T, V, dtype=torch.float64)


def _normal(
    q: Tensor, k: Tensor, v: Tensor, sources: list[int], sinks: list[int], clamp: float | None, eps: float
) -> Tensor:
    T, S = q.shape[0], len(sources)
    out = []
    none = torch.zeros(q.shape[1], dtype=torch.float64)
    sum_k = sum((k[j] for j in sources), none)
    sum_q = sum((q[i] for i in sinks), none)
    incoming = [_dot(q[i] + eps, sum_k + eps) for i in range(T)]  # I_i
    outgoing = {j: _dot(k[j] + eps, sum_q + eps) for j in sources}  # O_j
    sum_k_per_o = sum((k[j] / outgoing[j] for j in sources), none)
    sum_q_per_i = sum((q[i] / incoming[i] for i in sinks), none)
    conserved_in = [_dot(q[i] + eps, sum_k_per_o + eps) for i in range(T)]
    conserved_out = {j: _dot(k[j] + eps, sum_q_per_i + eps) for j in sources}
    if clamp is not None:
        conserved_out = {j: o.clamp(-clamp, clamp) for j, o in conserved_out.items()}
    e = {j: torch.exp(o) for j, o in conserved_out.items()}
    total = sum(e.values())
    competition = {j: S * e[j] / total for j in sources}
    for i in range(T):
        aggregated = torch.zeros(v.shape[1], dtype=torch.float64)
        for j in sources:
            aggregated = aggregated + _dot(q[i] / incoming[i], k[j]) * competition[j] * v[j]
        allocation = torch.sigmoid(conserved_in[i] * len(sinks) / S) if S else torch.zeros(())
        out.append(allocation * aggregated)
    return torch.stack(out) if out else torch.zeros(0, v.shape[1], dtype=torch.float64)


def _causal(q: Tensor, k: Tensor, v: Tensor, real: list[int], clamp: float | None, eps: float) -> Tensor:
    out = [torch.zeros(v.shape[1], dtype=torch.float64) for _ in range(q.shape[0])]
    none = torch.zeros(q.shape[1], dtype=torch.float64)
    incoming: dict[int, Tensor] = {}
    outgoing: dict[int, Tensor] = {}
    exp_out: dict[int, Tensor] = {}
    competition: dict[int, Tensor] = {}
    for n, i in enumerate(real, start=1):
        seen = real[:n]
        incoming[i] = _dot(q[i] + eps, sum((k[j] for j in seen), none) + eps) / n
        outgoing[i] = _dot(k[i] + eps, sum((q[j] for j in seen), none) + eps) / n
        conserved_in = _dot(q[i] + eps, sum((k[j] / outgoing[j] for j in seen), none) + eps) / n
        conserved_out = _dot(k[i] + eps, sum((q[j] / incoming[j] for j in seen), none) + eps) / n
        if clamp is not None:
            conserved_out = conserved_out.clamp(-clamp, clamp)
        exp_out[i] = torch.exp(conserved_out)
        competition[i] = n * exp_out[i] / sum(exp_out[j] for j in seen)
        aggregated = torch.zeros(v.shape[1], dtype=torch.float64)
        for j in seen:
            aggregated = aggregated + _dot(q[i] / (incoming[i] * n), k[j]) * competition[j] * v[j]
        out[i] = torch.sigmoid(conserved_in) * aggregated
    return torch.stack(out) if out else torch.zeros(0, v.shape[1], dtype=torch.float64)

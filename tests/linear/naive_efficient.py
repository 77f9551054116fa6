"""Efficient Attention (Shen et al. 2021, arXiv 1812.01243), by explicit weights and loops."""

import math

import torch
from torch import Tensor


def naive_efficient(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, norm: str = "softmax") -> Tensor:
    """q (B,H,T,D), k (B,H,S,D), v (B,H,S,V), keep (B,S) bool (True = a real key) -> (B,H,T,V), float64.

    softmax:  A[t,s] = sum_d rho_q(q)[t,d] rho_k(k)[s,d], rho_q softmax over the D features of token t,
              rho_k softmax over the positions for each feature d; out_t = sum_s A[t,s] v_s.
    scaling:  A[t,s] = q_t . k_s / n, n the number of (real) keys.
    Rows that have no key give 0.
    """
    q, k, v = q.double(), k.double(), v.double()
    (B, H, T, D), S, V = q.shape, k.shape[2], v.shape[3]
    out = torch.zeros(B, H, T, V, dtype=torch.float64)
    for b in range(B):
        keys = [s for s in range(S) if keep is None or bool(keep[b, s])]
        for h in range(H):
            # rho_k[s][d]
            rho_k: dict[int, list[Tensor]] = {s: [] for s in keys}
            for d in range(D):
                if not keys or norm == "scaling":
                    break
                top = max(float(k[b, h, s, d].detach()) for s in keys)
                e = {s: torch.exp(k[b, h, s, d] - top) for s in keys}
                total = sum(e.values())
                for s in keys:
                    rho_k[s].append(e[s] / total)
            for t in range(T):
                if norm == "softmax":
                    top = max(float(q[b, h, t, d].detach()) for d in range(D))
                    e_q = [torch.exp(q[b, h, t, d] - top) for d in range(D)]
                    total_q = sum(e_q)
                for s in keys:
                    weight = torch.zeros((), dtype=torch.float64)
                    for d in range(D):
                        if norm == "softmax":
                            weight = weight + e_q[d] / total_q * rho_k[s][d]
                        else:
                            root = math.sqrt(len(keys))
                            weight = weight + (q[b, h, t, d] / root) * (k[b, h, s, d] / root)
                    out = out.index_put((torch.tensor(b), torch.tensor(h), torch.tensor(t)), weight * v[b, h, s], True)
    return out

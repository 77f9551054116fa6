"""Naive decayed linear recurrence, one time step after another."""

import torch


def naive_linear_scan(q, k, v, decay=None, state=None):
    """o_t = q_t S_t with S_t = d_t * S_{t-1} + k_t v_t^T: the key of time t counts with weight 1.

    q, k (B, H, T, D); v (B, H, T, V); decay (factors, not logarithms) None = 1, or (B, H, T): one factor per time
    step, or (B, H, T, D): one per time step and key feature; state (B, H, D, V), None = 0.
    Returns (outputs (B, H, T, V), last state (B, H, D, V)).
    """
    B, H, T, D = q.shape
    V = v.shape[-1]
    outputs, states = [], []
    for b in range(B):
        for h in range(H):
            S = torch.zeros(D, V, dtype=q.dtype) if state is None else state[b, h]
            rows = []
            for t in range(T):
                if decay is not None:
                    d = decay[b, h, t]
                    S = d * S if d.ndim == 0 else d[:, None] * S
                S = S + k[b, h, t][:, None] * v[b, h, t][None, :]
                rows.append(torch.einsum("d,dv->v", q[b, h, t], S))
            outputs.append(torch.stack(rows) if rows else v.new_zeros(0, V))
            states.append(S)
    return torch.stack(outputs).reshape(B, H, T, V), torch.stack(states).reshape(B, H, D, V)

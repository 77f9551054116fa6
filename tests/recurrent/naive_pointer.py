"""Pointer Networks written out with loops: one sample, one decoder step, one input position at a time."""

import torch
from torch import Tensor


def naive_pointer(
    e: Tensor,
    d: Tensor,
    W1: Tensor,
    W2: Tensor,
    v: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """e (B, S, M) encoder states, d (B, T, N) decoder states, W1 (A, M), W2 (A, N), v (A) -> log p (B, T, S).

    u_ij = v . tanh(W1 e_j + b1 + W2 d_i + b2); log p_i = log softmax_j(u_ij). No scale, no context vector.
    keep (B, S) or (B, T, S), True = may be pointed at; others get -inf before the softmax.
    """
    B, S, _ = e.shape
    T, A = d.shape[1], v.shape[0]
    samples = []
    for b in range(B):
        steps = []
        for i in range(T):
            scores: list[Tensor | None] = []
            for j in range(S):
                allowed = keep is None or bool(keep[b, j] if keep.ndim == 2 else keep[b, i, j])
                if not allowed:
                    scores.append(None)
                    continue
                u = e.new_zeros(())
                for a in range(A):
                    inner = torch.dot(W1[a], e[b, j]) + torch.dot(W2[a], d[b, i])
                    if b1 is not None:
                        inner = inner + b1[a]
                    if b2 is not None:
                        inner = inner + b2[a]
                    u = u + v[a] * torch.tanh(inner)
                scores.append(u)
            given = [u for u in scores if u is not None]
            largest = max(float(u) for u in given)
            total = torch.log(sum(((u - largest).exp() for u in given), e.new_zeros(()))) + largest
            steps.append(torch.stack([e.new_tensor(-torch.inf) if u is None else u - total for u in scores]))
        samples.append(torch.stack(steps))
    return torch.stack(samples)


def naive_ptr_net(
    inputs: Tensor,
    e: Tensor,
    start: Tensor,
    h: Tensor,
    c: Tensor,
    tours: Tensor,
    Wih: Tensor,
    Whh: Tensor,
    bih: Tensor,
    bhh: Tensor,
    W1: Tensor,
    W2: Tensor,
    v: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    once: bool = True,
) -> Tensor:
    """The decoder, teacher forced: inputs (B, S, E) embedded elements, e (B, S, M), start (B, E), h, c (B, M),
    tours (B, T) indices, LSTM weights (4M, E), (4M, M), (4M), (4M) with gates i, f, g, o -> log p (B, T, S).

    d_i, c_i = LSTM(x_i, (d_{i-1}, c_{i-1})); x_{i+1} = inputs[tours[i]]. `once`: visited positions get -inf
    before the softmax.
    """
    B, S, _ = e.shape
    M = h.shape[1]
    samples = []
    for b in range(B):
        x, hidden, cell = start[b], h[b], c[b]
        keep = torch.ones(1, S, dtype=torch.bool)
        steps = []
        for i in range(tours.shape[1]):
            gates = torch.stack(
                [torch.dot(Wih[r], x) + bih[r] + torch.dot(Whh[r], hidden) + bhh[r] for r in range(4 * M)]
            )
            new_cell, new_hidden = [], []
            for m in range(M):
                into, forget = torch.sigmoid(gates[m]), torch.sigmoid(gates[M + m])
                candidate, out = torch.tanh(gates[2 * M + m]), torch.sigmoid(gates[3 * M + m])
                new_cell.append(forget * cell[m] + into * candidate)
                new_hidden.append(out * torch.tanh(new_cell[-1]))
            hidden, cell = torch.stack(new_hidden), torch.stack(new_cell)
            steps.append(naive_pointer(e[b : b + 1], hidden[None, None], W1, W2, v, b1, b2, keep)[0, 0])
            chosen = int(tours[b, i])
            x = inputs[b, chosen]
            if once:
                keep = keep.clone()
                keep[0, chosen] = False
        samples.append(torch.stack(steps))
    return torch.stack(samples)

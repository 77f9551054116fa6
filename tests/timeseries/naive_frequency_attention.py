"""ETSformer's frequency attention: the strongest Fourier terms of a window, carried on beyond it, sums written out."""

import math

import torch
from torch import Tensor


def naive_frequency_attention(x: Tensor, horizon: int, K: int) -> Tensor:
    """x (B, L, C) -> (B, L + horizon, C), per batch row and channel.

    X_f = sum_t x_t exp(-2 pi i f t / L) for f = 1 .. floor((L - 1) / 2); the K bins of largest |X_f| make
    s_t = sum_f (2 |X_f| / L) cos(2 pi f t / L + arg X_f), t = 0 .. L + horizon - 1. Gradients flow through
    amplitude and phase, not through the choice.
    """
    B, L, C = x.shape
    batch = []
    for b in range(B):
        channels = []
        for c in range(C):
            terms = []
            for f in range(1, (L - 1) // 2 + 1):
                re = sum(x[b, t, c] * math.cos(2 * math.pi * f * t / L) for t in range(L))
                im = sum(-x[b, t, c] * math.sin(2 * math.pi * f * t / L) for t in range(L))
                terms.append((float((re**2 + im**2).detach()), f, re, im))
            chosen = sorted(terms, key=lambda term: -term[0])[:K]
            steps = []
            for t in range(L + horizon):
                s = torch.zeros((), dtype=x.dtype)
                for _, f, re, im in chosen:
                    angle = 2 * math.pi * f * t / L
                    # |X| cos(angle + arg X) = Re X cos(angle) - Im X sin(angle)
                    s = s + 2 / L * (re * math.cos(angle) - im * math.sin(angle))
                steps.append(s)
            channels.append(torch.stack(steps))
        batch.append(torch.stack(channels, 1))
    return torch.stack(batch)

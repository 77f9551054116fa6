"""Luong's global and local attention written out with loops: one sample, one decoder step, one position at a time."""

import math

import torch
from torch import Tensor


def naive_luong_score(
    h: Tensor, e: Tensor, score: str, Wa: Tensor | None = None, va: Tensor | None = None, ba: Tensor | None = None
) -> Tensor:
    """One decoder state h (M) against one encoder state e (M_e): dot h.e; general h . (Wa e), Wa (M, M_e);
    concat va . tanh(Wa [h; e] + ba), Wa (A, M + M_e), va, ba (A). Unscaled."""
    if score == "dot":
        return torch.dot(h, e)
    assert Wa is not None
    if score == "general":
        return sum((h[m] * torch.dot(Wa[m], e) for m in range(h.shape[0])), h.new_zeros(()))
    assert score == "concat"
    assert va is not None
    pair = torch.cat([h, e])
    bias = torch.zeros_like(va) if ba is None else ba
    return sum((va[a] * torch.tanh(torch.dot(Wa[a], pair) + bias[a]) for a in range(va.shape[0])), h.new_zeros(()))


def _softmax(scores: list[Tensor]) -> list[Tensor]:
    largest = max(float(s) for s in scores)
    powers = [(s - largest).exp() for s in scores]
    total = sum(powers, torch.zeros_like(powers[0]))
    return [p / total for p in powers]


def naive_luong_align(
    h: Tensor,
    H: Tensor,
    *,
    score: str = "general",
    Wa: Tensor | None = None,
    va: Tensor | None = None,
    ba: Tensor | None = None,
    lengths: Tensor | None = None,
    window: str = "global",
    D: int = 10,
    Wp: Tensor | None = None,
    vp: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """h (B, T, M) current decoder states, H (B, S, M_e) encoder states, lengths (B) of the sources -> a (B, T, S).

    global: softmax over the source. Local, of half-width D, cut at the source's ends:
    "m": centre p = start + t clipped to the last real position; softmax over the window only.
    "p": p = length * sigmoid(vp . tanh(Wp h_t)), window around floor(p) (at most length - 1), the window's
    softmax times exp(-(s - p)^2 / (2 (D/2)^2)), not renormalised; 0-based positions s.
    Sources of length 0 give rows of zeros.
    """
    B, T, _ = h.shape
    S = H.shape[1]
    samples = []
    for b in range(B):
        length = S if lengths is None else int(lengths[b])
        steps = []
        for t in range(T):
            centre, p = 0, None
            if window == "m":
                centre = min(start + t, length - 1)
            elif window == "p":
                assert Wp is not None
                assert vp is not None
                inner = sum(
                    (vp[a] * torch.tanh(torch.dot(Wp[a], h[b, t])) for a in range(vp.shape[0])), h.new_zeros(())
                )
                p = length / (1 + (-inner).exp())
                centre = min(math.floor(float(p)), length - 1)
            else:
                assert window == "global"
            seen = [s for s in range(length) if window == "global" or abs(s - centre) <= D]
            row = [h.new_zeros(()) for _ in range(S)]
            if seen:
                weights = _softmax([naive_luong_score(h[b, t], H[b, s], score, Wa, va, ba) for s in seen])
                for s, w in zip(seen, weights, strict=True):
                    row[s] = w if p is None else w * (-((s - p) ** 2) / (2 * (D / 2) ** 2)).exp()
            steps.append(torch.stack(row))
        samples.append(torch.stack(steps))
    return torch.stack(samples)


def naive_luong(
    h: Tensor,
    H: Tensor,
    Wc: Tensor,
    *,
    score: str = "general",
    Wa: Tensor | None = None,
    va: Tensor | None = None,
    ba: Tensor | None = None,
    lengths: Tensor | None = None,
    window: str = "global",
    D: int = 10,
    Wp: Tensor | None = None,
    vp: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """The attentional state tanh(Wc [c_t; h_t]), Wc (M, M_e + M), with c_t = sum_s a_ts H_s -> (B, T, M)."""
    a = naive_luong_align(
        h, H, score=score, Wa=Wa, va=va, ba=ba, lengths=lengths, window=window, D=D, Wp=Wp, vp=vp, start=start
    )
    samples = []
    for b in range(h.shape[0]):
        steps = []
        for t in range(h.shape[1]):
            context = H.new_zeros(H.shape[-1])
            for s in range(H.shape[1]):
                if float(a[b, t, s].detach()) != 0:
                    context = context + a[b, t, s] * H[b, s]
            both = torch.cat([context, h[b, t]])
            steps.append(torch.stack([torch.tanh(torch.dot(Wc[m], both)) for m in range(Wc.shape[0])]))
        samples.append(torch.stack(steps))
    return torch.stack(samples)

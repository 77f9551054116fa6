"""ConvBERT's mixed attention (self-attention heads beside span-based dynamic convolution heads), term by term."""

import math

import torch
from torch import Tensor


def naive_span_conv(
    x: Tensor,
    Wq: Tensor,
    bq: Tensor,
    Wk: Tensor,
    bk: Tensor,
    Wv: Tensor,
    bv: Tensor,
    Wu: Tensor,
    bu: Tensor,
    c: Tensor,
    Wp: Tensor,
    bp: Tensor,
    Wf: Tensor,
    bf: Tensor,
    *,
    num_heads: int,
    keep: Tensor | None = None,
    padding: str = "attention",
) -> Tensor:
    """Steps 1 to 6: x (B, T, M) -> (B, T, 2 H D), attention heads first; no output projection.

    Wq, Wk, Wv, Wu (N, M) and biases (N), N = H D; c (M, K), K odd; Wp (N, M), bp (N); Wf (H K, N), bf (H K);
    `num_heads` is H, the heads of each kind. keep (B, T), True = a real token: with padding="attention" it reaches
    step 5 only, as in both released codes; with padding="everywhere" padded tokens also count as outside the sequence
    (zeros of x in step 2 and of u in step 4). A query without a key to see gives 0 in step 5.
    """
    B, T, _ = x.shape
    H, K = num_heads, c.shape[1]
    r, D = (K - 1) // 2, Wq.shape[0] // num_heads
    rows = []
    for b in range(B):
        real = [True] * T if keep is None else [bool(one) for one in keep[b]]
        inside = real if padding == "everywhere" else [True] * T
        q, k, v, u = ([W @ x[b, t] + bias for t in range(T)] for W, bias in ((Wq, bq), (Wk, bk), (Wv, bv), (Wu, bu)))
        out = []
        for t in range(T):
            dw = torch.zeros_like(x[b, t])
            for j in range(K):
                s = t + j - r
                if 0 <= s < T and inside[s]:
                    dw = dw + c[:, j] * x[b, s]
            kernel = Wf @ ((Wp @ dw + bp) * q[t]) + bf
            attended, convolved = [], []
            for h in range(H):
                head = slice(h * D, (h + 1) * D)
                keys = [s for s in range(T) if real[s]]
                logits = [torch.dot(q[t][head], k[s][head]) / math.sqrt(D) for s in keys]
                largest = max((float(one.detach()) for one in logits), default=0.0)
                exps = [torch.exp(one - largest) for one in logits]
                a = torch.zeros(D, dtype=x.dtype)
                for weight, s in zip(exps, keys, strict=True):
                    a = a + weight / sum(exps) * v[s][head]
                attended.append(a)
                taps = kernel[h * K : (h + 1) * K]
                exps = [torch.exp(tap - float(taps.detach().max())) for tap in taps]
                o = torch.zeros(D, dtype=x.dtype)
                for j in range(K):
                    s = t + j - r
                    if 0 <= s < T and inside[s]:
                        o = o + exps[j] / sum(exps) * u[s][head]
                convolved.append(o)
            out.append(torch.cat(attended + convolved))
        rows.append(torch.stack(out))
    return torch.stack(rows)

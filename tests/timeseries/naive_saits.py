"""SAITS: self-attention that never sees its own time step, and the imputation model around it, in loops."""

import math

import torch
from torch import Tensor


def naive_diagonal_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """out_i = sum_{j != i} softmax_j(q_i . k_j / sqrt(D)) v_j and its weights.

    q, k (B, H, T, D), v (B, H, T, V), keep (B, T) True = a real step -> (B, H, T, V), (B, H, T, T). Where no other step
    is there to see, output and weights are 0. `diagonal` False: the ablation, in which a step sees itself as well.
    """
    B, H, T, D = q.shape
    out, weights = [], []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                keys = [j for j in range(T) if (j != i or not diagonal) and (keep is None or bool(keep[b, j]))]
                logits = [torch.dot(q[b, h, i], k[b, h, j]) / math.sqrt(D) for j in keys]
                largest = max((float(one.detach()) for one in logits), default=0.0)
                exps = [torch.exp(one - largest) for one in logits]
                row, o = [torch.zeros((), dtype=q.dtype)] * T, torch.zeros_like(v[b, h, i])
                for one, j in zip(exps, keys, strict=True):
                    row[j] = one / sum(exps)
                    o = o + row[j] * v[b, h, j]
                out.append(o)
                weights.append(torch.stack(row))
    return torch.stack(out).reshape(B, H, T, -1), torch.stack(weights).reshape(B, H, T, T)


def naive_dmsa(
    x: Tensor, Wq: Tensor, Wk: Tensor, Wv: Tensor, Wo: Tensor, num_heads: int, diagonal: bool = True
) -> tuple[Tensor, Tensor]:
    """The layer, no biases: x (B, T, M); Wq, Wk (h dk, M), Wv (h dv, M), Wo (M, h dv) -> (B, T, M), weights."""
    B, T, _ = x.shape
    q, k, v = (
        torch.stack([torch.stack([(W @ x[b, t]).reshape(num_heads, -1) for t in range(T)], 1) for b in range(B)])
        for W in (Wq, Wk, Wv)
    )
    out, weights = naive_diagonal_attention(q, k, v, diagonal=diagonal)
    y = torch.stack([torch.stack([Wo @ out[b, :, t].reshape(-1) for t in range(T)]) for b in range(B)])
    return y, weights


def _norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean = z.mean()
    return (z - mean) / torch.sqrt(((z - mean) ** 2).mean() + eps) * weight + bias


def _tokens(z: Tensor, f) -> Tensor:
    """f of every (M,) vector."""
    return torch.stack([torch.stack([f(z[b, t]) for t in range(z.shape[1])]) for b in range(z.shape[0])])


def naive_saits_layer(x: Tensor, p: dict[str, Tensor], num_heads: int, diagonal: bool = True) -> tuple[Tensor, Tensor]:
    """x + DMSA(LN1 x), then x + W2 relu(W1 LN2 x + b1) + b2 (LN eps 1e-5 and 1e-6) -> (B, T, M), attention weights.

    p: Wq, Wk, Wv, Wo, n1_weight, n1_bias, n2_weight, n2_bias, W1, b1, W2, b2.
    """
    normed = _tokens(x, lambda z: _norm(z, p["n1_weight"], p["n1_bias"], 1e-5))
    y, weights = naive_dmsa(normed, p["Wq"], p["Wk"], p["Wv"], p["Wo"], num_heads, diagonal)
    x = x + y

    def feed(z: Tensor) -> Tensor:
        hidden = torch.relu(p["W1"] @ _norm(z, p["n2_weight"], p["n2_bias"], 1e-6) + p["b1"])
        return z + p["W2"] @ hidden + p["b2"]

    return _tokens(x, feed), weights


def naive_saits(
    X: Tensor,
    Mk: Tensor,
    p: dict[str, Tensor],
    blocks: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]],
    heads: int,
    diagonal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The model by the released code's reading: X (B, T, D) with 0 where missing, Mk (B, T, D) 1 = observed.

    p: We, Wa (M, 2 D), or (M, D) for the input without mask, be, ba (M); Wz, Wb (D, M), bz, bb (D); Wg (D, D), bg (D);
    Wc (D, D + T), bc (D). blocks: the layers of the two blocks in the order in which they run, so that one may stand
    there several times. Returns X1, X2, X3 and the completed series Xc.
    """
    B, T, _ = X.shape
    M = p["We"].shape[0]
    place = torch.zeros(T, M, dtype=X.dtype)
    for t in range(T):
        for m in range(M):
            angle = t / 10000 ** (2 * (m // 2) / M)
            place[t, m] = math.sin(angle) if m % 2 == 0 else math.cos(angle)

    def embed(series: Tensor, W: Tensor, bias: Tensor) -> Tensor:
        both = torch.cat([series, Mk], -1) if W.shape[1] > series.shape[-1] else series
        return torch.stack([torch.stack([W @ both[b, t] + bias + place[t] for t in range(T)]) for b in range(B)])

    z = embed(X, p["We"], p["be"])
    for layer in blocks[0]:
        z, _ = naive_saits_layer(z, layer, heads, diagonal)
    X1 = _tokens(z, lambda one: p["Wz"] @ one + p["bz"])
    filled = Mk * X + (1 - Mk) * X1
    z = embed(filled, p["Wa"], p["ba"])
    for layer in blocks[1]:
        z, weights = naive_saits_layer(z, layer, heads, diagonal)
    X2 = _tokens(z, lambda one: p["Wg"] @ torch.relu(p["Wb"] @ one + p["bb"]) + p["bg"])
    mean = sum(weights[:, h] for h in range(heads)) / heads
    both = torch.cat([Mk, mean], -1)
    eta = _tokens(both, lambda one: torch.sigmoid(p["Wc"] @ one + p["bc"]))
    X3 = (1 - eta) * X2 + eta * X1
    return X1, X2, X3, Mk * X + (1 - Mk) * X3


def naive_mae(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """sum |a - b| m / (sum m + 1e-9)."""
    return (abs(a - b) * m).sum() / (m.sum() + 1e-9)

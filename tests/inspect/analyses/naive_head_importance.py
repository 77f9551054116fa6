"""Michel, Levy and Neubig's head importance and greedy pruning in plain loops."""

import torch
from torch import Tensor


def naive_gate_importance(context: Tensor, gradient: Tensor) -> Tensor:
    """The paper's I_h: mean over examples of |sum over tokens and widths of c dL/dc|. (L, B, H, T, D) -> (L, H)."""
    L, B, H, T, D = context.shape
    out = torch.zeros(L, H, dtype=torch.float64)
    for layer in range(L):
        for h in range(H):
            for b in range(B):
                total = 0.0
                for t in range(T):
                    for d in range(D):
                        total += float(context[layer, b, h, t, d] * gradient[layer, b, h, t, d])
                out[layer, h] += abs(total) / B
    return out


def naive_token_importance(context: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """The authors' code: |.| token by token; divided by the tokens, in the last layer by the examples."""
    L, B, H, T, D = context.shape
    out = torch.zeros(L, H, dtype=torch.float64)
    tokens = sum(int(mask[b, t]) for b in range(B) for t in range(T))
    for layer in range(L):
        for h in range(H):
            for b in range(B):
                for t in range(T):
                    total = sum(float(context[layer, b, h, t, d] * gradient[layer, b, h, t, d]) for d in range(D))
                    out[layer, h] += abs(total)
            out[layer, h] /= B if layer == L - 1 else tokens
    return out


def naive_normalised(importance: Tensor) -> Tensor:
    out = importance.clone()
    for layer in range(len(out)):
        length = sum(float(x) ** 2 for x in importance[layer]) ** 0.5
        for h in range(out.shape[1]):
            out[layer, h] /= length + 1e-20
    return out


def naive_pruned(importance: Tensor, percents: list[int], keep: int) -> list[Tensor]:
    """Gates after each percentage of heads; the `keep` best of each layer stay."""
    L, H = importance.shape
    protected = set()
    for layer in range(L):
        best = sorted(range(H), key=lambda h: float(importance[layer, h]), reverse=True)
        protected |= {(layer, h) for h in best[:keep]}
    heads = [(layer, h) for layer in range(L) for h in range(H) if (layer, h) not in protected]
    order = sorted((float(importance[at]), at) for at in heads)
    found = []
    for percent in percents:
        gates = torch.ones(L, H, dtype=torch.bool)
        for _, (layer, h) in order[: min(int(L * H * percent / 100), L * H - keep * L)]:
            gates[layer, h] = False
        found.append(gates)
    return found

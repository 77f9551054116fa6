"""FlexAttention pair by pair, from the sheet's equations 1, 2, 4 and 5 alone: Python loops over tensors of one number.

Autograd runs through the loops, so that this is also the truth for gradients, those to captured tensors included.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """y (B, H, T, V) and the natural log-sum-exp (B, H, T).

    `first` is what q_idx of the first query is: 0 in torch, S - T in regard.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    ys, lses = [], []
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                scores, seen = [], []
                for s in range(S):
                    at = [torch.tensor(n) for n in (b, h, t + first, s)]
                    score = scale * (q[b, h, t] * k[b, g, s]).sum()
                    if score_mod is not None:
                        score = score_mod(score, *at)
                    if (mask_mod is None or bool(mask_mod(*at))) and float(score.detach()) != -math.inf:
                        scores.append(score)
                        seen.append(s)
                if not seen:
                    ys.append(torch.zeros(v.shape[3], dtype=v.dtype))
                    lses.append(torch.tensor(-math.inf, dtype=v.dtype))
                    continue
                top = max(float(x.detach()) for x in scores)
                powers = [(x - top).exp() for x in scores]
                total = sum(powers)
                ys.append(sum(p * v[b, g, s] for p, s in zip(powers, seen, strict=True)) / total)
                lses.append(top + total.log())
    return torch.stack(ys).view(B, H, T, -1), torch.stack(lses).view(B, H, T)

"""HeadMask written out with loops: heads' outputs set to 0, chosen at random or by importance."""

import torch
from torch import Tensor


def naive_headmask(heads: Tensor, masked: list[int]) -> Tensor:
    """heads (B, H, T, V) outputs of the heads before the output projection, masked = head indices -> the same shape.

    The listed heads give 0 for the whole batch; the others are unchanged (no rescaling).
    """
    out = torch.zeros_like(heads)
    for b in range(heads.shape[0]):
        for h in range(heads.shape[1]):
            if h not in masked:
                out[b, h] = heads[b, h]
    return out


def naive_head_importance(heads: Tensor, gradients: Tensor) -> Tensor:
    """heads, gradients of the loss with respect to them (B, H, T, V) -> importance (H).

    I_h = mean over samples of |sum over tokens and channels of heads * gradients|, which is |dL/dxi_h| for a gate
    xi_h on head h (Michel et al. 2019).
    """
    B, H, T, V = heads.shape
    found = []
    for h in range(H):
        total = heads.new_zeros(())
        for b in range(B):
            inner = heads.new_zeros(())
            for t in range(T):
                for c in range(V):
                    inner = inner + heads[b, h, t, c] * gradients[b, h, t, c]
            total = total + inner.abs()
        found.append(total / B)
    return torch.stack(found)


def naive_most_important(importance: Tensor, count: int) -> list[int]:
    """The `count` heads of largest importance, of equals the first; sorted."""
    order = sorted(range(importance.shape[0]), key=lambda h: (-float(importance[h]), h))
    return sorted(order[:count])

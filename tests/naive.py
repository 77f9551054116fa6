"""Small pieces of the oracles in loops, by authors who saw neither code nor tests of this library."""

import torch
from torch import Tensor


def linear(vec: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight (out, in) times vec, number by number."""
    rows = []
    for o in range(weight.shape[0]):
        s = (weight[o] * vec).sum()
        if bias is not None:
            s = s + bias[o]
        rows.append(s)
    return torch.stack(rows)


def softmax(logits: list[Tensor]) -> list[Tensor]:
    """Of numbers in a list."""
    top = max(float(z.detach()) for z in logits)
    e = [torch.exp(z - top) for z in logits]
    total = sum(e[1:], e[0])
    return [z / total for z in e]


def may(allowed, b: int, i: int, j: int) -> bool:
    """Whether query i of row b may see key j; `allowed` is (T, S), (B, T, S) or None, which allows all."""
    if allowed is None:
        return True
    a = allowed[b][i][j] if torch.as_tensor(allowed).dim() == 3 else allowed[i][j]
    return bool(a)

"""Clark et al.'s attention probes in plain loops, after the paper's section 5 and the authors' notebook."""

import math

import torch
from torch import Tensor


def naive_probe(maps: Tensor, weight: Tensor, start: float, end: float, n: int) -> Tensor:
    """(n - 2, n - 1) scores of one sentence: for each word the root, then every word.

    maps (N, T, T); weight (2 N) for both directions, or (n - 2, n - 2, 2 N) by pairs of words plus a last column for
    the root's, that is (n - 2, n - 1, 2 N). The sentence's n tokens begin with [CLS] and end with [SEP].
    """
    N = maps.shape[0]
    out = torch.zeros(n - 2, n - 1, dtype=torch.float64)
    for i in range(n - 2):
        for j in range(n - 1):
            w = weight if weight.dim() == 1 else weight[i, j]
            for k in range(2 * N):
                head, turned = k % N, k >= N

                def value(a: int, b: int, head: int = head, turned: bool = turned) -> float:
                    return float(maps[head, b, a] if turned else maps[head, a, b])

                if j == 0:
                    feature = start * value(i + 1, 0) + end * value(i + 1, n - 1)
                else:
                    feature = value(i + 1, j)
                out[i, j] += float(w[k]) * feature
    return out


def naive_loss(scores: list[Tensor], heads: list[list[int]]) -> float:
    """Cross-entropy summed over all words; heads count words from 1, 0 is the root."""
    total = 0.0
    for table, labels in zip(scores, heads, strict=True):
        for i, label in enumerate(labels):
            total -= float(table[i, label]) - math.log(sum(math.exp(float(x)) for x in table[i]))
    return total


def naive_head_accuracy(maps: Tensor, labels: list[int], n: int, turned: bool) -> float:
    """Share of words whose most attended other word is their head, of one head and one sentence."""
    hits = 0
    for i in range(n - 2):
        best, found = -1.0, -1
        for j in range(n - 2):
            a = 0.0 if i == j else float(maps[j + 1, i + 1] if turned else maps[i + 1, j + 1])
            if a > best:
                best, found = a, j
        hits += found + 1 == labels[i]
    return hits / (n - 2)

"""Clark et al.'s head statistics in plain loops, after the authors' notebook and head_distances.py."""

import math

import torch
from torch import Tensor


def naive_mass(maps: Tensor, keys: list[bool], queries: list[bool], valid: list[bool]) -> float:
    """Of one head and one document: mean over the marked queries of the weight on the marked keys."""
    rows = [i for i in range(len(queries)) if queries[i] and valid[i]]
    return sum(float(maps[i, j]) for i in rows for j in range(len(keys)) if keys[j] and valid[j]) / len(rows)


def naive_offset(maps: Tensor, offset: int, valid: list[bool]) -> float:
    """Weight on the token `offset` further on, over all queries, those without such a token included."""
    rows = [i for i in range(len(valid)) if valid[i]]
    found = [float(maps[i, i + offset]) for i in rows if 0 <= i + offset < len(valid) and valid[i + offset]]
    return sum(found) / len(rows)


def naive_entropy(maps: Tensor, valid: list[bool]) -> float:
    """In nats, each weight first mixed with 0.0001 of the uniform one."""
    rows = [i for i in range(len(valid)) if valid[i]]
    n, total = len(rows), 0.0
    for i in rows:
        for j in rows:
            a = 0.9999 * float(maps[i, j]) + 0.0001 / n
            total -= a * math.log(a)
    return total / n


def naive_distances(maps: list[Tensor], valids: list[list[bool]]) -> Tensor:
    """(N, N) from documents (N, T, T): Jensen-Shannon divergences, summed over all tokens of all documents."""
    N = maps[0].shape[0]
    out = torch.zeros(N, N, dtype=torch.float64)
    for document, valid in zip(maps, valids, strict=True):
        rows = [i for i in range(len(valid)) if valid[i]]
        n = len(rows)
        for a in range(N):
            for b in range(N):
                for i in rows:
                    for j in rows:
                        p = 0.999 * float(document[a, i, j]) + 0.001 / n
                        q = 0.999 * float(document[b, i, j]) + 0.001 / n
                        m = (p + q) / 2
                        out[a, b] += (p * math.log(p / m) + q * math.log(q / m)) / 2
    return out

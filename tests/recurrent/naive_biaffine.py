"""Biaffine attention one number at a time, and trees by trying all, by somebody who saw the equations only."""

import itertools
import math

import torch

from naive import linear

NEGATIVE = -1e32


def leaky_relu(u, slope=0.1):
    return torch.stack([z if float(z.detach()) >= 0 else slope * z for z in u])


def mlp(r, weight, bias, slope=0.1):
    """eq. 1: (B,T,M) -> (B,T,D)."""
    return torch.stack(
        [
            torch.stack([leaky_relu(linear(r[b, t], weight, bias), slope) for t in range(r.shape[1])])
            for b in range(r.shape[0])
        ]
    )


def _one(v):
    return torch.cat([v, torch.ones(1, dtype=v.dtype)])


def biaffine(x, y, weight, bias_x=True, bias_y=True, scale=0.0):
    """x (B,T,D1), y (B,S,D2), weight (O, D1(+1), D2(+1)) -> (B,O,T,S)."""
    batch = []
    for b in range(x.shape[0]):
        outputs = []
        for o in range(weight.shape[0]):
            rows = []
            for i in range(x.shape[1]):
                left = _one(x[b, i]) if bias_x else x[b, i]
                row = []
                for j in range(y.shape[1]):
                    right = _one(y[b, j]) if bias_y else y[b, j]
                    s = torch.zeros((), dtype=x.dtype)
                    for p in range(left.shape[0]):
                        s = s + left[p] * (weight[o, p] * right).sum()
                    row.append(s / x.shape[-1] ** scale)
                rows.append(torch.stack(row))
            outputs.append(torch.stack(rows))
        batch.append(torch.stack(outputs))
    return torch.stack(batch)


def biaffine_low_rank(x, y, w0, w1, bias_x=True, bias_y=True):
    """w0 (O, D1(+1)), w1 (O, D2(+1)) -> (B,O,T,S)."""
    batch = []
    for b in range(x.shape[0]):
        outputs = []
        for o in range(w0.shape[0]):
            left = [(w0[o] * (_one(v) if bias_x else v)).sum() for v in x[b]]
            right = [(w1[o] * (_one(v) if bias_y else v)).sum() for v in y[b]]
            outputs.append(torch.stack([torch.stack([l * r for r in right]) for l in left]))
        batch.append(torch.stack(outputs))
    return torch.stack(batch)


def biaffine_projected(x, y, weight, mlp_x, mlp_y, bias_x=True, bias_y=True):
    """mlp_x, mlp_y: (weight, bias)."""
    return biaffine(mlp(x, *mlp_x), mlp(y, *mlp_y), weight, bias_x, bias_y)


def arc_scores(a_d, a_h, weight, keep=None):
    """eq. 2: weight (1, D+1, D); (B,T,S).  keep (B,S) masks columns (eq. 4)."""
    s = biaffine(a_d, a_h, weight, True, False)[:, 0]
    return s if keep is None else mask_columns(s, keep)


def mask_columns(s, keep):
    low = torch.full((), NEGATIVE, dtype=s.dtype)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([s[b, i, j] if bool(keep[b][j]) else low for j in range(s.shape[2])])
                    for i in range(s.shape[1])
                ]
            )
            for b in range(s.shape[0])
        ]
    )


def label_scores(l_d, l_h, weight):
    """eq. 3: weight (C, D+1, D+1); (B,T,S,C)."""
    s = biaffine(l_d, l_h, weight, True, True)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([torch.stack([s[b, c, i, j] for c in range(s.shape[1])]) for j in range(s.shape[3])])
                    for i in range(s.shape[2])
                ]
            )
            for b in range(s.shape[0])
        ]
    )


def _log_softmax(scores, index):
    top = float(max(z.detach() for z in scores))
    total = sum(torch.exp(z - top) for z in scores)
    return scores[index] - top - torch.log(total)


def arc_label_loss(arcs, labels, heads, kinds, mask):
    """arcs (B,T,S) already column-masked, labels (B,T,S,C), heads kinds mask (B,T); mask: real, without ROOT."""
    arc_terms, label_terms = [], []
    for b in range(arcs.shape[0]):
        for i in range(arcs.shape[1]):
            if bool(mask[b][i]):
                h = int(heads[b][i])
                arc_terms.append(-_log_softmax(list(arcs[b, i]), h))
                label_terms.append(-_log_softmax(list(labels[b, i, h]), int(kinds[b][i])))
    return sum(arc_terms) / len(arc_terms) + sum(label_terms) / len(label_terms)


def is_tree(heads, single_root):
    """heads[1..n-1]; heads[0] ignored."""
    n = len(heads)
    if single_root and sum(1 for i in range(1, n) if heads[i] == 0) != 1:
        return False
    for i in range(1, n):
        seen, at = set(), i
        while at != 0:
            if at in seen:
                return False
            seen.add(at)
            at = heads[at]
    return True


def best_tree(scores, length, single_root=True):
    """scores (T,S) of floats, first `length` tokens are real (with ROOT): heads of length T, by trying everything."""
    s = scores.tolist()
    best, best_heads = -math.inf, None
    for choice in itertools.product(*[[j for j in range(length) if j != i] for i in range(1, length)]):
        heads = [0] + list(choice)
        if is_tree(heads, single_root):
            total = sum(s[i][heads[i]] for i in range(1, length))
            if total > best:
                best, best_heads = total, heads
    return best_heads + [0] * (scores.shape[0] - length)


def decode(scores, length, single_root=True):
    """eq. 6's two steps: argmax if it is a legal tree, otherwise the best tree."""
    greedy = [0] + [max(range(length), key=lambda j: float(scores[i, j])) for i in range(1, length)]
    if is_tree(greedy, single_root):
        return greedy + [0] * (scores.shape[0] - length)
    return best_tree(scores, length, single_root)


def maximum_spanning_arborescence(scores, keep, single_root=True):
    """scores (B,T,T), keep (B,T), padding at the end -> heads (B,T)."""
    return torch.tensor(
        [best_tree(scores[b].detach(), int(sum(bool(k) for k in keep[b])), single_root) for b in range(scores.shape[0])]
    )


def label_choice(labels, heads):
    """argmax label at the chosen head: (B,T)."""
    return torch.tensor(
        [
            [
                max(range(labels.shape[3]), key=lambda c: float(labels[b, i, int(heads[b][i]), c]))
                for i in range(labels.shape[1])
            ]
            for b in range(labels.shape[0])
        ]
    )

"""Human-guided patterns in loops: masks of both tasks, heads of kind "mask" and "fixed", PAL, global relevance.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import torch

from naive import linear, softmax


def same_token(ids, keep_self=False):
    """ids (T) -> (T, T). Summarization: own place taken out, a row without a match is all True. keep_self=True:
    segmentation."""
    T = len(ids)
    a = torch.tensor([[bool(ids[i] == ids[j]) and (keep_self or i != j) for j in range(T)] for i in range(T)])
    for i in range(T):
        if not any(a[i].tolist()):
            a[i] = True
    return a


def sentences(ids, begin=1, end=2):
    """Summarization: square blocks from a class mark to its separator inclusive; rows of other tokens empty."""
    T = len(ids)
    a = torch.zeros(T, T, dtype=torch.bool)
    for s in range(T):
        if int(ids[s]) == begin:
            e = next((j for j in range(s, T) if int(ids[j]) == end), None)
            if e is not None:  # a class mark without separator: nothing is said of it, no block here
                a[s : e + 1, s : e + 1] = True
    return a


def contexts(ids, end=2):
    """Segmentation: parts [0, s) and [s, T) of the (first) separator s; the first token sees everything."""
    T = len(ids)
    s = next(j for j in range(T) if int(ids[j]) == end)
    return torch.tensor([[i == 0 or (i < s) == (j < s) for j in range(T)] for i in range(T)])


def offset(T, n):
    return torch.tensor([[j == i + n for j in range(T)] for i in range(T)])


def patterns(ids, heads, task="summarization", groups=1):
    """(heads, T, T) bool and the list of kinds; heads 4j .. 4j+3 for j < groups, others free. Positional heads are
    always fixed."""
    T, summ = len(ids), task == "summarization"
    four = [
        same_token(ids, keep_self=not summ),
        sentences(ids) if summ else contexts(ids),
        *(offset(T, n if summ else -n) for n in (1, -1)),
    ]
    masks = [four[h % 4] if h < 4 * groups else torch.ones(T, T, dtype=torch.bool) for h in range(heads)]
    return torch.stack(masks), [
        ("mask", "mask", "fixed", "fixed")[h % 4] if h < 4 * groups else "free" for h in range(heads)
    ]


def attention(x, Wq, bq, Wk, bk, Wv, bv, mask, kinds, padding=None, empty="code"):
    """x (B, T, M), mask (B, H, T, T) bool, kinds per head "mask" | "fixed" | "free", padding (B, T) True = padding.
    Returns (B, T, M) without output map and weights (B, H, T, T). empty "code": rows that may see no real key fall
    back to a softmax over all keys (everything has -10000); "zero": output 0 there. With "code" the -10000 is a number
    that is added."""
    B, T, M = x.shape
    H = len(kinds)
    D = M // H
    out, weights = [], []
    for b in range(B):
        q, k, v = ([linear(x[b, t], W, c) for t in range(T)] for W, c in ((Wq, bq), (Wk, bk), (Wv, bv)))
        ws, parts = [], []
        for h in range(H):
            s = slice(h * D, (h + 1) * D)
            for i in range(T):
                ok = [kinds[h] == "free" or bool(mask[b][h][i][j]) for j in range(T)]
                pad = [padding is not None and bool(padding[b][j]) for j in range(T)]
                if empty == "zero" and not any(o and not p for o, p in zip(ok, pad)):
                    ws.append(x.new_zeros(T)), parts.append(x.new_zeros(D))
                    continue
                z = []
                for j in range(T):
                    a = x.new_tensor(float(ok[j])) if kinds[h] == "fixed" else (q[i][s] * k[j][s]).sum()
                    z.append(a / D**0.5 + (-10000.0 if pad[j] or not ok[j] else 0.0))
                p = softmax(z)
                ws.append(torch.stack(p)), parts.append(sum(p[j] * v[j][s] for j in range(T)))
        weights.append(torch.stack(ws).view(H, T, T))
        out.append(torch.stack(parts).view(H, T, D).transpose(0, 1).reshape(T, M))
    return torch.stack(out), torch.stack(weights)


def pal(x, W1, b1, W2, b2, attend):
    """GELU(W2 A(W1 x)); attend: (B, T, R) -> (B, T, R). Biases may be None (the account writes none)."""
    low = attend(torch.stack([torch.stack([linear(t, W1, b1) for t in row]) for row in x]))
    return torch.nn.functional.gelu(torch.stack([torch.stack([linear(t, W2, b2) for t in row]) for row in low]))


def relevance(weights, pattern):
    """Share of weight on pairs of the pattern: mean over inputs of (1/T) sum_ij a_ij [P]; weights, pattern (B, T, T),
    one head."""
    B, T, _ = weights.shape
    return sum(weights[b, i, j] for b in range(B) for i in range(T) for j in range(T) if pattern[b, i, j]) / (B * T)

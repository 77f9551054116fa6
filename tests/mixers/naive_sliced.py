"""Naive sliced and super attention, in loops; its author saw the formulas only, neither code nor tests from here."""

import math

import torch

from naive import linear, may, softmax


def align(values, W_A, bias_A=None, causal=False, keep=None):
    """values: list of S vectors.  Row s of the answer: sum_r W_A[s, r] values[r] (+ bias_A[s])."""
    S = len(values)
    if W_A.shape[-1] < S:
        raise ValueError("longer than the alignment matrix")
    rows = []
    for s in range(S):
        y = torch.zeros_like(values[0])
        for r in range(S):
            if causal and r > s:
                continue
            if keep is not None and not bool(keep[r]):
                continue
            y = y + W_A[s, r] * values[r]
        if bias_A is not None:
            y = y + bias_A[s]
        rows.append(y)
    return rows


def _core(x, context, queries, keys, values, H, Wo, bo, allowed, causal, keep):
    """queries/keys/values[b][t]: (M,) vectors, or values[b][h][t] (D,) when already split."""
    D = x.shape[-1] // H
    batch = []
    for b in range(x.shape[0]):
        rows = []
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                cut = slice(h * D, (h + 1) * D)
                js = [
                    j
                    for j in range(context.shape[1])
                    if may(allowed, b, i, j) and not (causal and j > i) and (keep is None or bool(keep[b][j]))
                ]
                y = x.new_zeros(D)
                if js:
                    p = softmax([(queries[b][i][cut] * keys[b][j][cut]).sum() / math.sqrt(D) for j in js])
                    for w, j in zip(p, js):
                        y = y + w * values[b][h][j]
                heads.append(y)
            rows.append(linear(torch.cat(heads), Wo, bo))
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def _project(x, W, b):
    return [[linear(x[n, t], W, b) for t in range(x.shape[1])] for n in range(x.shape[0])]


def _identity(x):
    return [[x[n, t] for t in range(x.shape[1])] for n in range(x.shape[0])]


def _split(tokens, H):
    D = tokens[0][0].shape[0] // H
    return [[[v[h * D : (h + 1) * D] for v in row] for h in range(H)] for row in tokens]


def standard(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    *,
    num_heads,
    context=None,
    allowed=None,
    causal=False,
    keep=None,
    bq=None,
    bk=None,
    bv=None,
    bo=None,
):
    """eq. 1"""
    c = x if context is None else context
    return _core(
        x,
        c,
        _project(x, Wq, bq),
        _project(c, Wk, bk),
        _split(_project(c, Wv, bv), num_heads),
        num_heads,
        Wo,
        bo,
        allowed,
        causal,
        keep,
    )


def optimised(
    x, Wq, Wk, Wo, *, num_heads, context=None, allowed=None, causal=False, keep=None, bq=None, bk=None, bo=None
):
    """eq. 2: values are slices of x."""
    c = x if context is None else context
    return _core(
        x,
        c,
        _project(x, Wq, bq),
        _project(c, Wk, bk),
        _split(_identity(c), num_heads),
        num_heads,
        Wo,
        bo,
        allowed,
        causal,
        keep,
    )


def efficient(x, Wq, Wo, *, num_heads, context=None, allowed=None, causal=False, keep=None, bq=None, bo=None):
    """eq. 3: keys and values are slices of x."""
    c = x if context is None else context
    return _core(
        x,
        c,
        _project(x, Wq, bq),
        _identity(c),
        _split(_identity(c), num_heads),
        num_heads,
        Wo,
        bo,
        allowed,
        causal,
        keep,
    )


def super_attention(
    x, Wq, Wo, W_A, *, num_heads, context=None, allowed=None, causal=False, keep=None, bq=None, bo=None, bias_A=None
):
    """eqs. 4-6."""
    c = x if context is None else context
    split = _split(_identity(c), num_heads)
    values = []
    for b in range(c.shape[0]):
        per_head = []
        for h in range(num_heads):
            A = W_A if W_A.dim() == 2 else W_A[h]
            per_head.append(align(split[b][h], A, bias_A, causal, None if keep is None else keep[b]))
        values.append(per_head)
    return _core(x, c, _project(x, Wq, bq), _identity(c), values, num_heads, Wo, bo, allowed, causal, keep)


def parameter_count(form, dim, length=0):
    return {"standard": 4, "optimised": 3, "efficient": 2, "super": 2}[form] * dim**2 + (
        length**2 if form == "super" else 0
    )

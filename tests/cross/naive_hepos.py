"""B049, Hepos, head-wise positional strides in cross attention: equations 1-3, exactly.

Without the extra rows of the released code.

Written from the formulas alone, by someone who has read neither code nor test of the library.
"""

import torch

from naive import linear, softmax


def allowed(heads, T, S, stride):
    """(heads, T, S) bool: j mod s = h mod s."""
    return torch.tensor([[[j % stride == h % stride for j in range(S)] for i in range(T)] for h in range(heads)])


def hepos(x, context, Wq, bq, Wk, bk, Wv, bv, Wo, bo, *, heads, stride=4, padding=None, key_heads=None):
    """x (B, T, M), context (B, S, M), padding (B, S) True = padding. A head that sees nothing gives 0.
    key_heads G < heads: query head h reads key head h G // heads (contiguous groups, inferred), residue of the
    query head."""
    B, T, _ = x.shape
    S, G = context.shape[1], key_heads or heads
    assert heads % stride == 0
    D = Wq.shape[0] // heads
    out = []
    for b in range(B):
        k = [linear(context[b, j], Wk, bk) for j in range(S)]
        v = [linear(context[b, j], Wv, bv) for j in range(S)]
        rows = []
        for i in range(T):
            q = linear(x[b, i], Wq, bq) / D**0.5
            parts = []
            for h in range(heads):
                s = slice(h * G // heads * D, (h * G // heads + 1) * D)
                seen = [
                    j for j in range(S) if j % stride == h % stride and (padding is None or not bool(padding[b][j]))
                ]
                if not seen:
                    parts.append(x.new_zeros(D))
                    continue
                p = softmax([(q[h * D : (h + 1) * D] * k[j][s]).sum() for j in seen])
                parts.append(sum(p[n] * v[j][s] for n, j in enumerate(seen)))
            rows.append(linear(torch.cat(parts), Wo, bo))
        out.append(torch.stack(rows))
    return torch.stack(out)

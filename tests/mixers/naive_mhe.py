"""Multiple head embeddings (MHE) attention, written with loops by somebody who saw the equations only.

- biases: one of width D belongs to each shared projection, added before the head embedding, and one of width M to W_o.
- `multiply` uses 1 + a, which is recalled and not read; `multiply_plain` is the other reading, q_h = q * a.
- masks: `allowed[i][j]` True = query i may see key j. A row that may see nothing has weights 0, and head outputs 0: the
  value embedding is part of the value and is not added to the output.
- position (rotary) is applied after the embeddings: `rotate(vector, position)` is any function.

Shapes: x (B,T,M), memory (B,S,M), W_q, W_k, W_v (M,D) used as x W, a, c, e (H,D), W_o (H*D,M).
allowed: nested booleans or a bool tensor (T,S), (B,T,S) or (B,H,T,S), or None.
"""

import math

import torch


def _may(allowed, b, h, i, j):
    if allowed is None:
        return True
    allowed = torch.as_tensor(allowed)
    if allowed.dim() == 2:
        return bool(allowed[i, j])
    if allowed.dim() == 3:
        return bool(allowed[b, i, j])
    return bool(allowed[b, h, i, j])


def causal(T, S=None):
    """allowed[i][j] with the last query at the last key."""
    S = T if S is None else S
    return [[j <= i + (S - T) for j in range(S)] for i in range(T)]


def project(x, W, bias=None):
    """eq. 1: out[b][t][d] = sum_m x[b][t][m] W[m][d] (+ bias[d])."""
    rows = []
    for b in range(x.shape[0]):
        row = []
        for t in range(x.shape[1]):
            cells = []
            for d in range(W.shape[1]):
                cell = sum(x[b, t, m] * W[m, d] for m in range(W.shape[0]))
                cells.append(cell if bias is None else cell + bias[d])
            row.append(torch.stack(cells))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def embed_add(vector, embedding):
    return vector + embedding


def embed_multiply(vector, embedding):
    return vector * (1 + embedding)


def embed_multiply_plain(vector, embedding):
    return vector * embedding


FORMS = {"add": embed_add, "multiply": embed_multiply, "multiply_plain": embed_multiply_plain}


def head_embeddings(shared, embedding, form="add"):
    """eq. 2: shared (B,T,D), embedding (H,D) -> (B,H,T,D)."""
    apply = FORMS[form]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([apply(shared[b, t], embedding[h]) for t in range(shared.shape[1])])
                    for h in range(embedding.shape[0])
                ]
            )
            for b in range(shared.shape[0])
        ]
    )


def _weights(scores, visible):
    """softmax over the visible keys; all zero when none is visible."""
    seen = [s for s, v in zip(scores, visible) if v]
    if not seen:
        return [s * 0 for s in scores]
    top = max(float(s.detach()) for s in seen)
    total = sum(torch.exp(s - top) for s in seen)
    return [torch.exp(s - top) / total if v else s.new_zeros(()) for s, v in zip(scores, visible)]


def heads_attention(q, k, v, allowed=None, rotate=None):
    """eq. 3 without W_o: q (B,H,T,D), k, v (B,H,S,D) -> (out (B,H,T,D), weights (B,H,T,S))."""
    B, H, T, D = q.shape
    S = k.shape[2]
    outs, maps = [], []
    for b in range(B):
        out_b, map_b = [], []
        for h in range(H):
            out_h, map_h = [], []
            for i in range(T):
                qi = q[b, h, i] if rotate is None else rotate(q[b, h, i], i + S - T)
                scores = []
                for j in range(S):
                    kj = k[b, h, j] if rotate is None else rotate(k[b, h, j], j)
                    scores.append(sum(qi[d] * kj[d] for d in range(D)) / math.sqrt(D))
                w = _weights(scores, [_may(allowed, b, h, i, j) for j in range(S)])
                map_h.append(torch.stack(w))
                out_h.append(sum(w[j] * v[b, h, j] for j in range(S)))
            out_b.append(torch.stack(out_h))
            map_b.append(torch.stack(map_h))
        outs.append(torch.stack(out_b))
        maps.append(torch.stack(map_b))
    return torch.stack(outs), torch.stack(maps)


def merge(heads, W_o, b_o=None):
    """concat over heads (head-major) times W_o (H*D, M)."""
    B, H, T, _ = heads.shape
    rows = torch.stack(
        [torch.stack([torch.cat([heads[b, h, t] for h in range(H)]) for t in range(T)]) for b in range(B)]
    )
    return project(rows, W_o, b_o)


def multi_head_embedding_attention(
    x,
    W_q,
    W_k,
    W_v,
    a,
    c,
    e,
    W_o,
    form="add",
    allowed=None,
    b_q=None,
    b_k=None,
    b_v=None,
    b_o=None,
    memory=None,
    rotate=None,
):
    """The whole layer, form "add", "multiply" (1 + a) or "multiply_plain" (a)."""
    memory = x if memory is None else memory
    q = head_embeddings(project(x, W_q, b_q), a, form)
    k = head_embeddings(project(memory, W_k, b_k), c, form)
    v = head_embeddings(project(memory, W_v, b_v), e, form)
    out, _ = heads_attention(q, k, v, allowed, rotate)
    return merge(out, W_o, b_o)


def add_attention(x, W_q, W_k, W_v, a, c, e, W_o, allowed=None, **more):
    return multi_head_embedding_attention(x, W_q, W_k, W_v, a, c, e, W_o, "add", allowed, **more)


def multiply_attention(x, W_q, W_k, W_v, a, c, e, W_o, allowed=None, **more):
    return multi_head_embedding_attention(x, W_q, W_k, W_v, a, c, e, W_o, "multiply", allowed, **more)


def multiply_plain_attention(x, W_q, W_k, W_v, a, c, e, W_o, allowed=None, **more):
    return multi_head_embedding_attention(x, W_q, W_k, W_v, a, c, e, W_o, "multiply_plain", allowed, **more)


def add_attention_reduced(x, W_q, W_k, W_v, a, e, W_o, allowed=None):
    """What `add` comes to without position: s_ij = (q_i + a_h) . k_j / sqrt(D), no c at all."""
    return multi_head_embedding_attention(x, W_q, W_k, W_v, a, torch.zeros_like(a), e, W_o, "add", allowed)


def rotary(base=10000.0):
    """Rotation of the pairs (2p, 2p+1); a position to use with `rotate`."""

    def rotate(vector, position):
        D = vector.shape[0]
        cells = []
        for p in range(D // 2):
            angle = position * base ** (-2 * p / D)
            x0, x1 = vector[2 * p], vector[2 * p + 1]
            cells.append(x0 * math.cos(angle) - x1 * math.sin(angle))
            cells.append(x0 * math.sin(angle) + x1 * math.cos(angle))
        return torch.stack(cells)

    return rotate


def parameter_counts(n, d):
    """eq. 5, q, k and v projections only (no biases, no W_o)."""
    mhe, mha, single = 3 * n * d * d + 3 * n * d, 3 * n * n * d * d, 3 * n * d * d
    return {"mhe": mhe, "mha": mha, "single_head": single, "mha_minus_mhe": mha - mhe}

"""EIT's enhanced multi-head attention, written with loops by somebody who saw the equations only.

- inner = group convolution (H groups) H*H -> H*hidden, ReLU, group convolution H*hidden -> H*c; cross = full one
  H*c -> hidden_cross, ReLU, full convolution -> H. No ReLU between the two, no residual S_ii, biases optional.
- `efficient_interaction` is a reimplementation's: one group convolution, ReLU, one convolution down to H.
- kernels larger than 1: masked entries are set to 0 before each convolution. `reach="earlier"`: a kernel reads queries
  t-a+1 .. t and keys s-b+1 .. s; `reach="centred"`: t - (a-1)//2 .., zero padded.
- convolution is cross-correlation, as in torch.
- rows without a visible key: weights 0.

Shapes: x (B,T,M), W_q, W_k, W_v (M,H*D) used as x W, W_o (H*D,M); convolution weights torch-style
(out, in/groups, a, b), biases (out).  allowed: nested booleans or bool tensor (T,S) or (B,T,S).
"""

import math

import torch


def _may(allowed, b, i, j):
    if allowed is None:
        return True
    allowed = torch.as_tensor(allowed)
    return bool(allowed[i, j] if allowed.dim() == 2 else allowed[b, i, j])


def causal(T, S=None):
    S = T if S is None else S
    return [[j <= i + (S - T) for j in range(S)] for i in range(T)]


def project(x, W, bias=None):
    rows = []
    for b in range(x.shape[0]):
        row = []
        for t in range(x.shape[1]):
            cell = torch.stack([sum(x[b, t, m] * W[m, d] for m in range(W.shape[0])) for d in range(W.shape[1])])
            row.append(cell if bias is None else cell + bias)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def split(x, H):
    """(B,T,H*D) -> (B,H,T,D), head-major columns."""
    D = x.shape[2] // H
    return torch.stack(
        [
            torch.stack([torch.stack([x[b, t, h * D : (h + 1) * D] for t in range(x.shape[1])]) for h in range(H)])
            for b in range(x.shape[0])
        ]
    )


def many_to_many_scores(q, k):
    """eq. 1: q (B,H,T,D), k (B,H,S,D) -> (B,H,H,T,S); [b][i][j] = q_i k_j^T / sqrt(D)."""
    B, H, T, D = q.shape
    S = k.shape[2]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack(
                                [
                                    torch.stack(
                                        [
                                            sum(q[b, i, t, d] * k[b, j, s, d] for d in range(D)) / math.sqrt(D)
                                            for s in range(S)
                                        ]
                                    )
                                    for t in range(T)
                                ]
                            )
                            for j in range(k.shape[1])
                        ]
                    )
                    for i in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def i_major(maps):
    """(B,H,H,T,S) -> (B,H*H,T,S), channel i*H + j."""
    return torch.stack(
        [
            torch.stack([maps[b, i, j] for i in range(maps.shape[1]) for j in range(maps.shape[2])])
            for b in range(maps.shape[0])
        ]
    )


def zero_masked(maps, allowed):
    """(B,C,T,S): the entries that may not be seen become exactly 0."""
    if allowed is None:
        return maps
    B, C, T, S = maps.shape
    zero = maps.new_zeros(())
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            torch.stack([maps[b, c, t, s] if _may(allowed, b, t, s) else zero for s in range(S)])
                            for t in range(T)
                        ]
                    )
                    for c in range(C)
                ]
            )
            for b in range(B)
        ]
    )


def convolution(maps, weight, bias=None, groups=1, reach="centred"):
    """maps (B,C,T,S), weight (out, C/groups, a, b), zero padded, output the same T and S."""
    B, C, T, S = maps.shape
    out, per_group, a, b_ = weight.shape
    if per_group * groups != C or out % groups:
        raise ValueError("channels and groups do not fit")
    first_t = a - 1 if reach == "earlier" else (a - 1) // 2
    first_s = b_ - 1 if reach == "earlier" else (b_ - 1) // 2

    def cell(b, o, t, s):
        group = o // (out // groups)
        total = maps.new_zeros(())
        for c in range(per_group):
            for u in range(a):
                for w in range(b_):
                    tt, ss = t - first_t + u, s - first_s + w
                    if 0 <= tt < T and 0 <= ss < S:
                        total = total + weight[o, c, u, w] * maps[b, group * per_group + c, tt, ss]
        return total if bias is None else total + bias[o]

    return torch.stack(
        [
            torch.stack(
                [torch.stack([torch.stack([cell(b, o, t, s) for s in range(S)]) for t in range(T)]) for o in range(out)]
            )
            for b in range(B)
        ]
    )


def relu(maps):
    return torch.where(maps > 0, maps, torch.zeros_like(maps))


def inner_subspace(maps, H, w1, b1, w2, b2, allowed=None, reach="centred"):
    """eq. 2: maps (B,H*H,T,S) i-major -> (B,H*c,T,S); w1 (H*hidden,H,a,b), w2 (H*c,hidden,a,b)."""
    hidden = relu(convolution(zero_masked(maps, allowed), w1, b1, H, reach))
    return convolution(zero_masked(hidden, allowed), w2, b2, H, reach)


def cross_subspace(maps, w3, b3, w4, b4, allowed=None, reach="centred", groups_cross=1):
    """eq. 3: maps (B,H*c,T,S) -> (B,H,T,S); w3 (hidden_cross,H*c,a,b), w4 (H,hidden_cross,a,b)."""
    hidden = relu(convolution(zero_masked(maps, allowed), w3, b3, groups_cross, reach))
    return convolution(zero_masked(hidden, allowed), w4, b4, groups_cross, reach)


def efficient_interaction(maps, H, w1, b1, w2, b2, allowed=None, reach="centred", groups_cross=1):
    """eq. 6, E-EIT as in the reimplementation: group conv, ReLU, conv to H maps."""
    hidden = relu(convolution(zero_masked(maps, allowed), w1, b1, H, reach))
    return convolution(zero_masked(hidden, allowed), w2, b2, groups_cross, reach)


def softmax_keys(scores, allowed=None):
    """(B,H,T,S) -> weights; rows that see nothing are 0."""
    B, H, T, S = scores.shape
    out = []
    for b in range(B):
        heads = []
        for h in range(H):
            rows = []
            for t in range(T):
                seen = [s for s in range(S) if _may(allowed, b, t, s)]
                zero = scores.new_zeros(())
                if not seen:
                    rows.append(torch.stack([zero] * S))
                    continue
                top = max(float(scores[b, h, t, s].detach()) for s in seen)
                total = sum(torch.exp(scores[b, h, t, s] - top) for s in seen)
                rows.append(
                    torch.stack([torch.exp(scores[b, h, t, s] - top) / total if s in seen else zero for s in range(S)])
                )
            heads.append(torch.stack(rows))
        out.append(torch.stack(heads))
    return torch.stack(out)


def values(weights, v):
    """o_h = A_h v_h: (B,H,T,S), (B,H,S,D) -> (B,H,T,D)."""
    B, H, T, S = weights.shape
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([sum(weights[b, h, t, s] * v[b, h, s] for s in range(S)) for t in range(T)])
                    for h in range(H)
                ]
            )
            for b in range(B)
        ]
    )


def merge(heads, W_o, b_o=None):
    B, H, T, _ = heads.shape
    rows = torch.stack(
        [torch.stack([torch.cat([heads[b, h, t] for h in range(H)]) for t in range(T)]) for b in range(B)]
    )
    return project(rows, W_o, b_o)


def interacted_scores(q, k, inner, cross, allowed=None, reach="centred", bias=None):
    """eq. 1 to 3: inner = (w1, b1, w2, b2), cross = (w3, b3, w4, b4) -> (B,H,T,S)."""
    H = q.shape[1]
    maps = i_major(many_to_many_scores(q, k))
    if bias is not None:
        maps = maps + bias
    return cross_subspace(inner_subspace(maps, H, *inner, allowed, reach), *cross, allowed, reach)


def enhanced_attention(
    x,
    W_q,
    W_k,
    W_v,
    W_o,
    H,
    inner,
    cross,
    allowed=None,
    reach="centred",
    b_q=None,
    b_k=None,
    b_v=None,
    b_o=None,
    bias=None,
    memory=None,
):
    """eq. 4, the whole layer."""
    memory = x if memory is None else memory
    q = split(project(x, W_q, b_q), H)
    k = split(project(memory, W_k, b_k), H)
    v = split(project(memory, W_v, b_v), H)
    scores = interacted_scores(q, k, inner, cross, allowed, reach, bias)
    return merge(values(softmax_keys(scores, allowed), v), W_o, b_o)


def efficient_attention(
    x,
    W_q,
    W_k,
    W_v,
    W_o,
    H,
    w1,
    b1,
    w2,
    b2,
    allowed=None,
    reach="centred",
    b_q=None,
    b_k=None,
    b_v=None,
    b_o=None,
    bias=None,
    memory=None,
):
    """eq. 6, the layer with `efficient_interaction`."""
    memory = x if memory is None else memory
    q = split(project(x, W_q, b_q), H)
    k = split(project(memory, W_k, b_k), H)
    v = split(project(memory, W_v, b_v), H)
    maps = i_major(many_to_many_scores(q, k))
    if bias is not None:
        maps = maps + bias
    scores = efficient_interaction(maps, H, w1, b1, w2, b2, allowed, reach)
    return merge(values(softmax_keys(scores, allowed), v), W_o, b_o)


def plain_attention(x, W_q, W_k, W_v, W_o, H, allowed=None):
    """What one-hot interaction must give: ordinary multi-head attention (maps S_ii)."""
    q, k, v = (split(project(x, W, None), H) for W in (W_q, W_k, W_v))
    maps = many_to_many_scores(q, k)
    own = torch.stack([torch.stack([maps[b, h, h] for h in range(H)]) for b in range(x.shape[0])])
    return merge(values(softmax_keys(own, allowed), v), W_o)


def one_hot_interaction(H, dtype=torch.float64):
    """Kernel-1 weights that return S_ii: each ReLU gets the pair (+s, -s), recombined + - .

    inner: hidden 2 per group, c = 1; cross: hidden 2 H.  -> (inner, cross) with zero biases.
    """
    zeros = torch.zeros
    w1 = torch.tensor(
        [
            [[[(1.0 if sign == 0 else -1.0) if j == i else 0.0]] for j in range(H)]
            for i in range(H)
            for sign in range(2)
        ],
        dtype=dtype,
    )
    w2 = torch.tensor([[[[1.0]], [[-1.0]]] for i in range(H)], dtype=dtype)
    w3 = torch.tensor(
        [
            [[[(1.0 if sign == 0 else -1.0) if j == i else 0.0]] for j in range(H)]
            for i in range(H)
            for sign in range(2)
        ],
        dtype=dtype,
    )
    w4 = torch.tensor(
        [[[[(1.0 if n % 2 == 0 else -1.0) if n // 2 == i else 0.0]] for n in range(2 * H)] for i in range(H)],
        dtype=dtype,
    )
    return (
        (w1, zeros(2 * H, dtype=dtype), w2, zeros(H, dtype=dtype)),
        (w3, zeros(2 * H, dtype=dtype), w4, zeros(H, dtype=dtype)),
    )


def parameter_count(H, hidden, hidden_cross, c=1, a=1, b=1, biases=True):
    """Interaction parameters beyond plain attention."""
    w = a * b * (H * hidden * H + H * c * hidden + hidden_cross * H * c + H * hidden_cross)
    return w + (H * hidden + H * c + hidden_cross + H if biases else 0)

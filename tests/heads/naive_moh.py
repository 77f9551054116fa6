"""Mixture-of-head attention in loops: written from the equations by somebody who saw neither the code nor the tests.

Of equal logits the lower index wins. With no shared heads, or none active, there are no type weights. The loss counts
all tokens of the batch, or those of `keep`, and the selection carries no gradient. In the form for continued language
models gates are 1 or 0, and the gradient passes to the softmax of norm / std over the routed heads.
Weights are (out, in); head h owns rows h D to (h + 1) D, and reads key head h // (H / G).
"""

import math

import torch

from naive import linear, may, softmax


def top_k(logits, k):
    """list of bools, largest first, lower index first on ties."""
    values = [float(z.detach()) for z in logits]
    order = sorted(range(len(values)), key=lambda e: (-values[e], e))
    chosen = set(order[:k])
    return [e in chosen for e in range(len(values))]


def _heads(x, context, Wq, Wk, Wv, bq, bk, bv, num_heads, num_kv_heads, allowed, rotate):
    """eq. 1.  Returns O[b][t][h] (D,) and the unrotated queries q[b][t][h]."""
    D = Wq.shape[0] // num_heads
    group = num_heads // num_kv_heads
    V = Wv.shape[0] // num_kv_heads
    outs, queries = [], []
    for b in range(x.shape[0]):
        k = [linear(context[b, j], Wk, bk) for j in range(context.shape[1])]
        v = [linear(context[b, j], Wv, bv) for j in range(context.shape[1])]
        out_b, query_b = [], []
        for i in range(x.shape[1]):
            q = linear(x[b, i], Wq, bq)
            out_i, query_i = [], []
            for h in range(num_heads):
                g = h // group
                q_h = q[h * D : (h + 1) * D]
                query_i.append(q_h)
                if rotate is not None:
                    q_h = rotate(q_h, i)
                js = [j for j in range(context.shape[1]) if may(allowed, b, i, j)]
                if not js:
                    out_i.append(x.new_zeros(V))
                    continue
                logits = []
                for j in js:
                    k_h = k[j][g * D : (g + 1) * D]
                    if rotate is not None:
                        k_h = rotate(k_h, j)
                    logits.append((q_h * k_h).sum() / math.sqrt(D))
                p = softmax(logits)
                y = x.new_zeros(V)
                for w, j in zip(p, js):
                    y = y + w * v[j][g * V : (g + 1) * V]
                out_i.append(y)
            out_b.append(out_i)
            query_b.append(query_i)
        outs.append(out_b)
        queries.append(query_b)
    return outs, queries


def _mix(outs, gates, Wo, bo):
    """out_t = sum_i g_i(t) Wo_i O_i(t) + bo, Wo_i the columns of Wo (out, in) that belong to head i."""
    batch = []
    for b in range(len(outs)):
        rows = []
        for t in range(len(outs[b])):
            y = torch.zeros(Wo.shape[0], dtype=Wo.dtype)
            for h, o in enumerate(outs[b][t]):
                V = o.shape[0]
                y = y + gates[b][t][h] * linear(o, Wo[:, h * V : (h + 1) * V])
            if bo is not None:
                y = y + bo
            rows.append(y)
        batch.append(torch.stack(rows))
    return torch.stack(batch)


def gates_code(x_t, hs, K, W_r=None, W_s=None, W_h=None):
    """2'. List of hs + E gates of one token, and the list of bools selected (E)."""
    E = 0 if W_r is None else W_r.shape[0]
    zero = x_t.new_zeros(())
    if hs > 0:
        if hs == 1 and W_s is None:
            shared = [x_t.new_ones(())]
        else:
            shared = [hs * p for p in softmax(list(linear(x_t, W_s)))]
    else:
        shared = []
    if K == 0:
        return shared + [zero] * E, [False] * E
    logits = list(linear(x_t, W_r))
    p = softmax(logits)
    selected = top_k(logits, K)
    total = zero
    for e in range(E):
        if selected[e]:
            total = total + p[e]
    eps = torch.finfo(x_t.dtype).eps
    if float(total.detach()) < eps:
        total = x_t.new_tensor(eps)
    routed = [K * p[e] / total if selected[e] else zero for e in range(E)]
    if hs > 0:
        a = softmax(list(linear(x_t, W_h)))
        shared = [2 * a[0] * g for g in shared]
        routed = [2 * a[1] * g for g in routed]
    return shared + routed, selected


def gates_paper(x_t, hs, K, W_r=None, W_s=None, W_h=None):
    """eq. 2."""
    E = 0 if W_r is None else W_r.shape[0]
    zero = x_t.new_zeros(())
    if hs > 0:
        shared = [x_t.new_ones(())] if (hs == 1 and W_s is None) else softmax(list(linear(x_t, W_s)))
    else:
        shared = []
    if K == 0:
        return shared + [zero] * E, [False] * E
    logits = list(linear(x_t, W_r))
    p = softmax(logits)
    selected = top_k(logits, K)
    routed = [p[e] if selected[e] else zero for e in range(E)]
    if hs > 0:
        a = softmax(list(linear(x_t, W_h)))
        shared = [a[0] * g for g in shared]
        routed = [a[1] * g for g in routed]
    return shared + routed, selected


def gates_llm(q_heads, hs, K, straight_through=False):
    """parameter-free router of one token. q_heads: list of H unrotated query vectors."""
    routed = q_heads[hs:]
    r = [torch.sqrt((q * q).sum()) for q in routed]
    E = len(r)
    mean = sum(r[1:], r[0]) / E
    var = sum(((z - mean) ** 2 for z in r[1:]), (r[0] - mean) ** 2) / (E - 1)
    std = torch.sqrt(var)
    logits = [z / std for z in r]
    p = softmax(logits)
    selected = top_k(logits, K)
    gates = []
    for e in range(E):
        hard = p[e].new_tensor(1.0 if selected[e] else 0.0)
        gates.append(hard + p[e] - p[e].detach() if straight_through else hard)
    return [p[0].new_ones(())] * hs + gates, selected


def _all_gates(x, fn):
    gates, selected = [], []
    for b in range(x.shape[0]):
        gb, sb = [], []
        for t in range(x.shape[1]):
            g, s = fn(b, t)
            gb.append(g)
            sb.append(s)
        gates.append(gb)
        selected.append(sb)
    return gates, selected


def _stack_gates(gates):
    return torch.stack([torch.stack([torch.stack(g) for g in gb]) for gb in gates])


def moh(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    *,
    num_heads,
    num_shared,
    top_k,
    W_r=None,
    W_s=None,
    W_h=None,
    bq=None,
    bk=None,
    bv=None,
    bo=None,
    num_kv_heads=None,
    context=None,
    allowed=None,
    rotate=None,
    form="code",
):
    """Returns out (B,T,M), gates (B,T,H), selected (B,T,E) nested list of bools.  form: code | paper."""
    context = x if context is None else context
    G = num_heads if num_kv_heads is None else num_kv_heads
    outs, _ = _heads(x, context, Wq, Wk, Wv, bq, bk, bv, num_heads, G, allowed, rotate)
    rule = {"code": gates_code, "paper": gates_paper}[form]
    gates, selected = _all_gates(x, lambda b, t: rule(x[b, t], num_shared, top_k, W_r, W_s, W_h))
    return _mix(outs, gates, Wo, bo), _stack_gates(gates), selected


def moh_paper(*args, **kwargs):
    return moh(*args, form="paper", **kwargs)


def moh_llm(
    x,
    Wq,
    Wk,
    Wv,
    Wo,
    *,
    num_heads,
    num_shared,
    top_k,
    bq=None,
    bk=None,
    bv=None,
    bo=None,
    num_kv_heads=None,
    context=None,
    allowed=None,
    rotate=None,
    straight_through=False,
):
    context = x if context is None else context
    G = num_heads if num_kv_heads is None else num_kv_heads
    outs, queries = _heads(x, context, Wq, Wk, Wv, bq, bk, bv, num_heads, G, allowed, rotate)
    gates, selected = _all_gates(x, lambda b, t: gates_llm(queries[b][t], num_shared, top_k, straight_through))
    return _mix(outs, gates, Wo, bo), _stack_gates(gates), selected


def load_balance_paper(x, W_r, K, keep=None):
    """eq. 3: sum_i P_i f_i (the factor 0.01 is not included)."""
    E = W_r.shape[0]
    P = [x.new_zeros(()) for _ in range(E)]
    f = [0.0] * E
    n = 0
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if keep is not None and not bool(keep[b][t]):
                continue
            n += 1
            logits = list(linear(x[b, t], W_r))
            p = softmax(logits)
            chosen = top_k(logits, K)
            for e in range(E):
                P[e] = P[e] + p[e]
                f[e] += float(chosen[e])
    total = x.new_zeros(())
    for e in range(E):
        total = total + (P[e] / n) * (f[e] / n)
    return total


def load_balance(x, W_r, K, keep=None):
    """3': E^2 mean_i(P_i f_i) = E sum_i P_i f_i."""
    return W_r.shape[0] * load_balance_paper(x, W_r, K, keep)
